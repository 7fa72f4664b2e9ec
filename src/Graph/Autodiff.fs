/// Reverse mode: graph in, graph out. Walks nodes backwards, asking each op's record for its rule.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Autodiff

open System.Collections.Generic

let private trained (op: Op) =
    match op with
    | Op.Parameter(spec, _) -> spec.Update.IsAdamW
    | _other -> false

/// Does a value depend on a trained parameter in a differentiable way?
let private activity (graph: Graph) =
    let active = Array.create graph.Types.Length false

    for node in graph.Nodes do
        let flows =
            trained node.Op
            || (Array.exists (fun v -> active[v]) node.Inputs && not (Catalog.define node.Op).Vjp.IsStop)

        for v in node.Outputs do
            active[v] <- flows && graph.Types[v].DType.IsFloat

    active

let private missing (node: Node) reason = {
    Code = Codes.NotDifferentiable
    At = node.Origin.Path
    Message = $"no gradient through %s{(Catalog.define node.Op).Name}: %s{reason}"
    Help = "detach its operand, or keep trained parameters out of it"
}

let private reverse (lossValue: int) (graph: Graph) : Result<Graph, Diagnostic list> =
    let rebuild = Rewrite.Rebuild graph

    for node in graph.Nodes do
        rebuild.Copy node

    let builder = rebuild.Builder
    let active = activity graph
    let pending = Dictionary<int, List<struct (ModelUnit * int)>>()
    let errors = List<Diagnostic>()
    let lossNode = graph.NodeOf lossValue

    let origin path part = {
        Path = path
        Unit = part
        Pass = Pass.Backward
    }

    /// The cotangent with its primal's axis names: rules bind by position, so names may come from another operand.
    let rec named (value: int) (cotangent: int) =
        let want, have = graph.Types[value].Names, (builder.Type cotangent).Names

        if want = have || want.Length <> have.Length then
            cotangent
        else
            let differs = Array.findIndex id (Array.map2 (<>) want have)
            // a name still in use elsewhere moves out of the way first
            let from, into =
                match System.Array.IndexOf(have, want[differs]) with
                | -1 -> have[differs], want[differs]
                | taken -> have[taken], have[taken] + "'"

            let node = graph.NodeOf value
            named value (builder.Add(Op.Rename(from, into), [ cotangent ], origin node.Origin.Path node.Origin.Unit)[0])

    let contribute (value: int) (part: ModelUnit) (unnamed: int) =
        let cotangent = named value unnamed

        if graph.Types[value] <> builder.Type cotangent then
            invalidOp
                $"%s{(graph.NodeOf value).Origin.Path}: cotangent is %O{builder.Type cotangent}, its primal %O{graph.Types[value]} (a bug in dsg)"

        match pending.TryGetValue value with
        | true, list -> list.Add(struct (part, cotangent))
        | false, _ -> pending[value] <- List [ struct (part, cotangent) ]

    /// Contributions summed within each unit first, so that one value crosses a stage boundary, not one per use.
    let perUnit (value: int) (path: string) : (ModelUnit * int) list =
        match pending.TryGetValue value with
        | false, _ -> []
        | true, list ->
            list
            |> Seq.groupBy (fun (struct (part, _)) -> part)
            |> Seq.map (fun (part, group) ->
                match [ for struct (_, v) in group -> v ] with
                | [ one ] -> part, one
                | many -> part, builder.Add(Op.Add, many, origin path part)[0])
            |> List.ofSeq

    let total (value: int) (node: Node) : int voption =
        match perUnit value node.Origin.Path with
        | [] -> ValueNone
        | sums ->
            for _, v in sums do
                builder.SetPrimal(v, rebuild[value])

            match sums with
            | [ _, one ] -> ValueSome one
            | many ->
                let sum = builder.Add(Op.Add, List.map snd many, origin node.Origin.Path node.Origin.Unit)
                builder.SetPrimal(sum[0], rebuild[value])
                ValueSome sum[0]

    let seed = Op.Constant(1.0, graph.Types[lossValue])

    contribute
        lossValue
        lossNode.Origin.Unit
        (builder.Add(seed, [], origin lossNode.Origin.Path lossNode.Origin.Unit)[0])

    for n in graph.Nodes.Length - 1 .. -1 .. 0 do
        let node = graph.Nodes[n]

        match node.Op with
        | Op.Parameter(spec, _) when trained node.Op ->
            for _, v in perUnit node.Outputs[0] node.Origin.Path do
                builder.SetPrimal(v, rebuild[node.Outputs[0]])
                builder.SetOutput($"grad:%s{spec.Name}", v)
        | _other when node.Outputs |> Array.exists (fun v -> active[v] && pending.ContainsKey v) ->
            match (Catalog.define node.Op).Vjp with
            | Vjp.Stop -> ()
            | Vjp.Missing reason -> errors.Add(missing node reason)
            | Vjp.Rule rule ->
                let adjoint = {
                    Inputs = node.Inputs |> Array.map (fun v -> rebuild[v])
                    Outputs = node.Outputs |> Array.map (fun v -> rebuild[v])
                    Type = builder.Type
                    Cotangents = node.Outputs |> Array.map (fun v -> total v node)
                    Emit = fun op inputs -> builder.Add(op, inputs, origin node.Origin.Path node.Origin.Unit)
                }

                rule adjoint
                |> Array.iteri (fun i cotangent ->
                    match cotangent with
                    | ValueSome dx when active[node.Inputs[i]] -> contribute node.Inputs[i] node.Origin.Unit dx
                    | ValueSome _
                    | ValueNone -> ())
        | _other -> ()

    if errors.Count > 0 then
        Error(List.ofSeq errors)
    else
        Ok(rebuild.Finish() |> Rewrite.prune)

let differentiate (loss: string) (graph: Graph) : Result<Graph, Diagnostic list> =
    let refuse at message help =
        Error [
            {
                Code = Codes.NotDifferentiable
                At = at
                Message = message
                Help = help
            }
        ]

    match graph.TryOutput loss with
    | ValueNone ->
        let names = graph.Outputs |> Array.map fst |> String.concat ", "
        refuse loss $"the graph has no output '%s{loss}'" $"name one of its outputs: %s{names}"
    | ValueSome value ->
        let t = graph.Types[value]

        if t.Rank > 0 || not t.DType.IsFloat then
            refuse loss $"output '%s{loss}' is %O{t}, not one number" "sum it over all its axes"
        else
            reverse value graph

/// Evaluates a graph in float64, node by node: the meaning that every pass must preserve.
namespace DeepSeekGraph.Reference

open DeepSeekGraph

/// Every value of an evaluated graph.
[<Sealed>]
type Evaluated(graph: Graph, values: DenseTensor[]) =
    member _.Graph = graph
    member _.Item(value: int) = values[value]

    /// A named result; where several share the name (gradients, one a unit) their sum.
    member _.Output(name: string) =
        match graph.Outputs |> Array.filter (fun (n, _) -> n = name) with
        | [||] -> invalidArg "name" $"no output %s{name}"
        | found -> found |> Array.map (fun (_, v) -> values[v]) |> Array.reduce Dense.add

    /// Names of the results, each once.
    member _.OutputNames = graph.Outputs |> Array.map fst |> Array.distinct

[<RequireQualifiedAccess>]
module Evaluator =
    /// For each value that is rows: the value that is its row set; else -1.
    let routes (graph: Graph) : int[] =
        let route = Array.create graph.Types.Length -1

        for node in graph.Nodes do
            for v in node.Outputs do
                if graph.Types[v].Routed then
                    route[v] <-
                        match node.Op with
                        | Op.Route _
                        | Op.Collective(Collective.RouteToExperts, _, _) -> v
                        | Op.Collective _ when node.Inputs.Length = 1 && route[node.Inputs[0]] = node.Inputs[0] -> v
                        | Op.Collective _ when node.Inputs.Length >= 3 -> Array.last node.Inputs
                        | Op.Permute _
                        | Op.RouteProbs
                        | Op.PermuteWithProbs
                        | Op.GroupedMatMul _ -> Array.last node.Inputs
                        | _elementwise ->
                            node.Inputs
                            |> Array.tryFind (fun x -> graph.Types[x].Routed)
                            |> Option.map (fun x -> route[x])
                            |> Option.defaultValue -1

        route

    /// Zero where the row set has no row; the row set covers the first three dims.
    let mask (route: DenseTensor) (x: DenseTensor) =
        Dense.init x.Extents (fun i -> if Dense.at route i[..2] = 0.0 then 0.0 else Dense.at x i)

    /// Results of one node on given operands, masked to the rows that exist.
    let step (graph: Graph) (routes: int[]) (node: Node) (value: int -> DenseTensor) : DenseTensor[] =
        let types = node.Inputs |> Array.map (fun v -> graph.Types[v])

        match OpDef.infer (Catalog.define node.Op) types with
        | Error text -> invalidOp $"%s{node.Origin.Path}: %s{text}"
        | Ok(rule, results) ->
            Meaning.apply node.Op types rule results (Array.map value node.Inputs)
            |> Array.mapi (fun i x ->
                let v = node.Outputs[i]

                if x.Extents <> graph.Types[v].Extents then
                    invalidOp $"%A{node.Op} gives %A{x.Extents} for %O{graph.Types[v]}"

                match routes[v] with
                | -1 -> x
                | route when route = v -> x
                | route -> mask (value route) x)

    /// Evaluates every node; inputs and parameters are looked up by name.
    let run (graph: Graph) (inputs: string -> DenseTensor) (parameters: string -> DenseTensor) : Evaluated =
        let values = Array.zeroCreate<DenseTensor> graph.Types.Length
        let routes = routes graph

        let given (name: string) (t: TensorType) (x: DenseTensor) =
            if x.Extents <> t.Extents then
                invalidOp $"%s{name} is %A{x.Extents}, the graph wants %O{t}"

            [| x |]

        for node in graph.Nodes do
            let results =
                match node.Op with
                | Op.Parameter(spec, t) -> given spec.Name t (parameters spec.Name)
                | Op.Input(name, t)
                | Op.Cache(name, t) -> given name t (inputs name)
                | _computed -> step graph routes node (fun v -> values[v])

            results |> Array.iteri (fun i x -> values[node.Outputs[i]] <- x)

        Evaluated(graph, values)

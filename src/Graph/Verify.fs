/// The invariants of a legal graph: order, arity, types, unique parameters.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Verify

/// Everything wrong with a graph; empty for a legal one.
let check (graph: Graph) : Diagnostic list =
    let wrong path message = {
        Code = Codes.IllegalGraph
        At = path
        Message = message
        Help = ""
    }

    let made = Array.create graph.Types.Length false

    [
        for node in graph.Nodes do
            let at = node.Origin.Path
            let def = Catalog.define node.Op

            match node.Inputs |> Array.tryFind (fun v -> v < 0 || v >= made.Length || not made[v]) with
            | Some v -> wrong at $"%s{def.Name} reads %%%i{v} before it is made"
            | None ->
                match OpDef.infer def (node.Inputs |> Array.map (fun v -> graph.Types[v])) with
                | Error text -> wrong at $"%s{def.Name}: %s{text}"
                | Ok(_, types) ->
                    if types <> (node.Outputs |> Array.map (fun v -> graph.Types[v])) then
                        wrong at $"%s{def.Name} makes %O{types[0]}, the graph says %O{graph.Types[node.Outputs[0]]}"

            for v in node.Outputs do
                if made[v] then
                    wrong at $"%%%i{v} is made twice"

                made[v] <- true

        for name, v in graph.Outputs do
            if v < 0 || v >= made.Length || not made[v] then
                wrong name $"output %s{name} is not made by any node"

        // a cache is written in place: nobody may look at what it was before
        for node in graph.Nodes do
            for i, v in Array.indexed node.Inputs do
                if v >= 0 && v < made.Length && (graph.NodeOf v).Op.IsCache && not (node.Op.IsCacheWrite && i = 0) then
                    wrong node.Origin.Path $"%s{(Catalog.define node.Op).Name} reads a cache before it is written"

        let written =
            graph.Nodes
            |> Array.filter _.Op.IsCacheWrite
            |> Array.countBy _.Inputs[0]
            |> Array.filter (fun (_, n) -> n > 1)

        for cache, count in written do
            wrong (graph.NodeOf cache).Origin.Path $"%%%i{cache} is a cache that is written %i{count} times"

        let names =
            graph.Nodes
            |> Array.choose (fun n ->
                match n.Op with
                | Op.Parameter(spec, _) -> Some spec.Name
                | _other -> None)

        for name, count in Array.countBy id names do
            if count > 1 then
                wrong name $"parameter %s{name} is declared %i{count} times"
    ]

/// Cuts the model into pipeline stages: the layout given, DeepSeek-V3's table, or the cheapest cut by FLOPs.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Stages

open DeepSeekGraph

/// Layers and MTP depths that a graph's units name.
let count (graph: Graph) : struct (int * int) =
    let units = graph.Nodes |> Array.map _.Origin.Unit |> Array.distinct

    let most pick = units |> Array.choose pick |> Array.fold (fun n i -> max n (i + 1)) 0

    struct (most (fun u ->
                match u with
                | ModelUnit.Layer i -> Some i
                | _other -> None),
            most (fun u ->
                match u with
                | ModelUnit.Mtp i -> Some i
                | _other -> None))

/// Forward FLOPs of each unit, in mega so that they stay integers.
let private costs (graph: Graph) : ModelUnit -> int64 =
    let table =
        graph.Nodes
        |> Array.groupBy _.Origin.Unit
        |> Array.map (fun (part, nodes) ->
            let flops =
                nodes
                |> Array.sumBy (fun n ->
                    (Catalog.define n.Op).Flops
                        (n.Inputs |> Array.map (fun v -> graph.Types[v]))
                        (n.Outputs |> Array.map (fun v -> graph.Types[v])))

            part, int64 (ceil (flops / 1e3)))
        |> dict

    fun part ->
        match table.TryGetValue part with
        | true, cost -> max cost 1L
        | false, _ -> 1L

/// Parameters read by nodes of no unit: such a model is one stage.
let private unitless (graph: Graph) =
    graph.Nodes
    |> Array.tryFind (fun n ->
        n.Origin.Unit = ModelUnit.Shared
        && n.Inputs |> Array.exists (fun v -> (graph.NodeOf v).Op.IsParameter))

/// The stages of a forward graph on `pp` ranks of `vp` chunks, in the order of the model: pp x vp of them.
let run (layout: string) (pp: int) (vp: int) (graph: Graph) : Result<LayoutUnit list list, Diagnostic list> =
    let struct (layers, mtp) = count graph

    match unitless graph with
    | Some node when pp * vp > 1 ->
        Error [
            {
                Code = Codes.NoUnits
                At = node.Origin.Path
                Message =
                    $"the model names no unit for '%s{node.Origin.Path}', so it cannot be cut into %i{pp * vp} stages"
                Help =
                    "declare its parts in scopes with a ModelUnit (Embed, Layer i, Head), or use pipeline 1 and virtual_pipeline 1"
            }
        ]
    | Some _
    | None ->
        if layout <> "" then
            LayoutString.parse layout
            |> Result.bind (fun stages ->
                match LayoutString.check stages layers mtp pp vp with
                | [] -> Ok stages
                | wrong -> Error wrong)
        elif layers = 61 && mtp = 1 && (LayoutString.deepSeekV3 pp vp).IsSome then
            LayoutString.parse (LayoutString.deepSeekV3 pp vp).Value
        else
            let cost = costs graph

            LayoutString.auto
                (cost ModelUnit.Embed)
                [ for i in 0 .. layers - 1 -> cost (ModelUnit.Layer i) ]
                [ for i in 0 .. mtp - 1 -> cost (ModelUnit.Mtp i) ]
                (cost ModelUnit.Head)
                pp
                vp

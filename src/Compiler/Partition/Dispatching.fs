/// Which dispatcher a job's mixtures of experts use, when the recipe leaves it to cost.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.Dispatching

open DeepSeekGraph
open DeepSeekGraph.Compiler

/// Picoseconds a byte inside a node (NVLink, 160 GB/s reached) and between nodes (50 GB/s): DeepSeek-V3's own figures (arXiv 2412.19437,
/// section 3.2.2). Integers, so that every machine chooses alike.
let insideNode, betweenNodes = 6L, 20L

/// What one dispatcher sends per token and direction, weighed by link, in thousandths of a row. Balanced routing: the copies of
/// a token are spread evenly over ranks, and at most min(top-k, nodes) nodes see it.
let private cost (recipe: Recipe) (mesh: MeshInfo) (topK: int) (dispatcher: Dispatcher) : int64 =
    let ep, etp, k, scale = int64 mesh.Expert, int64 mesh.ExpertTensor, int64 topK, 1000L
    // consecutive ranks of the expert grid share a node
    let inNode = max 1L (min ep (int64 recipe.RanksPerNode / etp))
    let nodes = max 1L (ep / inNode)
    let weigh inside between = inside * insideNode + between * betweenNodes
    // rows gathered afterwards by the ranks that share an expert
    let shared = weigh (k * scale * (etp - 1L)) 0L

    match dispatcher with
    | Dispatcher.AllGather -> weigh ((inNode * etp - 1L) * scale) ((ep - inNode) * etp * scale)
    | Dispatcher.Flex ->
        weigh (k * scale * (inNode - 1L) / inNode) (min k nodes * scale * (nodes - 1L) / nodes) + shared
    | Dispatcher.AllToAll
    | Dispatcher.Auto -> weigh (k * scale * (inNode - 1L) / ep) (k * scale * (ep - inNode) / ep) + shared

/// The recipe's dispatcher; for `auto` the cheapest, the simpler of equal ones.
let choose (recipe: Recipe) (mesh: MeshInfo) (graph: Graph) : Dispatcher =
    let topK =
        graph.Nodes
        |> Array.tryPick (fun n ->
            match n.Op with
            | Op.Route(k, _) -> Some k
            | _other -> None)

    match recipe.Dispatcher, topK with
    | Dispatcher.Auto, Some k ->
        [ Dispatcher.AllToAll; Dispatcher.AllGather; Dispatcher.Flex ] |> List.minBy (cost recipe mesh k)
    | Dispatcher.Auto, None -> Dispatcher.AllToAll
    | named, _ -> named

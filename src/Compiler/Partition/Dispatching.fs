/// Which dispatcher a job's mixtures of experts use, when the recipe leaves it to cost.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.Dispatching

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler

/// Picoseconds that the ranks of a stage take, one after the other, to send what one microbatch needs, forward and backward; when any
/// choice of experts is as likely. The first stage's ranks stand for those of all.
let price (recipe: Recipe) (mesh: MeshInfo) (part: Partitioned) : int64 =
    let graph, perNode = part.Graph, recipe.RanksPerNode
    let slot v = Layout.slot v "" SlotKind.Temporary graph.Types[v] part.Layouts[v]
    let placed = HashSet<int>()
    let groups = Dictionary<int list, int[][]>()

    let along axes =
        match groups.TryGetValue axes with
        | true, known -> known
        | false, _ ->
            let made = Mesh.groups mesh 0 axes
            groups[axes] <- made
            made

    let mutable sum = 0L

    for node in graph.Nodes do
        match node.Op with
        | Op.Collective(kind, axes, _) ->
            let brings = RoutedTraffic.brings placed kind node.Inputs

            match RoutedTraffic.ofCollective slot (Routing.choiceIn graph) brings kind node.Inputs node.Outputs with
            | Some exchange ->
                let sent = RoutedTraffic.run perNode mesh recipe.SeqLength None (along axes) exchange
                let whole (bytes: Dictionary<int, float>) = int64 (round (Seq.sum bytes.Values))
                sum <- sum + Links.time (whole sent.All) (whole sent.Away)
            | None ->
                let operand = graph.Types[node.Inputs[0]]
                // a count of 4 bytes for each expert
                let bytes = if kind.IsRouteToExperts then 4L * int64 operand.Extents[2] else operand.Bytes

                for ranks in along axes do
                    for rank in ranks do
                        let away = ranks |> Array.filter (fun r -> r / perNode <> rank / perNode) |> Array.length
                        let struct (all, away) = Links.sent kind bytes ranks.Length away
                        sum <- sum + Links.time all away
        | _other -> ()

    sum

/// The recipe's dispatcher and the graph that it leads to; for `auto` the cheapest, the simpler of equal ones.
let choose (recipe: Recipe) (mesh: MeshInfo) (graph: Graph) (partition: Dispatcher -> Partitioned) =
    match recipe.Dispatcher with
    | Dispatcher.Auto when graph.Nodes |> Array.exists (fun node -> node.Op.IsRoute) ->
        [ Dispatcher.AllToAll; Dispatcher.AllGather; Dispatcher.Flex ]
        |> List.map (fun dispatcher -> struct (dispatcher, partition dispatcher))
        |> List.minBy (fun struct (dispatcher, part) ->
            price recipe mesh (if dispatcher.IsFlex then FusedDispatch.run recipe.RanksPerNode part else part))
    | Dispatcher.Auto -> struct (Dispatcher.AllToAll, partition Dispatcher.AllToAll)
    | named -> struct (named, partition named)

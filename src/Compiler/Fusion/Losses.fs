/// Loss and gradient of a head from one set of logits: three products of hidden states and head instead of four.
/// before: joint graph; after: losses come from the op of their gradient, in the backward pass. Law: same values. Cost: one pass over nodes.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Fusion.Losses

open System.Collections.Generic
open DeepSeekGraph

/// Nodes that depend on a node, itself included.
let private dependents (graph: Graph) (consumers: int[][]) (from: int) : HashSet<int> =
    let found = HashSet<int>()
    let stack = Stack<int>([ from ])

    while stack.Count > 0 do
        let n = stack.Pop()

        if found.Add n then
            for v in graph.Nodes[n].Outputs do
                for c in consumers[v] do
                    stack.Push c

    found

/// Each loss with the node of its gradient. Nothing that follows from the loss leaves its unit in the forward pass: it is
/// about to be made in the backward pass, when other stages are past it.
let private pairs (graph: Graph) (after: int -> HashSet<int>) =
    let gradients = Dictionary<int list, int>()

    graph.Nodes
    |> Array.iteri (fun n node ->
        if node.Op.IsLinearCrossEntropyGrad then
            gradients[List.ofArray node.Inputs[..3]] <- n)

    [
        for n, node in Array.indexed graph.Nodes do
            if node.Op.IsLinearCrossEntropy && node.Origin.Pass.IsForward then
                match gradients.TryGetValue(List.ofArray node.Inputs) with
                | true, gradient ->
                    let stays m =
                        not graph.Nodes[m].Origin.Pass.IsForward || graph.Nodes[m].Origin.Unit = node.Origin.Unit

                    if after n |> Seq.forall stays then
                        n, gradient
                | false, _ -> ()
    ]

/// The loss is a number to report: what follows from it moves into the backward pass with it. There, and not in the forward
/// pass, because the head's gradient would otherwise be kept for every microbatch under way.
let run (graph: Graph) : Graph =
    let consumers = Rewrite.consumers graph
    let after = dependents graph consumers
    let found = pairs graph after
    let following = HashSet(found |> Seq.collect (fst >> after))

    // a cotangent that follows from a loss, its own or another's, is not known beforehand
    match found |> List.filter (fun (_, gradient) -> not (following.Contains gradient)) with
    | [] -> graph
    | joined ->
        let gradientOf = dict joined

        let late =
            joined
            |> Seq.collect (fst >> after)
            |> Seq.filter (fun n -> graph.Nodes[n].Origin.Pass.IsForward)
            |> HashSet

        let rebuild = Rewrite.Rebuild graph

        let rec place n =
            let node = graph.Nodes[n]

            if rebuild[node.Outputs[0]] < 0 then
                match gradientOf.TryGetValue n with
                | true, gradient ->
                    place gradient
                    rebuild[node.Outputs[0]] <- rebuild[graph.Nodes[gradient].Outputs[0]]
                | false, _ ->
                    for v in node.Inputs do
                        place graph.Producer[v]

                    if late.Contains n then
                        rebuild.Copy {
                            node with
                                Origin = {
                                    node.Origin with
                                        Pass = Pass.Backward
                                }
                        }
                    else
                        rebuild.Copy node

        for n in 0 .. graph.Nodes.Length - 1 do
            if not (late.Contains n) then
                place n

        for n in Seq.sort late do
            place n

        rebuild.Finish()

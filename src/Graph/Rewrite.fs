/// Rebuilding a graph node by node: the one traversal that every pass uses.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Rewrite

open System.Collections.Generic

/// State of a rebuild: the new graph under construction and where each old value went.
[<Sealed>]
type Rebuild(source: Graph) =
    let builder = Builder()
    let map = Array.create source.Types.Length -1

    member _.Source = source
    member _.Builder = builder

    member _.Item
        with get (old: int) = map[old]
        and set (old: int) (value: int) = map[old] <- value

    /// Adds `op` on new values and takes its results as those of old values.
    member _.Put(node: Node, op: Op, inputs: int list) =
        let outputs = builder.Add(op, inputs, node.Origin)

        for i in 0 .. node.Outputs.Length - 1 do
            map[node.Outputs[i]] <- outputs[i]

    /// The node as it is, on mapped inputs.
    member this.Copy(node: Node) = this.Put(node, node.Op, [ for v in node.Inputs -> map[v] ])

    /// Carries named outputs and cotangent records over.
    member _.Finish() =
        for name, v in source.Outputs do
            if map[v] >= 0 then
                builder.SetOutput(name, map[v])

        for v in 0 .. source.Types.Length - 1 do
            let primal = source.Primals[v]

            // a primal that is made later has no layout yet that its cotangent could take
            if primal >= 0 && map[v] >= 0 && map[primal] >= 0 && map[primal] < map[v] then
                builder.SetPrimal(map[v], map[primal])

        builder.ToGraph()

/// Rebuilds with `step` deciding for each node in order.
let fold (step: Rebuild -> Node -> unit) (graph: Graph) : Graph =
    let rebuild = Rebuild graph

    for node in graph.Nodes do
        step rebuild node

    rebuild.Finish()

/// Values that the outputs need, by node.
let live (graph: Graph) : bool[] =
    let needed = Array.create graph.Nodes.Length false
    let stack = Stack<int>()

    for _, v in graph.Outputs do
        stack.Push graph.Producer[v]

    while stack.Count > 0 do
        let n = stack.Pop()

        if not needed[n] then
            needed[n] <- true

            for v in graph.Nodes[n].Inputs do
                stack.Push graph.Producer[v]

    needed

/// Drops nodes that no output needs.
let prune (graph: Graph) : Graph =
    let needed = live graph
    let mutable n = -1

    graph
    |> fold (fun rebuild node ->
        n <- n + 1

        if needed[n] then
            rebuild.Copy node)

/// Nodes that read each value.
let consumers (graph: Graph) : int[][] =
    let lists = Array.init graph.Types.Length (fun _ -> List<int>())

    graph.Nodes
    |> Array.iteri (fun n node ->
        for v in Array.distinct node.Inputs do
            lists[v].Add n)

    lists |> Array.map _.ToArray()

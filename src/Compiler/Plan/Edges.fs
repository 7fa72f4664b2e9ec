/// Which stage computes what: nodes and transfers of each stage, demand-driven from outputs.
/// before: one rank's graph with units; after: per stage its nodes, what it receives and what it sends.
module DeepSeekGraph.Compiler.Lowering.Edges

open System.Collections.Generic
open DeepSeekGraph

/// One value that goes from the stage that makes it to a stage that reads it. Stages here are those of the model, not ranks.
[<Struct>]
type Transfer = { Value: int; From: int; Into: int }

/// Work of the stages.
type StageWork = {
    /// Node indices of each stage, ascending; sources included.
    Nodes: int[][]
    /// Ordered by value.
    Transfers: Transfer[]
}

/// The value whose memory `v` shares: renames, anchors and detached values are names, not computations.
let rec root (graph: Graph) (v: int) : int =
    let node = graph.NodeOf v

    match node.Op with
    | Op.Rename _
    | Op.Anchor _
    | Op.Detach -> root graph node.Inputs[0]
    | _other -> v

/// The stage of each node, or -1: computed wherever it is read. That holds for sources and for what they determine without any parameter,
/// such as constants that equal layers share: sending it would cost a message, and computing it costs nothing that counts.
let homes (graph: Graph) (stageOf: ModelUnit -> int) : int[] =
    let free = Array.zeroCreate<bool> graph.Nodes.Length
    // what leaves the graph stays with its unit, which knows what to do with it
    let outputs = HashSet [ for _, v in graph.Outputs -> graph.Producer[root graph v] ]

    graph.Nodes
    |> Array.mapi (fun n node ->
        free[n] <- not node.Op.IsParameter && node.Inputs |> Array.forall (fun v -> free[graph.Producer[v]])

        match node.Origin.Unit with
        | ModelUnit.Shared -> -1
        | _part when free[n] && not (outputs.Contains n) -> -1
        | part -> stageOf part)

/// Assigns nodes to stages by their homes. `outputStage`: where outputs made anywhere go.
let assign (graph: Graph) (stages: int) (homes: int[]) (outputStage: int) : StageWork =
    let members = Array.init stages (fun _ -> HashSet<int>())
    let transfers = HashSet<Transfer>()
    let work = Stack<struct (int * int)>()

    let demand stage value =
        let v = root graph value
        let n = graph.Producer[v]

        match homes[n] with
        | -1 -> work.Push(struct (stage, n))
        | maker ->
            if maker <> stage then
                transfers.Add {
                    Value = v
                    From = maker
                    Into = stage
                }
                |> ignore

            work.Push(struct (maker, n))

    // the loss has its metric: the value itself is read by nobody
    for _, v in graph.Outputs |> Array.filter (fun (name, _) -> name <> "loss") do
        let maker = homes[graph.Producer[root graph v]]
        demand (if maker < 0 then outputStage else maker) v

    while work.Count > 0 do
        let struct (stage, n) = work.Pop()

        if members[stage].Add n then
            for v in graph.Nodes[n].Inputs do
                demand stage v

    {
        Nodes = members |> Array.map (Seq.sort >> Array.ofSeq)
        Transfers = transfers |> Seq.sortBy (fun t -> t.Value, t.From, t.Into) |> Array.ofSeq
    }

/// The program of each node of a stage: forward work is F; backward work that a cotangent leaving the stage needs is I; the rest is W.
/// A cast of what I makes to a narrower type is I as well: the narrow value is what waits for W.
let phases (graph: Graph) (work: StageWork) (stage: int) : IReadOnlyDictionary<int, Phase> =
    let mine = HashSet work.Nodes[stage]
    let needed = HashSet<int>()
    let stack = Stack<int>()

    for t in work.Transfers do
        if t.From = stage && graph.NodeOf(t.Value).Origin.Pass.IsForward |> not then
            stack.Push graph.Producer[t.Value]

    while stack.Count > 0 do
        let n = stack.Pop()

        if mine.Contains n && not graph.Nodes[n].Origin.Pass.IsForward && needed.Add n then
            for v in graph.Nodes[n].Inputs do
                stack.Push graph.Producer[root graph v]

    let phases = Dictionary<int, Phase>()

    let narrows (node: Node) =
        match node.Op with
        | Op.Cast dtype -> dtype.Bytes < graph.Types[node.Inputs[0]].DType.Bytes
        | _other -> false

    for n in work.Nodes[stage] do
        let node = graph.Nodes[n]

        if
            narrows node
            && not node.Origin.Pass.IsForward
            && needed.Contains graph.Producer[root graph node.Inputs[0]]
        then
            needed.Add n |> ignore

    for n in work.Nodes[stage] do
        phases[n] <-
            if graph.Nodes[n].Origin.Pass.IsForward then Phase.F 0
            elif needed.Contains n then Phase.I 0
            else Phase.W 0

    phases :> IReadOnlyDictionary<int, Phase>

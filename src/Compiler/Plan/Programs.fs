/// Programs of a chunk for one microbatch: launches, collectives with Start and Wait, receives first, sends as soon as made.
/// before: the nodes of the model's stage that the chunk is; after: steps of F, I, W and S over slots, without Free.
module DeepSeekGraph.Compiler.Lowering.Programs

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Compiler.Lowering.Edges
open DeepSeekGraph.Compiler.Lowering.Slots

/// What the programs of one chunk are made from.
type StageContext = {
    /// The stage of the model: chunk `Stage / Pipeline` of rank `Stage % Pipeline`.
    Stage: int
    /// Pipeline ranks.
    Pipeline: int
    /// The stage of the model that computes a value, or -1: every one that reads it.
    Home: int -> int
    /// Which code a GPU runs for attention.
    Attention: AttentionBackend
    /// Numbers of collectives, unique over the chunks of a rank.
    NextToken: unit -> int
    Partitioned: Partitioned
    Work: StageWork
    Phases: IReadOnlyDictionary<int, Phase>
    Slots: SlotTable
    Groups: GroupTable
    /// Accumulators that an output value is added to: value -> slot.
    Accumulators: (int * int) list
    /// What steps take, once slots are known; nothing: steps stay in the order of the graph.
    Clock: (IReadOnlyList<SlotInfo> -> Overlap.Clock) voption
}

let rec private slotOf (c: StageContext) (value: int) : int =
    let graph = c.Partitioned.Graph
    let v = root graph value
    let t, layout = graph.Types[v], c.Partitioned.Layouts[v]

    match (graph.NodeOf v).Op with
    | Op.Parameter(spec, _) -> c.Slots.Get(spec.Name, SlotKind.Parameter, t, layout)
    | Op.Cache(name, _) -> c.Slots.Get(name, SlotKind.Cache, t, layout)
    // in place
    | Op.CacheWrite -> slotOf c (graph.NodeOf v).Inputs[0]
    | Op.Input(name, _) -> c.Slots.Get(name, (if t.Rank = 0 then SlotKind.Scalar else SlotKind.Input), t, layout)
    | _other ->
        // what another chunk of this rank makes is read where it lies
        let maker = c.Home v
        let here = maker >= 0 && maker % c.Pipeline = c.Stage % c.Pipeline
        let chunk = (if here then maker else c.Stage) / c.Pipeline
        let name = if chunk = 0 then $"%%%i{v}" else $"%%%i{v}@%i{chunk}"
        c.Slots.Get(name, SlotKind.Temporary, t, layout)

/// Is this op a name, or fed from outside: nothing to run?
let private silent (op: Op) =
    match op with
    | Op.Parameter _
    | Op.Input _
    | Op.Cache _
    | Op.Rename _
    | Op.Anchor _
    | Op.Detach -> true
    | _other -> false

/// When a value arrives: what the forward pass made in F, in the order in which it was sent, even where only the backward pass reads
/// it; a cotangent in the first of I and W that reads it.
let private arrival (c: StageContext) (value: int) =
    let graph = c.Partitioned.Graph

    let reads n =
        not (silent graph.Nodes[n].Op)
        && graph.Nodes[n].Inputs |> Array.exists (fun v -> root graph v = value)

    if (graph.NodeOf value).Origin.Pass.IsForward then
        Phase.F 0
    else
        let phases = c.Work.Nodes[c.Stage] |> Array.filter reads |> Array.map (fun n -> c.Phases[n])
        [ Phase.I 0; Phase.W 0 ] |> List.find (fun p -> Array.contains p phases)

/// Steps of one program under construction: starts remember which slots they fill, so that the first reader waits.
[<Sealed>]
type private Writer(nextToken: unit -> int) =
    let steps = List<Step>()
    let pending = Dictionary<int, int>()

    member _.Steps = List.ofSeq steps

    member _.Start(collective, group, inputs: int list, outputs: int list, path) : int =
        let token = nextToken ()
        steps.Add(Step.Start(token, collective, group, Array.ofList inputs, Array.ofList outputs, path))

        for slot in outputs do
            pending[slot] <- token

        token

    member _.Wait(token: int) = steps.Add(Step.Wait token)

    /// Waits for whatever fills these slots.
    member this.Need(slots: int seq) =
        for slot in slots do
            match pending.TryGetValue slot with
            | true, token ->
                // a collective may fill several slots; it is waited for once
                for filled in
                    [
                        for KeyValue(s, t) in pending do
                            if t = token then
                                s
                    ] do
                    pending.Remove filled |> ignore

                this.Wait token
            | false, _ -> ()

    member _.Launch(kernel, attributes: Attribute list, inputs: int list, outputs: int list, path) =
        steps.Add(Step.Launch(kernel, Array.ofList attributes, Array.ofList inputs, Array.ofList outputs, path))

    /// Nothing that fills a slot stays open behind the program's end.
    member this.Close() = this.Need(pending.Keys |> Seq.sort |> Array.ofSeq)

let private compute (c: StageContext) (writer: Writer) (node: Node) =
    let graph = c.Partitioned.Graph
    let inputs = [ for v in node.Inputs -> slotOf c v ]
    let outputs = [ for v in node.Outputs -> slotOf c v ]
    writer.Need inputs

    match node.Op with
    | Op.Collective(kind, axes, _) ->
        writer.Start(kind, c.Groups.Along axes, inputs, outputs, node.Origin.Path) |> ignore
    | op ->
        let types = node.Inputs |> Array.map (fun v -> graph.Types[v])

        match KernelOps.ofOp c.Attention op types (node.Outputs |> Array.map (fun v -> graph.Types[v])) with
        | Some(kernel, attributes) -> writer.Launch(kernel, attributes, inputs, outputs, node.Origin.Path)
        | None -> invalidOp $"%s{node.Origin.Path}: no kernel for %s{(Catalog.define op).Name} (a bug in dsg)"

/// Accumulators that take this node's results.
let private accumulate (c: StageContext) (writer: Writer) (value: int) path =
    for v, slot in c.Accumulators do
        if v = value then
            let source = slotOf c v
            writer.Need [ source ]
            writer.Launch(KernelId.Accumulate, [], [ source ], [ slot ], path)

/// F, I, W and S of the chunk.
let build (c: StageContext) : (Phase * Step list) list =
    let graph = c.Partitioned.Graph
    let crosses (t: Transfer) = t.From % c.Pipeline <> t.Into % c.Pipeline
    let received = c.Work.Transfers |> Array.filter (fun t -> t.Into = c.Stage && crosses t)
    let sent = c.Work.Transfers |> Array.filter (fun t -> t.From = c.Stage && crosses t)
    // forward sends have arrived when the gradient comes back; cotangents may take until S
    let forward, back = List<int>(), List<int>()

    [ Phase.F 0; Phase.I 0; Phase.W 0; Phase.S ]
    |> List.map (fun phase ->
        let writer = Writer c.NextToken
        let open' = if phase.IsF then forward else back

        if phase.IsW then
            for t in forward do
                writer.Wait t

        for t in received do
            if arrival c t.Value = phase then
                let path = graph.NodeOf(t.Value).Origin.Path

                writer.Start(
                    Collective.Recv(t.From % c.Pipeline),
                    c.Groups.Between(t.From, t.Into),
                    [],
                    [ slotOf c t.Value ],
                    path
                )
                |> ignore

        for n in c.Work.Nodes[c.Stage] do
            let node = graph.Nodes[n]

            if c.Phases[n] = phase && not (silent node.Op) then
                compute c writer node

                for v in node.Outputs do
                    for t in sent do
                        if t.Value = v then
                            let slot = slotOf c v
                            writer.Need [ slot ]

                            open'.Add(
                                writer.Start(
                                    Collective.Send(t.Into % c.Pipeline),
                                    c.Groups.Between(t.From, t.Into),
                                    [ slot ],
                                    [],
                                    node.Origin.Path
                                )
                            )

            if c.Phases[n] = phase then
                for v in node.Outputs do
                    accumulate c writer v node.Origin.Path

        if phase.IsS then
            for t in back do
                writer.Wait t

        writer.Close()
        let steps = Bundle.run writer.Steps

        phase,
        match c.Clock with
        | ValueSome clock -> Overlap.run (clock (c.Slots.ToArray())) steps
        | ValueNone -> steps)

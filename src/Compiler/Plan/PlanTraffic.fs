/// What the ranks of a plan say to each other: every collective with the rule that caused it, its bytes and its links.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open DeepSeekGraph

/// One collective of a stage's program.
type CollectiveLine = {
    Stage: int
    /// As plans print it: F, W@1, epilogue.
    Program: string
    /// all_gather, reduce_scatter, ..., send, recv.
    Kind: string
    /// Why it is there, in words: "gather seq for q_b_proj: split over tp".
    Rule: string
    /// Module path of the graph node that it serves.
    Path: string
    /// Name of its group, and how many ranks a group has.
    Group: string
    Members: int
    /// Times it runs in a step.
    Runs: int
    /// Bytes of the operands on one rank, routed rows at their balanced number.
    Bytes: int64
    /// Bytes one rank sends to others in one run, each block straight to whoever needs it.
    Sent: int64
    /// Of these, the bytes that leave the rank's node; the most that any rank of the stage sends.
    InterNode: int64
} with

    /// intra-node, inter-node, or both.
    member this.Link =
        if this.InterNode = 0L then "intra-node"
        elif this.InterNode = this.Sent then "inter-node"
        else "intra- and inter-node"

[<RequireQualifiedAccess>]
module PlanTraffic =
    let private kindName (kind: Collective) =
        match kind with
        | Collective.AllReduceSum -> "all_reduce"
        | Collective.AllReduceMax -> "all_reduce_max"
        | Collective.AllGather _ -> "all_gather"
        | Collective.ReduceScatter _ -> "reduce_scatter"
        | Collective.AllToAll _ -> "all_to_all"
        | Collective.RouteToExperts -> "route_to_experts"
        | Collective.RowsToExperts -> "rows_to_experts"
        | Collective.RowsToTokens -> "rows_to_tokens"
        | Collective.Dispatch _ -> "dispatch"
        | Collective.Combine _ -> "combine"
        | Collective.Send _ -> "send"
        | Collective.Recv _ -> "recv"

    /// Ranks of each group of a stage, by coordinates along the group's axes; the stage's first rank is `first`.
    let private instances (mesh: MeshInfo) (first: int) (axes: int list) : int list list =
        let strides = mesh.Axes |> Seq.scan (fun n a -> n * a.Size) 1 |> Array.ofSeq

        let along (chosen: int list) =
            chosen
            |> List.fold
                (fun ranks m -> [
                    for rank in ranks do
                        for c in 0 .. mesh.Axes[m].Size - 1 -> rank + c * strides[m]
                ])
                [ 0 ]

        let others = [ 0 .. mesh.Axes.Count - 1 ] |> List.except axes
        let members = along axes
        [ for origin in along others -> [ for m in members -> first + origin + m ] ]

    /// Most peers on other nodes that any member has.
    let private peersAway (perNode: int) (groups: int list list) =
        groups
        |> List.collect (fun ranks ->
            let onNode = ranks |> List.countBy (fun r -> r / perNode) |> dict
            [ for r in ranks -> ranks.Length - onNode[r / perNode] ])
        |> List.fold max 0

    /// Bytes that one rank sends, and of these to other nodes, of `bytes` operand bytes in groups of `n` with `away` peers elsewhere.
    let private sent (kind: Collective) (bytes: int64) (n: int) (away: int) : struct (int64 * int64) =
        let peers = int64 (n - 1)

        match kind with
        // every peer gets the whole block
        | Collective.AllGather _ -> bytes * peers, bytes * int64 away
        // every peer gets its share
        | Collective.ReduceScatter _
        | Collective.AllToAll _
        | Collective.RouteToExperts
        | Collective.RowsToExperts
        | Collective.RowsToTokens -> bytes * peers / int64 n, bytes * int64 away / int64 n
        // shares are reduced, then given to all
        | Collective.AllReduceSum
        | Collective.AllReduceMax -> 2L * bytes * peers / int64 n, 2L * bytes * int64 away / int64 n
        | Collective.Send _ -> bytes, (if away > 0 then bytes else 0L)
        // counted by `fused`
        | Collective.Dispatch _
        | Collective.Combine _
        | Collective.Recv _ -> 0L, 0L

    /// The share of nodes that have an expert of a token, if its `chosen` of `experts` are any: 1 - C(e - e/n, k) / C(e, k).
    let private nodesReached (experts: float) (chosen: float) (nodes: float) =
        let mutable missed = 1.0

        for i in 0 .. int (round chosen) - 1 do
            missed <- missed * max 0.0 (experts - experts / nodes - float i) / (experts - float i)

        1.0 - missed

    /// A fused dispatch or combine: a token crosses once to each node that has experts for it, and fans out inside.
    /// `dense` holds the tokens, `route` which experts they chose, `probability` bytes go with each row.
    let private fused (dense: SlotInfo) (route: SlotInfo) (probability: int) (perNode: int) (n: int) (away: int) =
        let perNode = max 1 (min n perNode)
        let experts = float route.Extents[2]
        let chosen = route.Density * experts
        let tokens = float route.Extents[0] * float route.Extents[1]
        let width = float (Lowering.Memory.bytes dense) / tokens
        let nodes = float n / float perNode
        let rows = tokens * chosen

        let crossing =
            if away = 0 then
                0.0
            else
                tokens * (nodes - 1.0) * nodesReached experts chosen nodes * width
                + rows * (nodes - 1.0) / nodes * float probability

        let inside = rows * float (perNode - 1) / float perNode * (width + float probability)
        struct (int64 (round (crossing + inside)), int64 (round crossing))

    let private tail (path: string) = path.Substring(path.LastIndexOf '.' + 1)

    /// What a stage's steps make and read, to name neighbours of a collective.
    type private Neighbours(stage: StagePlan) =
        let made, read = Dictionary<int, Step>(), Dictionary<struct (string * int), Step>()

        let note (program: string) (step: Step) (inputs: int seq) (outputs: int seq) =
            for slot in outputs do
                made.TryAdd(slot, step) |> ignore

            for slot in inputs do
                read.TryAdd(struct (program, slot), step) |> ignore
                read.TryAdd(struct ("", slot), step) |> ignore

        do
            for program in stage.Programs do
                for step in program.Steps do
                    match step with
                    | Step.Launch(_, _, inputs, outputs, _) -> note program.Name step inputs outputs
                    | Step.Start(_, _, _, inputs, outputs, _) -> note program.Name step inputs outputs
                    | Step.Wait _
                    | Step.Free _ -> ()

        /// The parameter that a step reads gives it its name: "q_b_proj"; else its kernel.
        let nameOf (step: Step) =
            match step with
            | Step.Launch(kernel, _, inputs, _, _) ->
                inputs
                |> Seq.tryPick (fun slot ->
                    if slot < stage.Slots.Count && stage.Slots[slot].Kind.IsParameter then
                        let name = stage.Slots[slot].Name

                        Some(
                            tail (
                                if name.EndsWith(".weight", System.StringComparison.Ordinal) then
                                    name.Substring(0, name.Length - 7)
                                else
                                    name
                            )
                        )
                    else
                        None)
                |> Option.defaultValue (PlanNames.kernel kernel)
            | Step.Start(_, kind, _, _, _, _) -> kindName kind
            | Step.Wait _
            | Step.Free _ -> ""

        let find (steps: Dictionary<'k, Step>) (key: 'k) =
            match steps.TryGetValue key with
            | true, step -> Some(nameOf step)
            | false, _ -> None

        member _.Maker(slot: int) = find made slot |> Option.defaultValue "what came before"

        member _.Reader(program: string, slot: int) =
            find read (struct (program, slot))
            |> Option.orElse (find read (struct ("", slot)))
            |> Option.defaultValue "what follows"

    /// The rule that put a collective there, from its kind, where its operand lies and its neighbours.
    let private rule
        (stage: StagePlan)
        (near: Neighbours)
        (program: Program)
        (kind: Collective)
        (group: Group)
        (inputs: IReadOnlyList<int>)
        (outputs: IReadOnlyList<int>)
        (path: string)
        =
        let over =
            if group.Stages.Count > 0 then
                "stages " + String.concat ", " (Seq.map string group.Stages)
            else
                group.Name

        let slot (ids: IReadOnlyList<int>) = stage.Slots[ids[0]]

        let axis (ids: IReadOnlyList<int>) dim =
            let axes = (slot ids).Axes
            if dim >= 0 && dim < axes.Count then axes[dim] else $"dim %i{dim}"

        let backward = not program.Phase.IsF
        let maker () = near.Maker inputs[0]
        let reader () = near.Reader(program.Name, outputs[0])
        let optimizer = program.Phase.IsEpilogue && path.StartsWith("optimizer.", System.StringComparison.Ordinal)
        let parameter = if optimizer then path.Substring 10 else path

        match kind with
        | Collective.Send s when backward -> $"pipeline: gradient of what stage %i{s} sent"
        | Collective.Send s -> $"pipeline: a value that stage %i{s} reads"
        | Collective.Recv s when backward -> $"pipeline: gradient from stage %i{s}"
        | Collective.Recv s -> $"pipeline: a value of stage %i{s}"
        | Collective.AllReduceSum when optimizer && parameter = "clip" -> $"gradient norm: sum of squares over %s{over}"
        | Collective.AllReduceSum when optimizer && group.Stages.Count > 0 ->
            $"gradient sync of %s{parameter}: %s{over} share it"
        | Collective.AllReduceSum
        | Collective.ReduceScatter _ when optimizer -> $"gradient sync of %s{parameter}: partial sum over %s{over}"
        | Collective.AllGather _ when optimizer -> $"parameter gather of %s{parameter}: updated in parts over %s{over}"
        | Collective.AllReduceSum when program.Phase.IsEpilogue -> $"sum of %s{path} over %s{over}"
        | Collective.AllGather d -> $"gather %s{axis inputs d} for %s{reader ()}: split over %s{over}"
        | Collective.ReduceScatter d -> $"reduce partial sum of %s{maker ()} over %s{over}, split on %s{axis outputs d}"
        | Collective.AllReduceSum -> $"reduce partial sum of %s{maker ()} over %s{over}"
        | Collective.AllReduceMax -> $"maximum of %s{maker ()} over %s{over}"
        | Collective.AllToAll(split, join) ->
            $"exchange for %s{reader ()}: split on %s{axis inputs join} becomes split on %s{axis outputs split} over %s{over}"
        | Collective.RouteToExperts -> $"dispatch: row set by expert over %s{over}"
        | Collective.RowsToExperts when backward -> $"gradient of combine: rows to experts over %s{over}"
        | Collective.RowsToExperts -> $"dispatch: rows to experts over %s{over}"
        | Collective.RowsToTokens when backward -> $"gradient of dispatch: rows to tokens over %s{over}"
        | Collective.RowsToTokens -> $"combine: rows to tokens over %s{over}"
        | Collective.Dispatch _ when backward -> $"gradient of combine: tokens to experts, once a node, over %s{over}"
        | Collective.Dispatch _ -> $"dispatch: tokens to experts, once a node, over %s{over}"
        | Collective.Combine _ when backward -> $"gradient of dispatch: rows summed in each node, over %s{over}"
        | Collective.Combine _ -> $"combine: rows summed in each node, over %s{over}"

    /// Every collective, stage by stage in program order; ranks are numbered from 0 and fill nodes of `gpusPerNode` in order.
    let lines (gpusPerNode: int) (plan: PlanSet) : IReadOnlyList<CollectiveLine> =
        if gpusPerNode < 1 then
            invalidArg (nameof gpusPerNode) "a node has at least one accelerator"

        let perStage = plan.Mesh.Axes |> Seq.fold (fun n a -> n * a.Size) 1
        let away = Dictionary<struct (int * int), struct (int * int)>()

        /// Members of a group on a stage, and the most peers that one has on other nodes.
        let reach (stage: int) (group: Group) =
            match away.TryGetValue(struct (stage, group.Id)) with
            | true, known -> known
            | false, _ ->
                let groups =
                    if group.Stages.Count > 0 then
                        [ for c in 0 .. perStage - 1 -> [ for s in group.Stages -> s * perStage + c ] ]
                    else
                        instances plan.Mesh (stage * perStage) (List.ofSeq group.MeshAxes)

                let found = struct (groups.Head.Length, peersAway gpusPerNode groups)
                away[struct (stage, group.Id)] <- found
                found

        [|
            for stage in plan.Stages do
                let near = Neighbours stage

                let runs = stage.Timetable |> Seq.countBy (fun a -> struct (a.Phase, a.Chunk)) |> Map.ofSeq

                for program in stage.Programs do
                    for step in program.Steps do
                        match step with
                        | Step.Start(_, kind, id, inputs, outputs, path) ->
                            let group = plan.Groups[id]
                            let struct (members, elsewhere) = reach stage.Stage group

                            // the first operand of each tuple travels; the others are row sets that say where
                            let each = if outputs.Count = 0 then inputs.Count else inputs.Count / outputs.Count

                            let bytes =
                                match kind with
                                | Collective.Recv _ -> Lowering.Memory.bytes stage.Slots[outputs[0]]
                                | _other when kind.TakesTuples ->
                                    seq { 0..each .. inputs.Count - 1 }
                                    |> Seq.sumBy (fun i -> Lowering.Memory.bytes stage.Slots[inputs[i]])
                                | _other -> Lowering.Memory.bytes stage.Slots[inputs[0]]

                            let slot (ids: IReadOnlyList<int>) i = stage.Slots[ids[i]]
                            let probability = if inputs.Count > 3 then (slot inputs 1).DType.Bytes else 0

                            let struct (toPeers, toOthers) =
                                match kind with
                                | Collective.Dispatch ranks ->
                                    let route = slot inputs (inputs.Count - 2)
                                    fused (slot inputs 0) route probability ranks members elsewhere
                                | Collective.Combine ranks ->
                                    let route = slot inputs (inputs.Count - 1)
                                    fused (slot outputs 0) route probability ranks members elsewhere
                                | _other -> sent kind bytes members elsewhere

                            {
                                Stage = stage.Stage
                                Program = program.Name
                                Kind = kindName kind
                                Rule =
                                    rule stage near program kind group inputs outputs path
                                    + (if kind.TakesTuples && outputs.Count > 1 then
                                           $", and %i{outputs.Count - 1} more in one bundle"
                                       else
                                           "")
                                Path = path
                                Group = group.Name
                                Members = members
                                Runs =
                                    runs |> Map.tryFind (struct (program.Phase, program.Chunk)) |> Option.defaultValue 0
                                Bytes = bytes
                                Sent = toPeers
                                InterNode = toOthers
                            }
                        | Step.Launch _
                        | Step.Wait _
                        | Step.Free _ -> ()
        |]
        :> IReadOnlyList<CollectiveLine>

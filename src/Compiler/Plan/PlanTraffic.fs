/// What the ranks of a plan say to each other: every collective with the rule that caused it, its bytes and its links.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Partition

/// One collective of a stage's program.
type CollectiveLine = {
    Stage: int
    /// As plans print it, all parts as one: F, W@1, epilogue.
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
    /// Bytes of the operands on one rank, routed rows at their balanced number; of the exchange of row sets, its counts.
    Bytes: int64
    /// Bytes one rank sends to others in one run, each block straight to whoever needs it: the most that any rank of the stage sends.
    Sent: int64
    /// Of these, the bytes that leave the rank's node; the most that any rank of the stage sends.
    InterNode: int64
    /// Bytes that all ranks of the stage send in a step, and of these to other nodes.
    StepSent: int64
    StepInterNode: int64
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

        let chains = Chains stage

        /// The parameter that a step reads, or whose gradient it makes, gives it its name: "q_b_proj"; else its kernel.
        let nameOf (step: Step) =
            match step with
            | Step.Launch(kernel, _, inputs, outputs, _) ->
                let known = Seq.filter (fun slot -> slot < stage.Slots.Count)

                known inputs
                |> Seq.tryPick chains.Parameter
                |> Option.orElse (known outputs |> Seq.tryPick chains.Gradient)
                |> Option.map (PlanNames.ofWeight >> tail)
                |> Option.defaultValue (PlanNames.kernel kernel)
            | Step.Start(_, kind, _, _, _, _) -> kindName kind
            | Step.Wait _
            | Step.Free _ -> ""

        let find (steps: Dictionary<'k, Step>) (key: 'k) =
            match steps.TryGetValue key with
            | true, step -> Some(nameOf step)
            | false, _ -> None

        /// The first step that writes a slot.
        member _.Writers: IReadOnlyDictionary<int, Step> = made :> IReadOnlyDictionary<int, Step>

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
                group.Over

        let slot (ids: IReadOnlyList<int>) = stage.Slots[ids[0]]

        let axis (ids: IReadOnlyList<int>) dim =
            let axes = (slot ids).Axes
            if dim >= 0 && dim < axes.Count then axes[dim] else $"dim %i{dim}"

        let backward = not program.Phase.IsF
        let maker () = near.Maker inputs[0]
        let reader () = near.Reader(program.Name, outputs[0])
        let optimizer = program.Phase.IsOnce && path.StartsWith("optimizer.", System.StringComparison.Ordinal)

        /// What is summed or gathered at the end of a step: reduced:grad:model.norm.weight#7 is of model.norm.weight.
        let parameter () =
            let name = (slot inputs).Name
            let name = name.Substring(name.LastIndexOf ':' + 1)
            let mark = name.IndexOf '#'
            if mark < 0 then name else name.Substring(0, mark)

        match kind with
        | Collective.Send s when backward -> $"pipeline: gradient of what stage %i{s} sent"
        | Collective.Send s -> $"pipeline: a value that stage %i{s} reads"
        | Collective.Recv s when backward -> $"pipeline: gradient from stage %i{s}"
        | Collective.Recv s -> $"pipeline: a value of stage %i{s}"
        | Collective.AllReduceSum when optimizer && path = "optimizer.clip" ->
            $"gradient norm: sum of squares over %s{over}"
        | Collective.AllReduceSum when optimizer && group.Stages.Count > 0 ->
            $"gradient sync of %s{parameter ()}: %s{over} share it"
        | Collective.AllReduceSum
        | Collective.ReduceScatter _ when optimizer -> $"gradient sync of %s{parameter ()}: partial sum over %s{over}"
        | Collective.AllGather _ when optimizer ->
            $"parameter gather of %s{parameter ()}: updated in parts over %s{over}"
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
        | Collective.Dispatch _ when backward ->
            $"gradient of combine: tokens to experts, once a node and once a rank there, over %s{over}"
        | Collective.Dispatch _ -> $"dispatch: tokens to experts, once a node and once a rank there, over %s{over}"
        | Collective.Combine _ when backward ->
            $"gradient of dispatch: rows summed on each rank, then in each node, over %s{over}"
        | Collective.Combine _ -> $"combine: rows summed on each rank, then in each node, over %s{over}"

    /// What an exchange sends in a step: at most from a rank in a run, at most from it to other nodes, all of both.
    let private routed gpusPerNode (plan: PlanSet) (routing: IRouting | null) groups exchange runs =
        let run routing = RoutedTraffic.run gpusPerNode plan.Mesh plan.SeqLength routing groups exchange

        let each =
            match routing with
            | null -> [ run None, runs ]
            | known -> [ for i in 0 .. runs - 1 -> run (Some(known, i)), 1 ]

        let whole (x: float) = int64 (round x)

        let most (part: RoutedTraffic.Sent -> Dictionary<int, float>) =
            each |> Seq.collect (fun (sent, _) -> (part sent).Values) |> Seq.fold max 0.0 |> whole

        let sum (part: RoutedTraffic.Sent -> Dictionary<int, float>) =
            each |> Seq.sumBy (fun (sent, times) -> Seq.sum (part sent).Values * float times) |> whole

        struct (most _.All, most _.Away, sum _.All, sum _.Away)

    /// What the figures of routed rows rest on; empty for a plan that routes nothing.
    let assumption (routing: IRouting | null) (plan: PlanSet) : string =
        let choices =
            plan.Stages
            |> Seq.collect (fun stage ->
                let near = Neighbours stage

                stage.Programs
                |> Seq.collect _.Steps
                |> Seq.choose (fun step ->
                    match step with
                    | Step.Launch(KernelId.Route, _, _, outputs, _) -> Routing.choiceOf near.Writers outputs[0]
                    | Step.Launch _
                    | Step.Start _
                    | Step.Wait _
                    | Step.Free _ -> None))
            |> Seq.map (fun c -> struct (c.Experts, c.TopK, c.Groups, c.KeepGroups))
            |> Seq.distinct
            |> List.ofSeq

        match choices, routing with
        | [], _ -> ""
        | _, null ->
            choices
            |> List.map (fun struct (experts, topK, groups, keep) ->
                let where = if keep < groups then $" in %i{keep} of %i{groups} groups" else ""
                $"%i{topK} of %i{experts} experts%s{where}")
            |> String.concat "; "
            |> sprintf "any choice is as likely: %s"
        | _, _ -> "counted from the routing given"

    /// Every collective, stage by stage in program order; ranks are numbered from 0 and fill nodes of `gpusPerNode` in order.
    /// `routing`: which experts tokens choose, every microbatch of a step; null: what `assumption` says.
    let lines (gpusPerNode: int) (routing: IRouting | null) (plan: PlanSet) : IReadOnlyList<CollectiveLine> =
        if gpusPerNode < 1 then
            invalidArg (nameof gpusPerNode) "a node has at least one accelerator"

        let perStage = Mesh.size plan.Mesh

        [|
            for stage in plan.Stages do
                let near = Neighbours stage
                let placed = HashSet<int>()
                let known = Dictionary<int, struct (int[][] * (int * int) list)>()

                /// A group's instances with ranks of this stage, and peers on other nodes: how many ranks of the stage have so many.
                let reach (group: Group) =
                    match known.TryGetValue group.Id with
                    | true, found -> found
                    | false, _ ->
                        let instances =
                            if group.Stages.Count > 0 then
                                [|
                                    for c in 0 .. perStage - 1 -> [| for s in group.Stages -> s * perStage + c |]
                                |]
                            else
                                Mesh.groups plan.Mesh stage.Stage (List.ofSeq group.MeshAxes)

                        let peers = [
                            for ranks in instances do
                                let onNode = ranks |> Array.countBy (fun r -> r / gpusPerNode) |> dict

                                for r in ranks do
                                    if r / perStage = stage.Stage then
                                        ranks.Length - onNode[r / gpusPerNode]
                        ]

                        let found = struct (instances, List.countBy id peers)
                        known[group.Id] <- found
                        found

                let runs = stage.Timetable |> Seq.countBy (fun a -> struct (a.Phase, a.Chunk)) |> Map.ofSeq

                for program in stage.Programs do
                    let runs = runs |> Map.tryFind (struct (program.Phase, program.Chunk)) |> Option.defaultValue 0

                    for step in program.Steps do
                        match step with
                        | Step.Start(_, kind, id, inputs, outputs, path) ->
                            let group = plan.Groups[id]
                            let struct (instances, peers) = reach group
                            let members = instances[0].Length

                            // the first operand of each tuple travels; the others are row sets that say where
                            let each = if outputs.Count = 0 then inputs.Count else inputs.Count / outputs.Count

                            let bytes =
                                match kind with
                                | Collective.Recv _ -> Lowering.Memory.bytes stage.Slots[outputs[0]]
                                // a count of 4 bytes for each expert
                                | Collective.RouteToExperts ->
                                    inputs |> Seq.sumBy (fun i -> 4L * int64 stage.Slots[i].Extents[2])
                                | _other when kind.TakesTuples ->
                                    seq { 0..each .. inputs.Count - 1 }
                                    |> Seq.sumBy (fun i -> Lowering.Memory.bytes stage.Slots[inputs[i]])
                                | _other -> Lowering.Memory.bytes stage.Slots[inputs[0]]

                            let struct (toPeers, toOthers, allToPeers, allToOthers) =
                                let brings = RoutedTraffic.brings placed kind inputs

                                match
                                    RoutedTraffic.ofCollective
                                        (fun i -> stage.Slots[i])
                                        (Routing.choiceOf near.Writers)
                                        brings
                                        kind
                                        inputs
                                        outputs
                                with
                                | Some exchange -> routed gpusPerNode plan routing instances exchange runs
                                | None ->
                                    let each = [
                                        for away, ranks in peers ->
                                            Links.sent kind bytes members away, int64 (ranks * runs)
                                    ]

                                    let most part = each |> Seq.map (fst >> part) |> Seq.fold max 0L
                                    let sum part = each |> Seq.sumBy (fun (one, times) -> part one * times)
                                    let all (struct (x: int64, _: int64)) = x
                                    let away (struct (_: int64, x: int64)) = x
                                    struct (most all, most away, sum all, sum away)

                            {
                                Stage = stage.Stage
                                Program = program.Phase.WholeOfChunk program.Chunk
                                Kind = kindName kind
                                Rule =
                                    rule stage near program kind group inputs outputs path
                                    + (if kind.TakesTuples && outputs.Count > 1 then
                                           $", and %i{outputs.Count - 1} more in one bundle"
                                       else
                                           "")
                                Path = path
                                Group = group.Over
                                Members = members
                                Runs = runs
                                Bytes = bytes
                                Sent = toPeers
                                InterNode = toOthers
                                StepSent = allToPeers
                                StepInterNode = allToOthers
                            }
                        | Step.Launch _
                        | Step.Wait _
                        | Step.Free _ -> ()
        |]
        :> IReadOnlyList<CollectiveLine>

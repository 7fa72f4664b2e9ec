/// Slots in time: written before read, written once, untouched in flight, freed once; tokens started and awaited once.
/// Instances of different microbatches never meet: one walk covers all that run their programs in the same order.
module DeepSeekGraph.Compiler.Checking.Lifetimes

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking.Shapes

/// What one slot's memory holds.
[<RequireQualifiedAccess; Struct>]
type private State =
    | Empty
    | Full
    | Freed

let private isPersistent (kind: SlotKind) =
    match kind with
    | SlotKind.Parameter
    | SlotKind.Optimizer
    | SlotKind.Gradient
    | SlotKind.Counter
    | SlotKind.Scalar
    | SlotKind.Cache -> true
    | SlotKind.Input
    | SlotKind.Saved
    | SlotKind.Temporary -> false

let private isAccumulator (kind: SlotKind) =
    match kind with
    | SlotKind.Gradient
    | SlotKind.Counter -> true
    | SlotKind.Parameter
    | SlotKind.Optimizer
    | SlotKind.Scalar
    | SlotKind.Cache
    | SlotKind.Input
    | SlotKind.Saved
    | SlotKind.Temporary -> false

/// One stage in program order.
type private Walk(f: Findings, stage: StagePlan) =
    let slots = stage.Slots
    let count = slots.Count

    let state =
        Array.init count (fun i ->
            match slots[i].Kind with
            | SlotKind.Parameter
            | SlotKind.Optimizer
            | SlotKind.Scalar
            | SlotKind.Input -> State.Full
            // what a cache was before its write nobody may see
            | SlotKind.Cache
            | SlotKind.Gradient
            | SlotKind.Counter
            | SlotKind.Saved
            | SlotKind.Temporary -> State.Empty)

    // collectives in flight: token -> inputs, outputs
    let flying = Dictionary<int, struct (IReadOnlyList<int> * IReadOnlyList<int>)>()
    let readers, writers = Array.zeroCreate<int> count, Array.create count -1
    let reads, touchedIn = Array.zeroCreate<int> count, Array.create<Program voption> count ValueNone
    // what was made where, to find results that nobody reads
    let made = List<struct (string * IReadOnlyList<int>)>()
    let zeroed, written = HashSet<int>(), HashSet<int>()
    let accumulated = HashSet<struct (int * int)>()
    // which tokens were ever used, by the programs of one kind
    let used = HashSet<int>()
    let mutable at = ""
    let wrong message = f.Add(Codes.PlanLifetime, at, message)
    let name id = named slots id

    let mutable running: Program voption = ValueNone

    let touch (phase: Phase) id =
        match touchedIn[id], running with
        | ValueSome first, ValueSome now when slots[id].Kind.IsTemporary && first.Name <> now.Name ->
            wrong $"%s{name id} is a temporary but is used in %s{first.Name} and in %s{now.Name}"
        | _, _ -> ()

        touchedIn[id] <- running

        if phase.IsOnce then
            if slots[id].Kind.IsInput then
                wrong $"%s{name id} is fed with each microbatch and cannot be used here"

    let read phase id =
        touch phase id
        reads[id] <- reads[id] + 1

        if writers[id] >= 0 then
            wrong $"%s{name id} is read before the wait for collective t%i{writers[id]} that fills it"
        else
            match state[id] with
            | State.Full -> ()
            | State.Empty -> wrong $"%s{name id} is read before it is written"
            | State.Freed -> wrong $"%s{name id} is read after it was freed"

        if isAccumulator slots[id].Kind && not (phase.IsEpilogue || phase.IsR && slots[id].Kind.IsGradient) then
            wrong $"%s{name id} is complete only after the last microbatch, but is read before"

    /// Anything but a kernel that updates in place.
    let write (phase: Phase) id =
        touch phase id

        if writers[id] >= 0 then
            wrong $"%s{name id} is written while collective t%i{writers[id]} fills it"
        elif readers[id] > 0 then
            wrong $"%s{name id} is written while a collective reads it"

        match slots[id].Kind with
        | SlotKind.Parameter
        | SlotKind.Optimizer -> wrong $"%s{name id} is written by something else than its update"
        | SlotKind.Scalar
        | SlotKind.Input -> wrong $"%s{name id} is given from outside and is never written"
        | SlotKind.Cache -> wrong $"%s{name id} is written by something else than cache_write"
        | SlotKind.Gradient -> wrong $"%s{name id} is written by something else than zero and accumulate"
        | SlotKind.Counter ->
            if not phase.IsEpilogue || zeroed.Contains id || not (written.Add id) then
                wrong $"%s{name id} is written twice, or otherwise than by zero and accumulate"
        | SlotKind.Saved
        | SlotKind.Temporary ->
            match state[id] with
            | State.Empty -> ()
            | State.Full -> wrong $"%s{name id} is written twice"
            | State.Freed -> wrong $"%s{name id} is written after it was freed"

        state[id] <- State.Full

    let launch (phase: Phase) kernel (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        // the write of a cache takes the cache itself first
        for id in Seq.skip (if kernel = KernelId.CacheWrite then min 1 inputs.Count else 0) inputs do
            read phase id

        match kernel with
        | KernelId.Zero when outputs |> Seq.forall (fun id -> isAccumulator slots[id].Kind) ->
            for id in outputs do
                touch phase id

                if not phase.IsPrologue then
                    wrong $"%s{name id} is zeroed outside the prologue"

                if not (zeroed.Add id) then
                    wrong $"%s{name id} is zeroed twice"

                state[id] <- State.Full
        | KernelId.Accumulate ->
            for id in outputs do
                touch phase id

                if not (isAccumulator slots[id].Kind) then
                    wrong $"%s{name id} is no accumulator"
                elif not (zeroed.Contains id) then
                    wrong $"%s{name id} is added to but never zeroed"

                if phase.IsOnce then
                    wrong $"%s{name id} is added to outside the programs of a microbatch"
                elif inputs |> Seq.exists (fun from -> not (accumulated.Add(struct (from, id)))) then
                    wrong $"%s{name inputs[0]} is added twice to %s{name id}"
        | KernelId.CacheWrite ->
            for id in outputs do
                touch phase id

                if not slots[id].Kind.IsCache || inputs.Count = 0 || inputs[0] <> id then
                    wrong $"%s{name id} is no cache that is written in place"
                elif not phase.IsF then
                    wrong $"%s{name id} is written outside the forward pass"
                elif not (written.Add id) then
                    wrong $"%s{name id} is written twice"

                if readers[id] > 0 || writers[id] >= 0 then
                    wrong $"%s{name id} is written while a collective reads or fills it"

                state[id] <- State.Full
        | KernelId.AdamW
        | KernelId.RouterBias ->
            for id in outputs do
                touch phase id

                if not phase.IsEpilogue then
                    wrong $"%s{name id} is updated outside the epilogue"

                if slots[id].Kind.IsTemporary && kernel = KernelId.AdamW && id = outputs[outputs.Count - 1] then
                    // a shard on its way to its parameter
                    made.Add(struct (at, Array.singleton id :> IReadOnlyList<int>))
                    write phase id
                elif not (slots[id].Kind.IsParameter || slots[id].Kind.IsOptimizer) then
                    wrong $"%s{name id} is neither parameter nor optimizer state"

                if readers[id] > 0 || writers[id] >= 0 then
                    wrong $"%s{name id} is updated while a collective reads or fills it"
        | _ ->
            made.Add(struct (at, outputs))

            for id in outputs do
                write phase id

    /// A parameter is filled by the gather of its updated shards, once.
    let gather (phase: Phase) id =
        touch phase id

        if readers[id] > 0 || writers[id] >= 0 then
            wrong $"%s{name id} is filled while another collective reads or fills it"

        if not (written.Add id) then
            wrong $"%s{name id} is filled twice"

    let start (phase: Phase) token (kind: Collective) (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        if not (used.Add token) then
            wrong $"collective t%i{token} is started twice"

        for id in inputs do
            read phase id

        if outputs.Count > 0 then
            made.Add(struct (at, outputs))

        for id in outputs do
            if kind.IsAllGather && phase.IsEpilogue && slots[id].Kind.IsParameter then
                gather phase id
            else
                write phase id

        if not (flying.ContainsKey token) then
            flying[token] <- struct (inputs, outputs)

            for id in inputs do
                readers[id] <- readers[id] + 1

            for id in outputs do
                writers[id] <- token

    let wait token =
        match flying.TryGetValue token with
        | true, struct (inputs, outputs) ->
            flying.Remove token |> ignore

            for id in inputs do
                readers[id] <- readers[id] - 1

            for id in outputs do
                writers[id] <- -1
        | false, _ -> wrong $"it waits for collective t%i{token}, which is not in flight"

    let free phase id =
        touch phase id

        if isPersistent slots[id].Kind then
            wrong $"%s{name id} lives as long as the plan and is never freed"
        elif writers[id] >= 0 then
            wrong $"%s{name id} is freed while collective t%i{writers[id]} fills it"
        elif readers[id] > 0 then
            wrong $"%s{name id} is freed while a collective reads it"

        match state[id] with
        | State.Full -> ()
        | State.Empty -> wrong $"%s{name id} is freed before it is written"
        | State.Freed -> wrong $"%s{name id} is freed twice"

        state[id] <- State.Freed

    member _.Program(program: Program) =
        let phase = program.Phase
        running <- ValueSome program

        program.Steps
        |> Seq.iteri (fun i step ->
            at <- place stage.Stage program.Name i (pathOf step)

            match step with
            | Step.Launch(kernel, _, inputs, outputs, _) -> launch phase kernel inputs outputs
            | Step.Start(token, kind, _, inputs, outputs, _) -> start phase token kind inputs outputs
            | Step.Wait token -> wait token
            | Step.Free slot -> free phase slot)

    /// The end of a microbatch or of the step: nothing in flight, nothing left.
    member _.Close(of': string, isOf: Phase -> bool) =
        at <- $"stage %i{stage.Stage}, end of %s{of'}"

        for token in flying.Keys |> Seq.sort do
            wrong $"collective t%i{token} is never waited for"

        flying.Clear()
        used.Clear()

        for id in 0 .. count - 1 do
            match touchedIn[id] with
            | ValueSome program when isOf program.Phase && not (isPersistent slots[id].Kind) ->
                if state[id] = State.Full then
                    wrong $"%s{name id} is never freed"
            | ValueSome _
            | ValueNone -> ()

        for struct (place, outputs) in made do
            if outputs |> Seq.forall (fun id -> reads[id] = 0 && not (isPersistent slots[id].Kind)) then
                f.Add(Codes.PlanLifetime, place, $"%s{name outputs[0]} is computed but never read")

        made.Clear()

    /// Accumulators that the epilogue reads must start at zero.
    member _.Accumulators() =
        at <- $"stage %i{stage.Stage}"

        for id in 0 .. count - 1 do
            if
                isAccumulator slots[id].Kind
                && reads[id] > 0
                && not (zeroed.Contains id)
                && not (written.Contains id)
            then
                wrong $"%s{name id} is read but never zeroed"

/// In which orders a stage runs its programs for a microbatch; a schedule has one or two.
let private orders (stage: StagePlan) : (Phase * int) list list =
    stage.Timetable
    |> Seq.filter (fun a -> not a.Phase.IsOnce)
    |> Seq.groupBy _.Microbatch
    |> Seq.map (fun (_, actions) -> [ for a in actions -> a.Phase, a.Chunk ])
    |> Seq.distinct
    |> List.ofSeq

/// A gradient that R reads is complete: nothing that comes later in the timetable adds to it.
let private complete (f: Findings) (stage: StagePlan) =
    let slotsOf pick =
        dict [
            for p in stage.Programs ->
                struct (p.Phase, p.Chunk),
                p.Steps |> Seq.collect pick |> Seq.filter (fun id -> stage.Slots[id].Kind.IsGradient) |> HashSet
        ]

    let added =
        slotsOf (fun step ->
            match step with
            | Step.Launch(KernelId.Accumulate, _, _, outputs, _) -> outputs :> int seq
            | Step.Launch _
            | Step.Start _
            | Step.Wait _
            | Step.Free _ -> Seq.empty)

    let read =
        slotsOf (fun step ->
            match step with
            | Step.Launch(_, _, inputs, _, _)
            | Step.Start(_, _, _, inputs, _, _) -> inputs :> int seq
            | Step.Wait _
            | Step.Free _ -> Seq.empty)

    let reduced = Dictionary<int, string>()

    for action in stage.Timetable do
        let key = struct (action.Phase, action.Chunk)

        if action.Phase.IsR then
            for id in read[key] do
                reduced[id] <- action.Name

        for id in added[key] do
            match reduced.TryGetValue id with
            | true, by ->
                f.Add(
                    Codes.PlanLifetime,
                    $"stage %i{stage.Stage}, timetable",
                    $"%s{action.Name} adds to %s{named stage.Slots id} after %s{by} has begun to reduce it"
                )
            | false, _ -> ()

/// Slots and tokens of every stage.
let check (f: Findings) (plan: PlanSet) : unit =
    for stage in plan.Stages do
        let program phase chunk = stage.Programs |> Seq.find (fun p -> p.Phase = phase && p.Chunk = chunk)
        complete f stage

        for order in orders stage do
            let walk = Walk(f, stage)
            walk.Program(program Phase.Prologue 0)

            for phase, chunk in order do
                walk.Program(program phase chunk)

            walk.Close("a microbatch", (fun phase -> not phase.IsOnce))

            // R runs among the last microbatches, but touches nothing of theirs but gradients that are complete
            for action in stage.Timetable do
                if action.Phase.IsR then
                    walk.Program(program action.Phase action.Chunk)

            walk.Program(program Phase.Epilogue 0)
            walk.Close("the step", _.IsOnce)
            walk.Accumulators()

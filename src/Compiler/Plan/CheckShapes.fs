/// Is a plan well formed: ids in range, slots that the mesh can hold, parameters and inputs where they are said to be, complete timetables?
module DeepSeekGraph.Compiler.Checking.Shapes

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Lowering

/// Collects what is wrong.
[<Sealed>]
type Findings() =
    let found = List<Diagnostic>()
    /// More would not help.
    let most = 100

    member _.Add(code, at, message) =
        if found.Count < most then
            found.Add {
                Code = code
                At = at
                Message = message
                Help = ""
            }

    member _.Count = found.Count
    member _.ToList() = List.ofSeq found

/// stage 1, F@2, step 12 (model.layers.3.mlp)
let place (stage: int) (program: string) (index: int) (path: string) =
    let path = if path = "" then "" else $" (%s{path})"
    $"stage %i{stage}, %s{program}, step %i{index}%s{path}"

/// The module path of a step; empty for waits and frees.
let pathOf (step: Step) =
    match step with
    | Step.Launch(_, _, _, _, path)
    | Step.Start(_, _, _, _, _, path) -> path
    | Step.Wait _
    | Step.Free _ -> ""

/// As messages name a slot: %5 (grad:model.norm)
let named (slots: IReadOnlyList<SlotInfo>) (id: int) = $"slot %%%i{id} (%s{slots[id].Name})"

/// Ranks over which a dim is split.
let splitOf (mesh: MeshInfo) (layout: IReadOnlyList<AxisState>) (dim: int) =
    let mutable n = 1

    for m in 0 .. layout.Count - 1 do
        if layout[m] = AxisState.Split dim then
            n <- n * mesh.Axes[m].Size

    n

/// Is this a list of distinct numbers in [0, limit), ascending?
let private ascending limit (values: IReadOnlyList<int>) =
    let inRange = values |> Seq.forall (fun n -> n >= 0 && n < limit)
    inRange && values |> Seq.pairwise |> Seq.forall (fun (a, b) -> a < b)

let private checkMesh (f: Findings) (plan: PlanSet) =
    let mesh = plan.Mesh
    let wrong message = f.Add(Codes.PlanShape, "mesh", message)

    let degrees = [
        mesh.Tensor
        mesh.Context
        mesh.Data
        mesh.Pipeline
        mesh.ExpertTensor
        mesh.Expert
        mesh.ExpertData
    ]

    let product ns = ns |> Seq.fold (fun n d -> n * bigint (d: int)) 1I
    let dense = product [ mesh.Tensor; mesh.Context; mesh.Data ]

    if degrees |> List.exists (fun n -> n < 1) || mesh.Axes |> Seq.exists (fun a -> a.Size < 1) then
        wrong "a degree or mesh axis is below 1"
    elif
        product [ mesh.ExpertTensor; mesh.Expert; mesh.ExpertData ] <> dense
        || product (mesh.Axes |> Seq.map _.Size) <> dense
    then
        wrong $"tp x cp x dp, etp x ep x edp and the mesh axes do not make the same %O{dense} ranks"
    elif dense * bigint mesh.Pipeline > bigint (1 <<< 24) then
        wrong $"%O{dense} x %i{mesh.Pipeline} ranks are more than a job may have"

    if plan.Stages.Count <> mesh.Pipeline then
        wrong $"pp is %i{mesh.Pipeline} but the plan has %i{plan.Stages.Count} stages"

    if plan.Microbatches < 1 || plan.Microbatches > 1_000_000 then
        wrong $"%i{plan.Microbatches} microbatches"

    if plan.Chunks < 1 || plan.Chunks > 1000 then
        wrong $"%i{plan.Chunks} chunks of each stage"

    if plan.Version <> PlanSchema.Version then
        wrong $"schema version %i{plan.Version}; this program knows %i{PlanSchema.Version}"

let private checkGroups (f: Findings) (plan: PlanSet) =
    plan.Groups
    |> Seq.iteri (fun i g ->
        let wrong message = f.Add(Codes.PlanShape, $"group g%i{g.Id}", message)

        if g.Id <> i then
            wrong $"it stands at place %i{i}"

        // two stages in descending order: messages back
        let stages = if g.Stages.Count = 2 then Seq.sort g.Stages |> Array.ofSeq else Array.ofSeq g.Stages

        if not (ascending plan.Mesh.Axes.Count g.MeshAxes && ascending plan.Stages.Count stages) then
            wrong "its mesh axes and stages are not distinct, ascending and in range"
        elif (g.MeshAxes.Count = 0) = (g.Stages.Count = 0) then
            wrong "it runs either along mesh axes or across stages"
        elif g.Stages.Count = 1 then
            wrong "it has one stage only")

/// A tensor as declared: axes, extents, one state per mesh axis; `whole`: extents are global.
let private checkTensor
    (f: Findings)
    (plan: PlanSet)
    at
    whole
    (axes: IReadOnlyList<string>)
    (extents: IReadOnlyList<int>)
    (layout: IReadOnlyList<AxisState>)
    =
    let wrong message = f.Add(Codes.PlanShape, at, message)

    let inside (state: AxisState) =
        match state with
        | AxisState.Split d -> d >= 0 && d < extents.Count
        | AxisState.Replicated
        | AxisState.PartialSum
        | AxisState.PartialMax -> true

    if axes.Count <> extents.Count then
        wrong $"it has %i{axes.Count} axes but %i{extents.Count} extents"
    elif layout.Count <> plan.Mesh.Axes.Count then
        wrong $"its layout has %i{layout.Count} states but the mesh %i{plan.Mesh.Axes.Count} axes"
    elif extents |> Seq.exists (fun n -> n < 1) then
        wrong "an extent is below 1"
    elif not (Seq.forall inside layout) then
        wrong "its layout splits a dim that it does not have"
    elif whole then
        for d in 0 .. extents.Count - 1 do
            if extents[d] % splitOf plan.Mesh layout d <> 0 then
                wrong $"axis '%s{axes[d]}' (%i{extents[d]}) does not split over %i{splitOf plan.Mesh layout d} ranks"

/// Does a slot hold one rank's shard of this tensor?
let private isShard (plan: PlanSet) (slot: SlotInfo) (extents: IReadOnlyList<int>) (layout: IReadOnlyList<AxisState>) =
    slot.Extents.Count = extents.Count
    && Seq.forall2 (fun (a: AxisState) b -> a = b) slot.Layout layout
    && Seq.forall2 (=) slot.Extents (extents |> Seq.mapi (fun d n -> n / splitOf plan.Mesh layout d))

let private checkSlots (f: Findings) (plan: PlanSet) (stage: StagePlan) =
    let names = HashSet<string>()

    stage.Slots
    |> Seq.iteri (fun i slot ->
        let at = $"stage %i{stage.Stage}, slot %%%i{slot.Id} (%s{slot.Name})"
        let wrong message = f.Add(Codes.PlanShape, at, message)

        if slot.Id <> i then
            wrong $"it stands at place %i{i}"

        if not (names.Add slot.Name) then
            wrong "another slot of the stage has this name"

        if not (slot.Density > 0.0 && slot.Density <= 1.0) || slot.Routed && slot.Extents.Count < 3 then
            wrong "rows have three axes or more, and a density in (0, 1]"

        if slot.Padding < 1 || slot.Padding > Padding.most || slot.Padding > 1 && not slot.Routed then
            wrong $"a padding of %i{slot.Padding}; rows have one from 1 to %i{Padding.most}, other values 1"

        let before = f.Count
        checkTensor f plan at false slot.Axes slot.Extents slot.Layout

        if f.Count = before then
            match slot.Kind with
            | SlotKind.Parameter ->
                match plan.Parameters |> Seq.tryFind (fun p -> p.Name = slot.Name) with
                | Some p when
                    Seq.contains stage.Stage p.Stages && p.DType = slot.DType && isShard plan slot p.Extents p.Layout
                    ->
                    ()
                | Some _ -> wrong "it is not a shard of the parameter as declared"
                | None -> wrong "there is no such parameter"
            | SlotKind.Input ->
                match plan.Inputs |> Seq.tryFind (fun p -> p.Name = slot.Name) with
                | Some p when p.DType = slot.DType && isShard plan slot p.Extents p.Layout -> ()
                | Some _ -> wrong "it is not a shard of the input as declared"
                | None -> wrong "there is no such input"
            | SlotKind.Scalar ->
                if slot.Extents.Count <> 0 || slot.Layout |> Seq.exists (fun s -> s <> AxisState.Replicated) then
                    wrong "a scalar has no axes and is whole on every rank"
            | SlotKind.Optimizer
            | SlotKind.Gradient
            | SlotKind.Counter
            | SlotKind.Cache
            | SlotKind.Saved
            | SlotKind.Temporary -> ())

    for p in plan.Parameters do
        if
            Seq.contains stage.Stage p.Stages
            && not (stage.Slots |> Seq.exists (fun s -> s.Name = p.Name && s.Kind.IsParameter))
        then
            f.Add(Codes.PlanShape, $"stage %i{stage.Stage}", $"it holds parameter %s{p.Name} but has no slot for it")

let private checkParameters (f: Findings) (plan: PlanSet) =
    for name, count in plan.Parameters |> Seq.map _.Name |> Seq.append (plan.Inputs |> Seq.map _.Name) |> Seq.countBy id do
        if count > 1 then
            f.Add(Codes.PlanShape, name, "two parameters or inputs have this name")

    for p in plan.Parameters do
        checkTensor f plan $"parameter %s{p.Name}" true p.Axes p.Extents p.Layout

        if p.Stages.Count = 0 || not (ascending plan.Stages.Count p.Stages) then
            f.Add(Codes.PlanShape, $"parameter %s{p.Name}", "its stages are not distinct, ascending and in range")

        if p.Layout |> Seq.exists (fun s -> s.IsPartialSum || s.IsPartialMax) then
            f.Add(Codes.PlanShape, $"parameter %s{p.Name}", "a parameter is never a partial value")

    for i in plan.Inputs do
        checkTensor f plan $"input %s{i.Name}" true i.Axes i.Extents i.Layout

        if i.Layout |> Seq.exists (fun s -> s.IsPartialSum || s.IsPartialMax) then
            f.Add(Codes.PlanShape, $"input %s{i.Name}", "an input is never a partial value")

let private checkSteps (f: Findings) (plan: PlanSet) (stage: StagePlan) =
    for program in stage.Programs do
        program.Steps
        |> Seq.iteri (fun i step ->
            let wrong message = f.Add(Codes.PlanShape, place stage.Stage program.Name i (pathOf step), message)
            let isSlot id = id >= 0 && id < stage.Slots.Count

            let slots (ids: IReadOnlyList<int>) =
                for id in ids do
                    if not (isSlot id) then
                        wrong $"it names slot %%%i{id}, but the stage has %i{stage.Slots.Count} slots"

            match step with
            | Step.Launch(kernel, _, inputs, outputs, _) ->
                slots inputs
                slots outputs

                if not (System.Enum.IsDefined kernel) then
                    wrong $"there is no kernel %i{int kernel}"

                // an fp32 parameter is its own master copy
                let others = outputs |> Seq.skip (if kernel = KernelId.AdamW then min 1 outputs.Count else 0)

                if others |> Seq.distinct |> Seq.length <> Seq.length others || outputs.Count = 0 then
                    wrong "it has no output, or one slot twice among its outputs"
            | Step.Start(_, kind, group, inputs, outputs, _) ->
                slots inputs
                slots outputs

                if outputs |> Seq.distinct |> Seq.length <> outputs.Count then
                    wrong "it has one slot twice among its outputs"

                if (kind.IsSend || kind.IsRecv) && inputs.Count + outputs.Count <> 1 then
                    wrong "a message carries one value"

                if not kind.IsSend && outputs.Count = 0 || not kind.IsRecv && inputs.Count = 0 then
                    wrong "it has no operand"

                if group < 0 || group >= plan.Groups.Count then
                    wrong $"it names group g%i{group}, but the plan has %i{plan.Groups.Count} groups"
                else
                    let across = List.ofSeq plan.Groups[group].Stages

                    match kind with
                    | Collective.Send peer ->
                        if across <> [ stage.Stage; peer ] || peer = stage.Stage then
                            wrong $"its group g%i{group} is not for messages from stage %i{stage.Stage} to %i{peer}"
                    | Collective.Recv peer ->
                        if across <> [ peer; stage.Stage ] || peer = stage.Stage then
                            wrong $"its group g%i{group} is not for messages from stage %i{peer} to %i{stage.Stage}"
                    | Collective.AllReduceSum ->
                        if not across.IsEmpty && not (List.contains stage.Stage across) then
                            wrong $"its group g%i{group} leaves out stage %i{stage.Stage}"
                    | Collective.AllReduceMax
                    | Collective.AllGather _
                    | Collective.ReduceScatter _
                    | Collective.AllToAll _
                    | Collective.RouteToExperts
                    | Collective.RowsToExperts
                    | Collective.RowsToTokens
                    | Collective.Dispatch _
                    | Collective.Combine _ ->
                        if not across.IsEmpty then
                            wrong $"its group g%i{group} runs across stages"
            | Step.Wait _ -> ()
            | Step.Free slot -> slots [| slot |])

/// Prologue; F, I and W in parts, S and R in parts of each chunk; epilogue.
let private checkPrograms (f: Findings) (plan: PlanSet) (stage: StagePlan) =
    let parts is chunk =
        stage.Programs
        |> Seq.filter (fun p -> is p.Phase && p.Chunk = chunk)
        |> Seq.map _.Phase.Part
        |> Seq.distinct
        |> Seq.sort
        |> List.ofSeq

    let expected = [
        struct (Phase.Prologue, 0)

        for chunk in 0 .. plan.Chunks - 1 do
            for whole: Phase in [ Phase.F 0; Phase.I 0; Phase.W 0 ] do
                for part in 0 .. max 1 (parts (fun phase -> phase.Word = whole.Word) chunk).Length - 1 do
                    struct (whole.WithPart part, chunk)

            struct (Phase.S, chunk)

            // a part that completes no gradient has none
            for part in parts _.IsR chunk do
                struct (Phase.R part, chunk)

        struct (Phase.Epilogue, 0)
    ]

    let found = [ for p in stage.Programs -> struct (p.Phase, p.Chunk) ]

    if found <> expected then
        let shown programs =
            programs
            |> List.truncate 40
            |> List.map (fun struct (p: Phase, c) -> p.OfChunk c)
            |> String.concat " "

        f.Add(
            Codes.PlanShape,
            $"stage %i{stage.Stage}",
            $"its programs are %s{shown found}; those of %i{plan.Chunks} chunks are %s{shown expected}, in this order"
        )

let private checkTimetable (f: Findings) (plan: PlanSet) (stage: StagePlan) =
    let wrong message = f.Add(Codes.PlanShape, $"stage %i{stage.Stage}, timetable", message)
    checkPrograms f plan stage
    let programs is = stage.Programs |> Seq.filter (fun p -> is p.Phase) |> Seq.length

    /// What a microbatch runs in a chunk before this; the prologue before F.
    let before (phase: Phase) chunk =
        let last (whole: Phase) =
            let parts = stage.Programs |> Seq.filter (fun p -> p.Phase.Word = whole.Word && p.Chunk = chunk)
            whole.WithPart(Seq.length parts - 1)

        match phase with
        | Phase.F part when part > 0 -> Phase.F(part - 1)
        | Phase.I 0 -> last (Phase.F 0)
        | Phase.I part -> Phase.I(part - 1)
        | Phase.W 0 -> last (Phase.I 0)
        | Phase.W part -> Phase.W(part - 1)
        | Phase.S -> last (Phase.W 0)
        | Phase.Prologue
        | Phase.F _
        | Phase.R _
        | Phase.Epilogue -> Phase.Prologue

    let count = stage.Timetable.Count
    let last = Dictionary<struct (int * int), Phase>()
    let reduced = HashSet<struct (int * int)>()

    stage.Timetable
    |> Seq.iteri (fun i action ->
        let microbatch = action.Microbatch
        let key = struct (action.Chunk, microbatch)

        let expects before =
            last.TryGetValue key |> fun (found, phase) -> if found then phase = before else before.IsPrologue

        match action.Phase with
        | Phase.Prologue ->
            if i <> 0 || key <> struct (0, 0) then
                wrong "the prologue does not come first"
        | Phase.Epilogue ->
            if i <> count - 1 || key <> struct (0, 0) then
                wrong "the epilogue does not come last"
        | Phase.R part ->
            if not (stage.Programs |> Seq.exists (fun p -> p.Phase = action.Phase && p.Chunk = action.Chunk)) then
                wrong $"there is no program %s{action.Name}"
            elif not (reduced.Add(struct (action.Chunk, part))) || microbatch <> 0 then
                wrong $"%s{action.Name} comes twice"
        | Phase.F _
        | Phase.I _
        | Phase.W _
        | Phase.S ->
            let before = before action.Phase action.Chunk

            if microbatch < 0 || microbatch >= plan.Microbatches then
                wrong $"%s{action.Name} is beyond the %i{plan.Microbatches} microbatches"
            elif action.Chunk < 0 || action.Chunk >= plan.Chunks then
                wrong $"%s{action.Name} is beyond the %i{plan.Chunks} chunks"
            elif not (expects before) then
                wrong $"%s{action.Name} does not follow the %s{before.Name} of its microbatch"

            last[key] <- action.Phase)

    let due =
        int64 plan.Microbatches * int64 (programs (fun phase -> not phase.IsOnce))
        + int64 (programs _.IsR)
        + 2L

    if int64 count <> due then
        wrong $"it has %i{count} actions; %i{plan.Microbatches} microbatches in %i{plan.Chunks} chunks make %i{due}"

/// What is malformed; later checks index without asking when this finds nothing.
let check (f: Findings) (plan: PlanSet) : unit =
    checkMesh f plan
    checkGroups f plan

    if f.Count = 0 then
        checkParameters f plan

        plan.Stages
        |> Seq.iteri (fun i stage ->
            if stage.Stage <> i then
                f.Add(Codes.PlanShape, $"stage %i{stage.Stage}", $"it stands at place %i{i}")

            checkSlots f plan stage
            checkSteps f plan stage
            checkTimetable f plan stage)

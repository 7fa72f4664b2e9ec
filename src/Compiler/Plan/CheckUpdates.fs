/// Is every gradient complete when it is used: summed over every mesh axis and stage that holds a part, once, and applied once?
module DeepSeekGraph.Compiler.Checking.Updates

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking.Shapes

/// How a value of the epilogue relates to the other stages.
[<RequireQualifiedAccess>]
type private Share =
    /// Complete: nothing of it lies on other stages.
    | Whole
    /// The value is the sum over these stages.
    | Part of Stages: int list

/// Accumulators are named after what they sum.
let private prefixed (prefix: string) (name: string) =
    if name.StartsWith(prefix, System.StringComparison.Ordinal) then
        ValueSome(name.Substring prefix.Length)
    else
        ValueNone

/// Optimizer slots of a parameter by the output of the update that they are; the first is a master, or the remainder of one.
let private stateNames (first: SlotInfo) = [|
    (if first.DType = DType.Int16 then "remainder:" else "master:")
    "m:"
    "v:"
|]

/// The epilogue of one stage.
type private Epilogue(f: Findings, plan: PlanSet, stage: StagePlan) =
    let slots = stage.Slots
    let all = [ 0 .. plan.Stages.Count - 1 ]
    let share = Dictionary<int, Share>()
    // the accumulator that a value is the reduced form of
    let origin = Dictionary<int, int>()
    // updated shards that are yet to be gathered -> their parameter
    let shards = Dictionary<int, string>()
    // blocks cut out of a parameter before its update -> the parameter
    let blocks = Dictionary<int, string>()
    let norms, updated = List<int>(), List<string>()
    let mutable clips = 0
    let mutable at = ""
    let wrong message = f.Add(Codes.PlanUpdate, at, message)
    let parameter name = plan.Parameters |> Seq.tryFind (fun p -> p.Name = name)
    let part stages = if List.length stages > 1 then Share.Part stages else Share.Whole

    let shareOf id =
        match share.TryGetValue id with
        | true, s -> s
        | false, _ ->
            match slots[id].Kind with
            | SlotKind.Gradient ->
                match prefixed "grad:" slots[id].Name |> ValueOption.map parameter with
                | ValueSome(Some p) -> part (List.ofSeq p.Stages)
                | ValueSome None
                | ValueNone -> Share.Whole
            | SlotKind.Counter -> if (prefixed "acc:" slots[id].Name).IsSome then part all else Share.Whole
            | SlotKind.Parameter
            | SlotKind.Optimizer
            | SlotKind.Scalar
            | SlotKind.Cache
            | SlotKind.Input
            | SlotKind.Saved
            | SlotKind.Temporary -> Share.Whole

    let originOf id =
        match origin.TryGetValue id with
        | true, o -> o
        | false, _ -> id

    let demandWhole id what =
        match shareOf id with
        | Share.Whole -> ()
        | Share.Part stages ->
            let shown = stages |> List.map string |> String.concat ", "
            wrong $"%s{named slots id} is summed over stages %s{shown} only later; %s{what} needs all of it"

    let adamW (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        let target = slots[outputs[3]]
        let gradient = slots[originOf inputs[0]]
        demandWhole inputs[0] "the update"

        // a shard is of the parameter whose gradient it takes, and counts once it is gathered
        let name =
            match prefixed "grad:" gradient.Name with
            | ValueSome name when not target.Kind.IsParameter ->
                if
                    not (shards.TryAdd(outputs[3], name)) || shards.Values |> Seq.filter ((=) name) |> Seq.length > 1
                then
                    wrong $"%s{named slots outputs[3]}, a shard of %s{name}, is updated twice"

                name
            | ValueSome _
            | ValueNone ->
                updated.Add target.Name
                target.Name

        match parameter name with
        | Some { Update = Update.AdamW _ } when target.Kind.IsParameter || target.Kind.IsTemporary -> ()
        | Some { Update = Update.AdamW _ } when outputs[0] = outputs[3] -> ()
        | Some _
        | None -> wrong $"%s{named slots outputs[3]} is no parameter that AdamW updates"

        if gradient.Name <> $"grad:%s{name}" || not gradient.Kind.IsGradient then
            wrong $"%s{name} is updated by '%s{gradient.Name}', which is not its gradient"

        let stateNames = stateNames slots[outputs[0]]

        for i in 0..2 do
            let slot = slots[outputs[i]]
            let isOwn = slot.Name = stateNames[i] + name && slot.Kind.IsOptimizer

            if not (isOwn || i = 0 && outputs[0] = outputs[3] && target.Kind.IsParameter) then
                wrong $"%s{named slots outputs[i]} is not the %s{stateNames[i].TrimEnd ':'} of %s{name}"

        // a remainder means something beside its own weight only
        for weight in Seq.skip 4 inputs do
            let isOwn =
                match blocks.TryGetValue weight with
                | true, from -> from = name && target.Kind.IsTemporary
                | false, _ -> weight = outputs[3] && target.Kind.IsParameter

            if not isOwn then
                wrong $"%s{named slots weight} is not the weight of %s{name} before its update"

        for i, name in [ 2, "lr"; 3, "step" ] do
            if slots[inputs[i]].Name <> name then
                wrong $"%s{named slots inputs[i]} is not %s{name}"

    let launch kernel (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        match kernel with
        | KernelId.AdamW when (inputs.Count = 4 || inputs.Count = 5) && outputs.Count = 4 -> adamW inputs outputs
        | KernelId.LocalSlice when inputs.Count = 1 && outputs.Count = 1 && slots[inputs[0]].Kind.IsParameter ->
            blocks[outputs[0]] <- slots[inputs[0]].Name
        | KernelId.RouterBias when inputs.Count = 1 && outputs.Count = 1 ->
            let bias, counts = slots[outputs[0]], slots[originOf inputs[0]]
            demandWhole inputs[0] "the update"
            updated.Add bias.Name

            match parameter bias.Name with
            | Some { Update = Update.RouterBias _ } when counts.Name = $"count:%s{bias.Name}" -> ()
            | Some _
            | None -> wrong $"%s{bias.Name} is no router bias that '%s{counts.Name}' updates"
        | KernelId.SumSquares ->
            for id in inputs do
                demandWhole id "the norm"
                norms.Add(originOf id)

            for id in outputs do
                share[id] <- part all
        | KernelId.ClipScale ->
            clips <- clips + 1

            for id in inputs do
                demandWhole id "clipping"
        | KernelId.Zero ->
            for id in outputs do
                share[id] <- if slots[id].Kind.IsTemporary then part all else shareOf id
        | KernelId.Add when inputs |> Seq.forall (fun id -> shareOf id = shareOf inputs[0]) ->
            for id in outputs do
                share[id] <- shareOf inputs[0]
        | _ ->
            for id in inputs do
                demandWhole id "this step"

    /// A reduction: over mesh axes (whole or scattered), or over stages.
    let reduce (group: Group) from into =
        origin[into] <- originOf from

        if group.Stages.Count = 0 then
            share[into] <- shareOf from
        else
            match shareOf from with
            | Share.Part stages when stages = List.ofSeq group.Stages -> ()
            | Share.Part _
            | Share.Whole -> wrong $"%s{named slots from} is no sum over the stages of group %s{group.Name}"

            share[into] <- Share.Whole

    /// Updated shards become the parameter again.
    let gather from into =
        match shards.TryGetValue from with
        | true, name when slots[into].Kind.IsParameter && slots[into].Name = name -> updated.Add name
        | true, name -> wrong $"%s{named slots into} is filled with shards of %s{name}"
        | false, _ -> wrong $"%s{named slots from} is gathered but is no updated shard"

    let start kind (group: Group) (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        let each run =
            if inputs.Count = outputs.Count then
                Seq.iter2 run inputs outputs
            else
                wrong "a collective of the epilogue takes one operand a result"

        match kind with
        | Collective.AllReduceSum
        | Collective.ReduceScatter _ -> each (reduce group)
        | Collective.AllGather _ -> each gather
        | Collective.AllReduceMax
        | Collective.AllToAll _
        | Collective.RouteToExperts
        | Collective.RowsToExperts
        | Collective.RowsToTokens
        | Collective.Dispatch _
        | Collective.Combine _
        | Collective.Send _
        | Collective.Recv _ -> wrong "the epilogue has sums, and gathers of updated shards, only"

    member _.Run() =
        for program in stage.Programs do
            if program.Phase.IsR || program.Phase.IsEpilogue then
                program.Steps
                |> Seq.iteri (fun i step ->
                    at <- place stage.Stage program.Name i (pathOf step)

                    match step with
                    | Step.Launch(kernel, _, inputs, outputs, _) -> launch kernel inputs outputs
                    | Step.Start(_, kind, group, inputs, outputs, _) -> start kind plan.Groups[group] inputs outputs
                    | Step.Wait _
                    | Step.Free _ -> ())

        at <- $"stage %i{stage.Stage}, epilogue"

        for p in plan.Parameters do
            let times = updated |> Seq.filter ((=) p.Name) |> Seq.length

            let due =
                match p.Update with
                | Update.AdamW _
                | Update.RouterBias _ -> Seq.contains stage.Stage p.Stages
                | Update.Frozen -> false

            if times <> (if due then 1 else 0) then
                wrong $"%s{p.Name} is updated %i{times} times"

        // the norm: each gradient on the first stage that holds it, once
        let wanted =
            plan.Parameters
            |> Seq.filter (fun p -> p.Update.IsAdamW && p.Stages[0] = stage.Stage)
            |> Seq.map (fun p -> "grad:" + p.Name)
            |> Seq.sort
            |> List.ofSeq

        let found = norms |> Seq.map (fun id -> slots[id].Name) |> Seq.sort |> List.ofSeq

        if clips > 0 && found <> wanted then
            let strange = Seq.append (List.except wanted found) (List.except found wanted) |> Seq.truncate 5
            wrong $"""the gradient norm does not hold each gradient of the stage once: %s{String.concat ", " strange}"""

        clips

/// Sources of what is added up: somewhere a microbatch must add to every gradient and count.
let private checkSources (f: Findings) (plan: PlanSet) =
    let added = HashSet<string>()

    for stage in plan.Stages do
        for program in stage.Programs do
            for step in program.Steps do
                match step with
                | Step.Launch(KernelId.Accumulate, _, _, outputs, _) ->
                    for id in outputs do
                        added.Add stage.Slots[id].Name |> ignore
                | Step.Launch _
                | Step.Start _
                | Step.Wait _
                | Step.Free _ -> ()

    for stage in plan.Stages do
        for slot in stage.Slots do
            let isSum = slot.Kind.IsGradient || slot.Kind.IsCounter && not (slot.Name.StartsWith "metric:")

            if isSum && not (added.Contains slot.Name) then
                f.Add(
                    Codes.PlanUpdate,
                    $"stage %i{stage.Stage}",
                    $"nothing is ever added to %s{named stage.Slots slot.Id}"
                )

/// Updates of every stage.
let check (f: Findings) (plan: PlanSet) : unit =
    checkSources f plan
    let clips = [ for stage in plan.Stages -> Epilogue(f, plan, stage).Run() ]

    if List.distinct clips |> List.length > 1 || clips.Head > 1 then
        f.Add(Codes.PlanUpdate, "epilogue", "the stages do not all clip once")

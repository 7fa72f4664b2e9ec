/// Damaged plans: each class takes a legal plan and breaks it in every place where it can.
module DeepSeekGraph.Compiler.Tests.Mutations

open System.Collections.Generic
open DeepSeekGraph

/// A plan with one change; `Note` says which.
type Mutant = { Note: string; Plan: PlanSet }

let private withStage (plan: PlanSet) s (change: StagePlan -> StagePlan) = {
    plan with
        Stages = plan.Stages |> Seq.mapi (fun i stage -> if i = s then change stage else stage) |> Array.ofSeq
}

/// The plan with the steps of one program of a stage changed.
let withSteps (plan: PlanSet) s (program: Program) (change: Step[] -> Step[]) =
    withStage plan s (fun stage -> {
        stage with
            Programs =
                stage.Programs
                |> Seq.map (fun p ->
                    if p.Name = program.Name then
                        {
                            p with
                                Steps = change (Array.ofSeq p.Steps)
                        }
                    else
                        p)
                |> Array.ofSeq
    })

/// Every step of a plan: stage, program, place.
let private places (plan: PlanSet) = [|
    for stage in plan.Stages do
        for program in stage.Programs do
            for i in 0 .. program.Steps.Count - 1 -> stage.Stage, program, i, program.Steps[i]
|]

let private edit (plan: PlanSet) (note: string) (s, program: Program, i, _: Step) change = {
    Note = $"%s{note} at stage %i{s}, %s{program.Name}, step %i{i}"
    Plan = withSteps plan s program change
}

let private isWork (step: Step) = step.IsLaunch || step.IsStart

let private deleteStep plan = seq {
    for (_, _, i, step) as at in places plan do
        if isWork step then
            edit plan "delete" at (Array.removeAt i)
}

let private duplicateStep plan = seq {
    for (_, _, i, step) as at in places plan do
        edit plan "duplicate" at (Array.insertAt i step)
}

let private swapNeighbours (plan: PlanSet) = seq {
    for (_, program, i, _) as at in places plan do
        let steps = program.Steps

        if i + 1 < steps.Count then
            edit plan "swap with the next" at (fun steps ->
                steps
                |> Array.mapi (fun k x ->
                    if k = i then steps[i + 1]
                    elif k = i + 1 then steps[i]
                    else x))
}

let private dropWait plan = seq {
    for (_, _, i, step) as at in places plan do
        if step.IsWait then
            edit plan "drop wait" at (Array.removeAt i)
}

let private dropFree plan = seq {
    for (_, _, i, step) as at in places plan do
        if step.IsFree then
            edit plan "drop free" at (Array.removeAt i)
}

let private touches (step: Step) =
    match step with
    | Step.Launch(_, _, inputs, outputs, _)
    | Step.Start(_, _, _, inputs, outputs, _) -> Seq.append inputs outputs |> List.ofSeq
    | Step.Wait _ -> []
    | Step.Free slot -> [ slot ]

/// Frees a slot just before the last step that touches it.
let private earlyFree (plan: PlanSet) = seq {
    for (_, program, i, step) as at in places plan do
        match step with
        | Step.Free slot ->
            let steps = program.Steps
            let last = [ i - 1 .. -1 .. 0 ] |> List.tryFind (fun k -> List.contains slot (touches steps[k]))

            match last with
            | Some k -> edit plan "free early" at (fun steps -> steps |> Array.removeAt i |> Array.insertAt k step)
            | None -> ()
        | Step.Launch _
        | Step.Start _
        | Step.Wait _ -> ()
}

let private changeGroup (plan: PlanSet) = seq {
    for (_, _, i, step) as at in places plan do
        match step with
        | Step.Start(token, kind, group, inputs, outputs, path) ->
            for g in plan.Groups do
                if g.Id <> group then
                    edit
                        plan
                        $"group g%i{group} becomes g%i{g.Id}"
                        at
                        (Array.updateAt i (Step.Start(token, kind, g.Id, inputs, outputs, path)))
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

let private otherKinds (kind: Collective) =
    match kind with
    | Collective.AllReduceSum -> [ Collective.AllReduceMax; Collective.AllGather 0; Collective.ReduceScatter 0 ]
    | Collective.AllReduceMax -> [ Collective.AllReduceSum; Collective.AllGather 0 ]
    | Collective.AllGather d -> [
        Collective.ReduceScatter d
        Collective.AllGather(d + 1)
        Collective.AllToAll(d + 1, d)
        Collective.AllReduceSum
      ]
    | Collective.ReduceScatter d -> [
        Collective.AllGather d
        Collective.ReduceScatter(abs (d - 1))
        Collective.AllReduceSum
      ]
    | Collective.AllToAll(a, b) -> [ Collective.AllToAll(b, a); Collective.AllGather b ]
    | Collective.RouteToExperts -> [ Collective.AllGather 2; Collective.AllReduceMax ]
    | Collective.RowsToExperts -> [ Collective.RowsToTokens; Collective.RouteToExperts ]
    | Collective.RowsToTokens -> [ Collective.RowsToExperts; Collective.RouteToExperts ]
    | Collective.Dispatch n -> [ Collective.Combine n; Collective.RowsToExperts ]
    | Collective.Combine n -> [ Collective.Dispatch n; Collective.RowsToTokens ]
    | Collective.Send s -> [ Collective.Recv s; Collective.AllReduceSum ]
    | Collective.Recv s -> [ Collective.Send s; Collective.AllReduceSum ]

let private changeKind plan = seq {
    for (_, _, i, step) as at in places plan do
        match step with
        | Step.Start(token, kind, group, inputs, outputs, path) ->
            for other in otherKinds kind do
                edit
                    plan
                    $"%O{kind} becomes %O{other}"
                    at
                    (Array.updateAt i (Step.Start(token, other, group, inputs, outputs, path)))
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

/// Writes into another slot of the same type.
let private retargetOutput (plan: PlanSet) = seq {
    for (s, _, i, step) as at in places plan do
        let slots = plan.Stages[s].Slots

        let twins (ids: IReadOnlyList<int>) =
            if ids.Count = 0 then
                Seq.empty
            else
                let slot = slots[ids[0]]

                slots
                |> Seq.filter (fun o ->
                    o.Id <> slot.Id
                    && o.DType = slot.DType
                    && List.ofSeq o.Extents = List.ofSeq slot.Extents
                    && List.ofSeq o.Layout = List.ofSeq slot.Layout)
                |> Seq.truncate 2
                |> Seq.map (fun o -> o.Id, Array.updateAt 0 o.Id (Array.ofSeq ids) :> IReadOnlyList<int>)

        match step with
        | Step.Launch(kernel, attributes, inputs, outputs, path) ->
            for id, ids in twins outputs do
                edit
                    plan
                    $"output becomes %%%i{id}"
                    at
                    (Array.updateAt i (Step.Launch(kernel, attributes, inputs, ids, path)))
        | Step.Start(token, kind, group, inputs, outputs, path) ->
            for id, ids in twins outputs do
                edit
                    plan
                    $"output becomes %%%i{id}"
                    at
                    (Array.updateAt i (Step.Start(token, kind, group, inputs, ids, path)))
        | Step.Wait _
        | Step.Free _ -> ()
}

let private reorderTimetable (plan: PlanSet) = seq {
    for stage in plan.Stages do
        let table = Array.ofSeq stage.Timetable

        for i in 0 .. table.Length - 1 do
            for distance in [ 1; 2; 3; 5 ] do
                if i + distance < table.Length then
                    let swapped =
                        table |> Array.updateAt i table[i + distance] |> Array.updateAt (i + distance) table[i]

                    {
                        Note = $"timetable of stage %i{stage.Stage}: %i{i} and %i{i + distance} change places"
                        Plan = withStage plan stage.Stage (fun s -> { s with Timetable = swapped })
                    }

            {
                Note = $"timetable of stage %i{stage.Stage}: %i{i} is left out"
                Plan =
                    withStage plan stage.Stage (fun s -> {
                        s with
                            Timetable = Array.removeAt i table
                    })
            }
}

let private isMessage (kind: Collective) = kind.IsSend || kind.IsRecv

/// With its wait, or leaving the wait behind.
let private dropMessage plan = seq {
    for (_, _, i, step) as at in places plan do
        match step with
        | Step.Start(token, kind, _, _, _, _) when isMessage kind ->
            edit plan "drop the start of a message" at (Array.removeAt i)

            edit
                plan
                "drop the message"
                at
                (Array.filter (fun s ->
                    match s with
                    | Step.Start(t, _, _, _, _, _)
                    | Step.Wait t -> t <> token
                    | Step.Launch _
                    | Step.Free _ -> true))
        | Step.Start _
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

let private duplicateMessage plan = seq {
    for (_, _, i, step) as at in places plan do
        match step with
        | Step.Start(_, kind, group, inputs, outputs, path) when isMessage kind ->
            edit plan "send or receive again" at (fun steps ->
                steps
                |> Array.insertManyAt i [ Step.Start(7777, kind, group, inputs, outputs, path); Step.Wait 7777 ])

            edit plan "send or receive again at the end" at (fun steps ->
                Array.append steps [| Step.Start(7777, kind, group, inputs, outputs, path); Step.Wait 7777 |])
        | Step.Start _
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

let private changePeer (plan: PlanSet) = seq {
    for (s, _, i, step) as at in places plan do
        match step with
        | Step.Start(token, kind, _, inputs, outputs, path) when isMessage kind ->
            for g in plan.Groups do
                for other in g.Stages do
                    if other <> s && Seq.contains s g.Stages then
                        let changed =
                            match kind with
                            | Collective.Send peer when peer <> other -> Some(Collective.Send other)
                            | Collective.Recv peer when peer <> other -> Some(Collective.Recv other)
                            | _same -> None

                        match changed with
                        | Some kind ->
                            edit
                                plan
                                $"peer becomes %i{other}"
                                at
                                (Array.updateAt i (Step.Start(token, kind, g.Id, inputs, outputs, path)))
                        | None -> ()
        | Step.Start _
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

let private changeLayout (plan: PlanSet) = seq {
    for stage in plan.Stages do
        for slot in stage.Slots do
            for m in 0 .. slot.Layout.Count - 1 do
                for state in
                    [
                        AxisState.Replicated
                        AxisState.Split 0
                        AxisState.Split 1
                        AxisState.PartialSum
                    ] do
                    if slot.Layout[m] <> state then
                        let changed = {
                            slot with
                                Layout = slot.Layout |> Seq.mapi (fun k s -> if k = m then state else s) |> Array.ofSeq
                        }

                        {
                            Note =
                                $"stage %i{stage.Stage}, slot %%%i{slot.Id} (%s{slot.Name}): mesh axis %i{m} becomes %O{state}"
                            Plan =
                                withStage plan stage.Stage (fun s -> {
                                    s with
                                        Slots =
                                            s.Slots
                                            |> Seq.map (fun o -> if o.Id = slot.Id then changed else o)
                                            |> Array.ofSeq
                                })
                        }
}

let private isKernel kernel (step: Step) =
    match step with
    | Step.Launch(k, _, _, _, _) -> k = kernel
    | Step.Start _
    | Step.Wait _
    | Step.Free _ -> false

let private dropZero plan = seq {
    for (_, _, i, step) as at in places plan do
        if isKernel KernelId.Zero step || isKernel KernelId.Accumulate step then
            edit plan "drop zero or accumulate" at (Array.removeAt i)
}

let private rename (from: int) (into: int) (step: Step) =
    let all (ids: IReadOnlyList<int>) = ids |> Seq.map (fun id -> if id = from then into else id) |> Array.ofSeq

    match step with
    | Step.Launch(kernel, attributes, inputs, outputs, path) ->
        Step.Launch(kernel, attributes, all inputs, outputs, path)
    | Step.Start(token, kind, group, inputs, outputs, path) -> Step.Start(token, kind, group, all inputs, outputs, path)
    | Step.Wait _
    | Step.Free _ -> step

/// Is this a sum over ranks or stages?
let private isSum (kind: Collective) = kind.IsAllReduceSum || kind.IsReduceScatter

/// Three of the tuples of a bundle: the first, one between, the last.
let private someOf (outputs: IReadOnlyList<int>) = List.distinct [ 0; outputs.Count / 2; outputs.Count - 1 ]

/// Readers of a sum read what was to be summed.
let private dropReduction plan = seq {
    for (_, program: Program, _, step) as at in places plan do
        match step with
        | Step.Start(token, kind, group, inputs, outputs, path) when isSum kind && program.Phase.IsEpilogue ->
            for k in someOf outputs do
                edit plan $"drop reduction %i{k}" at (fun steps ->
                    steps
                    |> Array.choose (fun s ->
                        match s with
                        | Step.Start(t, _, _, _, _, _) when t = token && outputs.Count > 1 ->
                            let rest (ids: IReadOnlyList<int>) = Seq.removeAt k ids |> Array.ofSeq
                            Some(Step.Start(token, kind, group, rest inputs, rest outputs, path))
                        | Step.Start(t, _, _, _, _, _) -> if t = token then None else Some s
                        | Step.Wait t -> if t = token && outputs.Count = 1 then None else Some s
                        | Step.Free slot -> if slot = outputs[k] then None else Some s
                        | Step.Launch _ -> Some s)
                    |> Array.map (rename outputs[k] inputs[k])
                    // what was freed behind the sum is freed at the end
                    |> fun steps ->
                        let isFree (s: Step) = s = Step.Free inputs[k]

                        if Array.exists isFree steps then
                            Array.append (Array.filter (isFree >> not) steps) [| Step.Free inputs[k] |]
                        else
                            steps)
        | Step.Start _
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

/// Sums a sum again, into a new slot that all readers then read.
let private repeatReduction (plan: PlanSet) = seq {
    for (s, program: Program, _, step) as at in places plan do
        match step with
        | Step.Start(token, kind, group, _, outputs, path) when isSum kind && program.Phase.IsEpilogue ->
            let slots = plan.Stages[s].Slots
            let behind = 1 + (program.Steps |> Seq.findIndex (fun s -> s = Step.Wait token))

            for k in someOf outputs do
                let sum = outputs[k]

                let fresh = {
                    slots[sum] with
                        Id = slots.Count
                        Name = "again"
                }

                let changed =
                    edit plan $"reduce %i{k} again" at (fun steps ->
                        let tail =
                            steps[behind..]
                            |> Array.map (rename sum fresh.Id)
                            |> Array.map (fun s -> if s = Step.Free sum then Step.Free fresh.Id else s)

                        Array.concat [
                            steps[.. behind - 1]
                            [|
                                Step.Start(7777, Collective.AllReduceSum, group, [| sum |], [| fresh.Id |], path)
                                Step.Wait 7777
                                Step.Free sum
                            |]
                            tail
                        ])

                {
                    changed with
                        Plan =
                            withStage changed.Plan s (fun stage -> {
                                stage with
                                    Slots = Array.append (Array.ofSeq stage.Slots) [| fresh |]
                            })
                }
        | Step.Start _
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

/// Parameters that are not gathered, gathered twice, from another's shards, or from what was there before the update.
let private changeGather (plan: PlanSet) = seq {
    for (s, program: Program, i, step) as at in places plan do
        match step with
        | Step.Start(token, kind, group, inputs, outputs, path) when kind.IsAllGather && program.Phase.IsEpilogue ->
            let gather ins outs = Step.Start(token, kind, group, Array.ofSeq ins, Array.ofSeq outs, path)
            let last = inputs.Count - 1

            for k in 0 .. min 7 last do
                edit plan $"gather %i{k} left out" at (fun steps ->
                    Array.updateAt i (gather (Seq.removeAt k inputs) (Seq.removeAt k outputs)) steps)

                edit plan $"gather %i{k} is the next one's" at (fun steps ->
                    Array.updateAt i (gather (Seq.updateAt k inputs[(k + 1) % inputs.Count] inputs) outputs) steps)

                edit plan $"gather %i{k} fills the next" at (fun steps ->
                    Array.updateAt i (gather inputs (Seq.updateAt k outputs[(k + 1) % outputs.Count] outputs)) steps)

                let slots = plan.Stages[s].Slots

                for state in [ "m:"; "v:" ] do
                    match slots |> Seq.tryFind (fun o -> o.Name = state + slots[outputs[k]].Name) with
                    | Some moment ->
                        edit plan $"gather %i{k} takes %s{moment.Name}" at (fun steps ->
                            Array.updateAt i (gather (Seq.updateAt k moment.Id inputs) outputs) steps)
                    | None -> ()

            edit plan "gathers before everything" at (fun steps ->
                Array.append
                    [| step; Step.Wait token |]
                    (steps |> Array.removeAt i |> Array.filter ((<>) (Step.Wait token))))
        | Step.Start _
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

/// Updates beside remainders that read another value of the weight's shape, or a block of another parameter. None is harmless.
let changeWeight (plan: PlanSet) = seq {
    for (s, _, i, step) as at in places plan do
        match step with
        | Step.Launch(KernelId.AdamW, attributes, inputs, outputs, path) when inputs.Count = 5 ->
            let slots = plan.Stages[s].Slots
            let weight = slots[inputs[4]]

            for other in slots do
                if
                    other.Id <> weight.Id
                    && other.DType = weight.DType
                    && List.ofSeq other.Extents = List.ofSeq weight.Extents
                then
                    edit
                        plan
                        $"the weight becomes %%%i{other.Id} (%s{other.Name})"
                        at
                        (Array.updateAt
                            i
                            (Step.Launch(
                                KernelId.AdamW,
                                attributes,
                                Seq.updateAt 4 other.Id inputs |> Array.ofSeq,
                                outputs,
                                path
                            )))
        | Step.Launch(KernelId.LocalSlice, attributes, inputs, outputs, path) when path.StartsWith "optimizer." ->
            let slots = plan.Stages[s].Slots

            for other in slots do
                if
                    other.Id <> inputs[0]
                    && other.Kind.IsParameter
                    && List.ofSeq other.Extents = List.ofSeq slots[inputs[0]].Extents
                then
                    edit
                        plan
                        $"the block is of %s{other.Name}"
                        at
                        (Array.updateAt i (Step.Launch(KernelId.LocalSlice, attributes, [| other.Id |], outputs, path)))
        | Step.Launch _
        | Step.Start _
        | Step.Wait _
        | Step.Free _ -> ()
}

/// Bundles whose results change places, or that lose their last operand tuple.
let private unbundle (plan: PlanSet) = seq {
    for (s, _, i, step) as at in places plan do
        match step with
        | Step.Start(token, kind, group, inputs, outputs, path) when outputs.Count > 1 && kind.TakesTuples ->
            let bundle ins outs = Step.Start(token, kind, group, Array.ofSeq ins, Array.ofSeq outs, path)
            let slots = plan.Stages[s].Slots
            let extents id = List.ofSeq slots[id].Extents

            // of equal types a plan cannot tell which was meant
            if extents outputs[0] <> extents (Seq.last outputs) then
                edit plan "results in another order" at (Array.updateAt i (bundle inputs (Seq.rev outputs)))

            let left = outputs.Count - 1
            let arity = inputs.Count / outputs.Count

            edit plan "a tuple left out" at (fun steps ->
                steps
                |> Array.updateAt i (bundle (Seq.truncate (left * arity) inputs) (Seq.truncate left outputs))
                |> Array.filter (fun s -> s <> Step.Free outputs[left]))

            edit plan "an operand left out" at (Array.updateAt i (bundle (Seq.skip 1 inputs) outputs))

            if extents inputs[0] <> extents inputs[arity] then
                let swapped = Seq.append (Seq.skip arity inputs) (Seq.truncate arity inputs)
                edit plan "operands in another order" at (Array.updateAt i (bundle swapped outputs))
        | Step.Start _
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> ()
}

/// All classes by name.
/// Rows of one slot in other blocks than those of its row set.
let private changePadding (plan: PlanSet) = seq {
    for stage in plan.Stages do
        for slot in stage.Slots do
            for padding in [ 1; 2; 3; 4; 8 ] do
                if slot.Routed && slot.Padding <> padding then
                    {
                        Note =
                            $"stage %i{stage.Stage}, slot %%%i{slot.Id} (%s{slot.Name}): a padding of %i{padding} for %i{slot.Padding}"
                        Plan =
                            withStage plan stage.Stage (fun s -> {
                                s with
                                    Slots =
                                        s.Slots
                                        |> Seq.map (fun o ->
                                            if o.Id = slot.Id then { o with Padding = padding } else o)
                                        |> Array.ofSeq
                            })
                    }
}

/// The other code on a GPU, and a word that is none.
let private changePath plan = seq {
    for (_, _, i, step) as at in places plan do
        match step with
        | Step.Launch(kernel, attributes, inputs, outputs, path) when LibraryKernels.has kernel ->
            for word in [ "library"; "exact"; "fast" ] do
                let given = Array.ofSeq attributes |> Array.updateAt (attributes.Count - 1) (Attribute.Text word)

                if given[attributes.Count - 1] <> attributes[attributes.Count - 1] then
                    edit
                        plan
                        $"%O{kernel} by %s{word}"
                        at
                        (Array.updateAt i (Step.Launch(kernel, given, inputs, outputs, path)))
        | Step.Launch _
        | Step.Start _
        | Step.Wait _
        | Step.Free _ -> ()
}

let classes: (string * (PlanSet -> Mutant seq)) list = [
    "a step deleted", deleteStep
    "a step twice", duplicateStep
    "neighbours swapped", swapNeighbours
    "a wait dropped", dropWait
    "a free dropped", dropFree
    "a free too early", earlyFree
    "another group", changeGroup
    "another collective", changeKind
    "another output", retargetOutput
    "a timetable reordered", reorderTimetable
    "a message dropped", dropMessage
    "a message twice", duplicateMessage
    "another peer", changePeer
    "another layout declared", changeLayout
    "a zero or accumulate dropped", dropZero
    "a reduction dropped", dropReduction
    "a reduction repeated", repeatReduction
    "a bundle taken apart", unbundle
    "a gather changed", changeGather
    "other blocks of rows", changePadding
    "another path", changePath
]

/// `n` of a class, spread over all places.
let sample n (mutants: Mutant seq) : Mutant[] =
    let all = Array.ofSeq mutants

    if all.Length <= n then
        all
    else
        Array.init n (fun i -> all[int (int64 i * int64 all.Length / int64 n)])

/// Does every result lie across the mesh as its slot declares, given how the operands lie and what the op's axis signature says?
module DeepSeekGraph.Compiler.Checking.Layouts

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Compiler.Checking.Shapes
open DeepSeekGraph.Compiler.Checking.Collectives

let private typeOf (slot: SlotInfo) : TensorType = {
    TensorType.create slot.DType (Seq.zip slot.Axes slot.Extents) with
        Routed = slot.Routed
        Density = slot.Density
}

let private sameRows (a: TensorType) (b: TensorType) =
    a.Routed = b.Routed && (not a.Routed || abs (a.Density - b.Density) <= 1e-9)

let private isPartial (state: AxisState) = state.IsPartialSum || state.IsPartialMax

/// What the results of an op may be on one mesh axis, given its operands' states; empty when the operands do not go together.
let private explain (def: OpDef) (rule: Rule) (operands: AxisState[]) (results: int) : AxisState[] list =
    let blockOf (f: Factor) =
        let asked =
            Array.init operands.Length (fun i ->
                if f.Operands[i] < 0 then AxisState.Replicated else AxisState.Split f.Operands[i])

        if
            f.Mark = Mark.Whole
            || asked <> operands
            || Array.forall (fun (s: AxisState) -> s.IsReplicated) asked
        then
            None
        else
            Some(
                Array.init results (fun r ->
                    match f.Results[r], f.Mark with
                    | -1, Mark.Sum -> AxisState.PartialSum
                    | -1, Mark.Max -> AxisState.PartialMax
                    | -1, (Mark.Plain | Mark.Whole) -> AxisState.Replicated
                    | d, (Mark.Plain | Mark.Sum | Mark.Max | Mark.Whole) -> AxisState.Split d)
            )

    let partials = operands |> Array.indexed |> Array.filter (fun (_, s) -> s.IsPartialSum) |> Array.map fst
    let others = operands |> Array.filter (fun s -> not s.IsPartialSum)

    let through =
        match def.Linear with
        | Linearity.No -> false
        | Linearity.InEach able ->
            partials.Length = 1 && List.contains partials[0] able && others |> Array.forall _.IsReplicated
        | Linearity.Jointly -> partials.Length = operands.Length && partials.Length > 0
        | Linearity.JointlyInFirst n -> partials = [| 0 .. n - 1 |] && others |> Array.forall _.IsReplicated

    [
        if operands |> Array.forall _.IsReplicated then
            Array.create results AxisState.Replicated

        yield! rule.Factors |> Seq.choose blockOf

        if through then
            Array.create results AxisState.PartialSum
    ]

/// What is wrong with one step's types and layouts.
type private StepCheck(mesh: MeshInfo, slots: IReadOnlyList<SlotInfo>, report: string -> unit) =
    let states id = slots[id].Layout
    let axisName m = mesh.Axes[m].Name
    let name id = named slots id

    let arity (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) i o what =
        let fits = inputs.Count = i && outputs.Count = o

        if not fits then
            report $"%s{what} takes %i{i} inputs and %i{o} outputs, not %i{inputs.Count} and %i{outputs.Count}"

        fits

    let sameShape a b =
        Seq.forall2 (=) slots[a].Extents slots[b].Extents && slots[a].Extents.Count = slots[b].Extents.Count

    let sameLayout a b = Seq.forall2 (fun (x: AxisState) y -> x = y) (states a) (states b)
    let isWhole id = states id |> Seq.exists isPartial |> not

    let require ok message =
        if not ok then
            report message

    /// Iota, slices and constants say by attributes which block a rank makes.
    let special
        kernel
        (attributes: IReadOnlyList<Attribute>)
        (inputs: IReadOnlyList<int>)
        (outputs: IReadOnlyList<int>)
        : bool =
        let offsets i =
            match attributes[i] with
            | Attribute.Ints axes -> [ for a in axes -> int a ]
            | Attribute.Int _
            | Attribute.Float _
            | Attribute.Text _ -> [ -1 ]

        match kernel with
        | KernelId.Full ->
            require
                (isWhole outputs[0] || attributes[0] = Attribute.Float 0.0)
                $"%s{name outputs[0]} is partial: a constant would be summed over its ranks"

            true
        | KernelId.Iota ->
            require
                (isWhole outputs[0] && axesOn (states outputs[0]) 0 = offsets 0)
                $"%s{name outputs[0]} is split otherwise than the indices that iota writes"

            true
        | KernelId.LocalSlice ->
            let dim =
                match attributes[0] with
                | Attribute.Int d -> int d
                | Attribute.Ints _
                | Attribute.Float _
                | Attribute.Text _ -> -1

            let axes = offsets 1
            let from, into = inputs[0], outputs[0]

            if
                List.isEmpty axes
                || axes |> List.exists (fun m -> m < 0 || m >= mesh.Axes.Count)
                || List.sort axes <> List.distinct axes
            then
                report "it names mesh axes that the plan has not, or in a wrong order"
            else
                for m in 0 .. mesh.Axes.Count - 1 do
                    let expected = if List.contains m axes then AxisState.Split dim else (states from)[m]

                    if
                        (states into)[m] <> expected || List.contains m axes && (states from)[m] <> AxisState.Replicated
                    then
                        report
                            $"a slice over %s{axisName m} turns %s{name from} into one %s{stateName expected}; %s{name into} is %s{stateName (states into).[m]}"

                require
                    (isInner (states into) dim axes)
                    $"dim %i{dim} of %s{name into} is cut along an axis that is not the fastest"

                let places = slots[from].Extents |> Seq.tryItem dim |> Option.defaultValue 1

                require
                    (places % Mesh.extent mesh axes = 0)
                    $"dim %i{dim} of %s{name from} has %i{places} places, which do not fall into %i{Mesh.extent mesh axes} blocks"

                let extent d =
                    if d = dim then slots[from].Extents[d] / Mesh.extent mesh axes else slots[from].Extents[d]

                require
                    (slots[from].DType = slots[into].DType
                     && slots[from].Extents.Count = slots[into].Extents.Count
                     && [ 0 .. slots[into].Extents.Count - 1 ]
                        |> List.forall (fun d -> slots[into].Extents[d] = extent d))
                    $"%s{name into} is no block of %s{name from}"

            true
        | _ -> false

    /// Kernels with an op: infer types again, then explain every mesh axis.
    let launch
        kernel
        (attributes: IReadOnlyList<Attribute>)
        (inputs: IReadOnlyList<int>)
        (outputs: IReadOnlyList<int>)
        =
        let given = inputs |> Seq.map (fun i -> typeOf slots[i]) |> Array.ofSeq
        let made = outputs |> Seq.map (fun i -> typeOf slots[i]) |> Array.ofSeq
        let operands = KernelOps.operands kernel attributes given

        match KernelOps.toOp kernel attributes operands made with
        | Error text -> report text
        | Ok op ->
            let def = Catalog.define op

            let inferred =
                try
                    OpDef.infer def operands
                with
                | :? System.ArgumentException
                | :? System.IndexOutOfRangeException ->
                    Error $"it does not take %i{operands.Length} operands of these ranks"

            match inferred with
            | Error text -> report $"%s{def.Name}: %s{text}"
            | Ok(_, results) when results.Length <> made.Length ->
                report $"%s{def.Name} has %i{results.Length} results, not %i{made.Length}"
            | Ok(rule, results) ->
                let misfit =
                    Array.zip results made
                    |> Array.tryFindIndex (fun (r, m) ->
                        r.DType <> m.DType || r.Extents <> m.Extents || not (sameRows r m))

                match misfit with
                | Some i -> report $"%s{def.Name} makes %O{results[i]} but %s{name outputs[i]} is %O{made[i]}"
                | None ->
                    if not (special kernel attributes inputs outputs) then
                        for m in 0 .. mesh.Axes.Count - 1 do
                            let operands = inputs |> Seq.map (fun i -> (states i)[m]) |> Array.ofSeq
                            let declared = outputs |> Seq.map (fun i -> (states i)[m]) |> Array.ofSeq
                            let legal = explain def rule operands declared.Length
                            let list states = states |> Seq.map stateName |> String.concat ", "

                            if legal.IsEmpty then
                                report
                                    $"%s{def.Name}: over mesh axis %s{axisName m} its operands are (%s{list operands}), which do not go together"
                            elif not (List.contains declared legal) then
                                report
                                    $"%s{def.Name}: over mesh axis %s{axisName m} its operands are (%s{list operands}), so that its results are (%s{list legal.Head}), not (%s{list declared})"

    /// Kernels on the state of a step.
    let state kernel (attributes: IReadOnlyList<Attribute>) (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        let isFloats n = attributes.Count = n && attributes |> Seq.forall _.IsFloat

        let isScalar id =
            slots[id].Extents.Count = 0
            && slots[id].DType = DType.Float32
            && states id |> Seq.forall _.IsReplicated

        match kernel with
        | KernelId.Zero -> arity inputs outputs 0 1 "zero" |> ignore
        | KernelId.Accumulate ->
            if arity inputs outputs 1 1 "accumulate" then
                let from, into = inputs[0], outputs[0]
                // gradients may be summed in bf16; counters are exact
                let fits =
                    if not slots[from].DType.IsFloat then slots[into].DType = DType.Int64
                    elif slots[into].Kind.IsGradient then slots[into].DType.IsFloat
                    else slots[into].DType = DType.Float32

                require (fits && sameShape from into) $"%s{name from} does not fit into %s{name into}"

                require
                    (sameLayout from into)
                    $"%s{name from} lies otherwise than %s{name into}, into which it is summed"
        | KernelId.SumSquares ->
            if outputs.Count <> 1 || inputs.Count = 0 then
                report "sum_squares takes gradients and gives one sum"
            else
                for m in 0 .. mesh.Axes.Count - 1 do
                    let split id =
                        match (states id)[m] with
                        | AxisState.Split _ -> true
                        | AxisState.Replicated
                        | AxisState.PartialSum
                        | AxisState.PartialMax -> false

                    let expected = if split inputs[0] then AxisState.PartialSum else AxisState.Replicated

                    require
                        (inputs |> Seq.forall (fun i -> split i = split inputs[0]))
                        $"some gradients are split over %s{axisName m} and some are not"

                    require
                        ((states outputs[0])[m] = expected)
                        $"%s{name outputs[0]} must be %s{stateName expected} over %s{axisName m}"

                require (inputs |> Seq.forall isWhole) "a gradient is a partial sum"
                require (inputs |> Seq.forall (fun i -> slots[i].DType.IsFloat)) "a gradient is not of a floating type"

                require
                    (slots[outputs[0]].Extents.Count = 0 && slots[outputs[0]].DType = DType.Float32)
                    "the sum is one fp32 number"
        | KernelId.ClipScale ->
            if arity inputs outputs 1 2 "clip_scale" then
                require
                    (isFloats 1 && Seq.append inputs outputs |> Seq.forall isScalar)
                    "clip_scale takes and gives whole fp32 numbers"
        | KernelId.AdamW ->
            let isSplit = outputs.Count > 0 && slots[outputs[0]].DType = DType.Int16

            if arity inputs outputs (if isSplit then 5 else 4) 4 "adam_w" then
                let gradient, parameter = inputs[0], outputs[3]
                let weights = if isSplit then [ inputs[4]; parameter ] else []

                require
                    (isFloats 4 && [ 1..3 ] |> List.forall (fun i -> isScalar inputs[i]))
                    "adam_w takes four numbers as attributes and whole fp32 scale, lr, step"

                require (isWhole gradient) $"%s{name gradient} is still a partial sum"

                require
                    (isSplit || slots[outputs[0]].DType = DType.Float32)
                    $"the master %s{name outputs[0]} is neither of fp32 nor a remainder of i16"

                for id in weights do
                    require (slots[id].DType = DType.BFloat16) $"%s{name id}, which has a remainder, is not of bf16"

                for id in gradient :: List.ofSeq outputs @ weights do
                    require
                        (sameShape id parameter
                         && sameLayout id parameter
                         && (slots[id].DType.IsFloat || id = outputs[0]))
                        $"%s{name id} does not lie as %s{name parameter}"
        | KernelId.RouterBias ->
            if arity inputs outputs 1 1 "router_bias" then
                require (isFloats 1 && isWhole inputs[0]) $"%s{name inputs[0]} is still a partial sum"

                require
                    (sameShape inputs[0] outputs[0] && sameLayout inputs[0] outputs[0])
                    $"%s{name inputs[0]} does not lie as %s{name outputs[0]}"

                require
                    (slots[inputs[0]].DType = DType.Int64 && slots[outputs[0]].DType = DType.Float32)
                    "counts are i64, the bias fp32"
        | _ -> report "it is no kernel of a step"

    member _.Launch(kernel, attributes, inputs, outputs) =
        if KernelOps.isStepKernel kernel then
            state kernel attributes inputs outputs
        else
            launch kernel attributes inputs outputs

/// Types and layouts of every step.
let check (f: Findings) (plan: PlanSet) : unit =
    for stage in plan.Stages do
        for program in stage.Programs do
            program.Steps
            |> Seq.iteri (fun i step ->
                let report message = f.Add(Codes.PlanLayout, place stage.Stage program.Name i (pathOf step), message)

                match step with
                | Step.Launch(kernel, attributes, inputs, outputs, _) ->
                    StepCheck(plan.Mesh, stage.Slots, report).Launch(kernel, attributes, inputs, outputs)
                | Step.Start(_, kind, group, inputs, outputs, _) ->
                    Collectives.check plan.Mesh stage.Slots plan.Groups[group] kind inputs outputs report
                | Step.Wait _
                | Step.Free _ -> ())

/// Types and layouts of every node of one rank's graph, by the same rules: each value is a slot of its own.
let checkGraph (mesh: MeshInfo) (p: Partitioned) : Diagnostic list =
    let graph = p.Graph
    let found = List<Diagnostic>()

    let report path message =
        found.Add {
            Code = Codes.PlanLayout
            At = path
            Message = message
            Help = ""
        }

    let isLayout (v: int) (layout: Layout) =
        let rank = graph.Types[v].Rank

        layout.Length = mesh.Axes.Count
        && layout
           |> Array.forall (fun state ->
               match state with
               | AxisState.Split d -> d >= 0 && d < rank
               | AxisState.Replicated
               | AxisState.PartialSum
               | AxisState.PartialMax -> true)

    if p.Layouts.Length <> graph.Types.Length then
        report "graph" $"%i{graph.Types.Length} values have %i{p.Layouts.Length} layouts"

    for v in 0 .. min p.Layouts.Length graph.Types.Length - 1 do
        if not (isLayout v p.Layouts[v]) then
            report (graph.NodeOf v).Origin.Path $"%%%i{v}, %O{graph.Types[v]}, has a layout that names no dim of it"

    if found.Count = 0 then
        let slots = graph.Types |> Array.mapi (fun v t -> Layout.slot v $"%%%i{v}" SlotKind.Temporary t p.Layouts[v])

        for node in graph.Nodes do
            let report = report node.Origin.Path

            match node.Op with
            | Op.Collective(kind, axes, _) ->
                let group = {
                    Id = 0
                    Name = ""
                    MeshAxes = Array.ofList (List.sort axes)
                    Stages = [||]
                }

                Collectives.check mesh slots group kind node.Inputs node.Outputs report
            | op ->
                let types values = values |> Array.map (fun v -> graph.Types[v])

                match KernelOps.ofOp AttentionBackend.Auto op (types node.Inputs) (types node.Outputs) with
                | Some(kernel, attributes) ->
                    StepCheck(mesh, slots, report).Launch(kernel, Array.ofList attributes, node.Inputs, node.Outputs)
                | None ->
                    // sources lie as they like; other names of a value lie as it does
                    for v in node.Inputs do
                        if p.Layouts[v] <> p.Layouts[node.Outputs[0]] then
                            report $"%%%i{node.Outputs[0]} is another name of %%%i{v} but lies otherwise"

    List.ofSeq found

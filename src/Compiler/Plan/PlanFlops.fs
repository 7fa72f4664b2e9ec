/// Floating-point operations of a plan, counted from its own launches.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open DeepSeekGraph

/// What all ranks compute with one kernel at one place of the model in a step.
type FlopsLine = {
    /// As plans print it: contract, attention, rms_norm, ...
    Kernel: string
    /// Module path of the launch.
    Path: string
    /// Last part of the name of the parameter that is read or whose gradient is made, such as "o_proj"; empty where there is none.
    Parameter: string
    /// F, I, W, prologue or epilogue.
    Phase: string
    Flops: float
}

[<RequireQualifiedAccess>]
module PlanNames =
    /// A kernel as plans print it: rms_norm, rope_q.
    let kernel (kernel: KernelId) : string =
        let name = string kernel
        let out = System.Text.StringBuilder()

        for i in 0 .. name.Length - 1 do
            if i > 0 && System.Char.IsAsciiLetterUpper name[i] then
                out.Append '_' |> ignore

            out.Append(System.Char.ToLowerInvariant name[i]) |> ignore

        out.ToString()

    /// A parameter's name as of its module: model.layers.3.mlp.gate_up_proj.weight is of model.layers.3.mlp.gate_up_proj.
    let ofWeight (name: string) : string =
        if name.EndsWith(".weight", System.StringComparison.Ordinal) then
            name.Substring(0, name.Length - ".weight".Length)
        else
            name

[<RequireQualifiedAccess>]
module PlanFlops =
    let private typeOf (slot: SlotInfo) : TensorType = {
        TensorType.create slot.DType (Seq.zip slot.Axes slot.Extents) with
            Routed = slot.Routed
            Density = slot.Density
    }

    let private stored (slot: SlotInfo) = slot.Density * (slot.Extents |> Seq.fold (fun n e -> n * float e) 1.0)

    /// Operations of one launch on one rank: the op's own count; kernels on the state of a step: one for each element and operand.
    let ofLaunch
        (slots: IReadOnlyList<SlotInfo>)
        (kernel: KernelId)
        (attributes: IReadOnlyList<Attribute>)
        (inputs: IReadOnlyList<int>)
        (outputs: IReadOnlyList<int>)
        : float =

        if KernelOps.isStepKernel kernel then
            match kernel with
            | KernelId.Zero -> 0.0
            // moments, bias corrections, decay and the step: the elementwise operations of AdamW
            | KernelId.AdamW -> 12.0 * stored slots[inputs[0]]
            | KernelId.SumSquares -> 2.0 * (inputs |> Seq.sumBy (fun i -> stored slots[i]))
            | _other -> inputs |> Seq.sumBy (fun i -> stored slots[i])
        else
            let given = inputs |> Seq.map (fun i -> typeOf slots[i]) |> Array.ofSeq
            let made = outputs |> Seq.map (fun i -> typeOf slots[i]) |> Array.ofSeq
            let operands = KernelOps.operands kernel attributes given

            match KernelOps.toOp kernel attributes operands made with
            | Ok op -> (Catalog.define op).Flops operands made
            | Error text -> invalidOp text

    let private moduleOf (name: string) =
        let name = if name.StartsWith "grad:" then name.Substring 5 else name

        let name =
            if name.EndsWith(".weight", System.StringComparison.Ordinal) then
                name.Substring(0, name.Length - 7)
            else
                name

        name.Substring(name.LastIndexOf '.' + 1)

    /// Parameter that a launch reads, or whose gradient its result is added to.
    let private parameterOf (stage: StagePlan) (sums: Dictionary<int, int>) (inputs: int seq) (outputs: int seq) =
        let read = inputs |> Seq.tryFind (fun i -> stage.Slots[i].Kind.IsParameter && stage.Slots[i].Extents.Count > 1)

        match read with
        | Some slot -> moduleOf stage.Slots[slot].Name
        | None ->
            outputs
            |> Seq.tryPick (fun o ->
                match sums.TryGetValue o with
                | true, gradient -> Some(moduleOf stage.Slots[gradient].Name)
                | false, _ -> None)
            |> Option.defaultValue ""

    /// Operations of a step over all ranks, summed by kernel, place and phase, in the order of first launch.
    let lines (plan: PlanSet) : IReadOnlyList<FlopsLine> =
        let ranks = plan.Mesh.Axes |> Seq.fold (fun n a -> n * float a.Size) 1.0
        let order = List<struct (string * string * string * string)>()
        let sums = Dictionary<struct (string * string * string * string), float>()

        for stage in plan.Stages do
            let gradients = Dictionary<int, int>()

            for program in stage.Programs do
                for step in program.Steps do
                    match step with
                    | Step.Launch(KernelId.Accumulate, _, inputs, outputs, _) -> gradients[inputs[0]] <- outputs[0]
                    | Step.Launch _
                    | Step.Start _
                    | Step.Wait _
                    | Step.Free _ -> ()

            for program in stage.Programs do
                let runs =
                    stage.Timetable
                    |> Seq.filter (fun a -> a.Phase = program.Phase && a.Chunk = program.Chunk)
                    |> Seq.length

                for step in program.Steps do
                    match step with
                    | Step.Launch(kernel, attributes, inputs, outputs, path) ->
                        let flops = ofLaunch stage.Slots kernel attributes inputs outputs * float runs * ranks

                        if flops > 0.0 then
                            let parameter = parameterOf stage gradients inputs outputs
                            let key = struct (PlanNames.kernel kernel, path, parameter, program.Phase.Word)

                            match sums.TryGetValue key with
                            | true, sum -> sums[key] <- sum + flops
                            | false, _ ->
                                order.Add key
                                sums[key] <- flops
                    | Step.Start _
                    | Step.Wait _
                    | Step.Free _ -> ()

        [|
            for struct (kernel, path, parameter, phase) as key in order ->
                {
                    Kernel = kernel
                    Path = path
                    Parameter = parameter
                    Phase = phase
                    Flops = sums[key]
                }
        |]
        :> IReadOnlyList<FlopsLine>

/// Matrix products of a plan: of which weight, in which direction, and which operands are rounded to fp8 in which blocks.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open DeepSeekGraph

/// What a product multiplies.
type ProductOperand = {
    DType: DType
    Axes: IReadOnlyList<string>
    /// Extents of the blocks that were rounded to E4M3, one for each axis; empty when it was not rounded.
    Blocks: IReadOnlyList<int>
}

/// One launch that multiplies matrices.
type Product = {
    Stage: int
    Program: string
    Path: string
    Kernel: KernelId
    /// Path of the weight that is multiplied by, or whose gradient is made; of the module where there is none.
    Weight: string
    /// forward, input gradient, weight gradient; gradients where one kernel makes all.
    Direction: string
    Operands: IReadOnlyList<ProductOperand>
} with

    /// Are both operands fp8?
    member this.IsFp8 = this.Operands |> Seq.forall (fun f -> f.Blocks.Count > 0)

/// Values of a stage that steps hand on as they are, rounded, in parts or summed: back to a parameter, on to a gradient.
[<Sealed>]
type internal Chains(stage: StagePlan) =
    let from, onto = Dictionary<int, int>(), Dictionary<int, int>()
    let rounded = Dictionary<int, int[]>()

    let hand (input: int) (output: int) =
        from.TryAdd(output, input) |> ignore
        onto.TryAdd(input, output) |> ignore

    do
        for program in stage.Programs do
            for step in program.Steps do
                match step with
                | Step.Launch(KernelId.Fp8Quantize, attributes, inputs, outputs, _) ->
                    match attributes[0] with
                    | Attribute.Ints blocks -> rounded[outputs[0]] <- [| for n in blocks -> int32 n |]
                    | Attribute.Int _
                    | Attribute.Float _
                    | Attribute.Text _ -> ()

                    from.TryAdd(outputs[0], inputs[0]) |> ignore
                | Step.Launch((KernelId.Cast | KernelId.LocalSlice), _, inputs, outputs, _) -> hand inputs[0] outputs[0]
                | Step.Launch((KernelId.Add | KernelId.Accumulate), _, inputs, outputs, _) ->
                    for input in inputs do
                        onto.TryAdd(input, outputs[0]) |> ignore
                | Step.Start(_, kind, _, inputs, outputs, _) when kind.TakesTuples ->
                    for i in 0 .. outputs.Count - 1 do
                        hand inputs[i * (inputs.Count / outputs.Count)] outputs[i]
                | Step.Launch _
                | Step.Start _
                | Step.Wait _
                | Step.Free _ -> ()

    /// The parameter that a value is a copy of, if it is one.
    member this.Parameter(slot: int) : string option =
        if stage.Slots[slot].Kind.IsParameter then
            Some stage.Slots[slot].Name
        else
            match from.TryGetValue slot with
            | true, source -> this.Parameter source
            | false, _ -> None

    /// Blocks of the last rounding.
    member this.Blocks(slot: int) : int[] =
        match rounded.TryGetValue slot, from.TryGetValue slot with
        | (true, blocks), _ -> blocks
        | _, (true, source) -> this.Blocks source
        | _ -> [||]

    /// The parameter whose gradient a value is added to.
    member _.Gradient(slot: int) : string option =
        let rec follow at (left: int) =
            if stage.Slots[at].Kind.IsGradient then
                Some(stage.Slots[at].Name.Substring "grad:".Length)
            elif left = 0 then
                None
            else
                match onto.TryGetValue at with
                | true, next -> follow next (left - 1)
                | false, _ -> None

        follow slot 8

[<RequireQualifiedAccess>]
module PlanProducts =
    /// Which operands are factors, of the kernels that multiply.
    let private factorsOf (kernel: KernelId) =
        match kernel with
        | KernelId.Contract
        | KernelId.GroupedMatMul
        | KernelId.GroupedWeightGrad
        | KernelId.LinearLogSumExp
        | KernelId.LinearLogSumExpGrad
        | KernelId.LinearCrossEntropy
        | KernelId.LinearCrossEntropyGrad -> [ 0; 1 ]
        // queries, keys, values
        | KernelId.Attention -> [ 0; 1; 2 ]
        | KernelId.AttentionGrad -> [ 1; 2; 3 ]
        | _other -> []

    /// A weight is [out, in]: forward products sum over its last axis.
    let private direction kernel (attributes: IReadOnlyList<Attribute>) (weight: int option) =
        match kernel, List.ofSeq attributes, weight with
        | KernelId.GroupedMatMul, Attribute.Int 0L :: _, _ -> "forward"
        | KernelId.GroupedMatMul, _, _ -> "input gradient"
        | KernelId.Contract, [ Attribute.Text spec ], Some i ->
            let letters = (Axes.parse spec).Operands[i]
            if letters[letters.Length - 1].Mark = Mark.Sum then "forward" else "input gradient"
        | (KernelId.LinearLogSumExp | KernelId.LinearCrossEntropy | KernelId.Attention), _, _ -> "forward"
        | (KernelId.LinearLogSumExpGrad | KernelId.LinearCrossEntropyGrad | KernelId.AttentionGrad), _, _ -> "gradients"
        | _other -> "weight gradient"

    /// Every product, stage by stage in program order.
    let list (plan: PlanSet) : IReadOnlyList<Product> =
        [|
            for stage in plan.Stages do
                let chains = Chains stage

                for program in stage.Programs do
                    for step in program.Steps do
                        match step with
                        | Step.Launch(kernel, attributes, inputs, outputs, path) when
                            not (factorsOf kernel).IsEmpty && not program.Phase.IsEpilogue
                            ->
                            let factors = [ for i in factorsOf kernel -> inputs[i] ]
                            let weight = factors |> List.tryFindIndex (fun slot -> (chains.Parameter slot).IsSome)

                            let name =
                                weight
                                |> Option.bind (fun i -> chains.Parameter factors[i])
                                |> Option.orElse (Seq.tryPick chains.Gradient outputs)

                            {
                                Stage = stage.Stage
                                Program = program.Name
                                Path = path
                                Kernel = kernel
                                Weight = name |> Option.map PlanNames.ofWeight |> Option.defaultValue path
                                Direction = direction kernel attributes weight
                                Operands = [|
                                    for slot in factors ->
                                        {
                                            DType = stage.Slots[slot].DType
                                            Axes = stage.Slots[slot].Axes
                                            Blocks = chains.Blocks slot
                                        }
                                |]
                            }
                        | Step.Launch _
                        | Step.Start _
                        | Step.Wait _
                        | Step.Free _ -> ()
        |]
        :> IReadOnlyList<Product>

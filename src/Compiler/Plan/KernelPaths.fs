/// Which code a GPU runs where it has two: a function of the recipe, element types and local extents.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.KernelPaths

open System.Collections.Generic
open DeepSeekGraph

let private operand (t: TensorType) : OperandType = { DType = t.DType; Extents = t.Extents }

/// The library wherever it takes the operands, as it is many times faster; our own code elsewhere, and where the recipe asks for
/// exact attention. Grouped products have no setting: by the library too they are summed in a fixed order.
let choose
    (attention: AttentionBackend)
    (kernel: KernelId)
    (inputs: TensorType[])
    (outputs: TensorType[])
    : KernelPath =
    let isAttention = kernel = KernelId.Attention || kernel = KernelId.AttentionGrad

    if isAttention && attention.IsExact then
        KernelPath.Exact
    elif LibraryKernels.refusal kernel (Array.map operand inputs) (Array.map operand outputs) = "" then
        KernelPath.Library
    else
        KernelPath.Exact

/// The path that a launch carries: its last attribute; none where the kernel has no choice.
let ofLaunch (kernel: KernelId) (attributes: IReadOnlyList<Attribute>) : KernelPath option =
    match LibraryKernels.has kernel, Seq.tryLast attributes with
    | true, Some(Attribute.Text word) ->
        match KernelPath.TryParse word with
        | true, path -> Some path
        | false, _ -> None
    | _noWord -> None

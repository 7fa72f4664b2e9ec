/// Which code a GPU runs where a kernel has two, the library's or our own, and what the library takes.
namespace DeepSeekGraph

open System.Collections.Generic
open System.Runtime.InteropServices

/// Which code a GPU runs for a launch: the launch's last attribute, as a word. The plan is the same on every machine; a processor has
/// one implementation for both.
[<RequireQualifiedAccess>]
type KernelPath =
    /// cuDNN's attention, LibTorch's `_grouped_mm`: tensor cores, 16-bit operands. Attention's gradients are summed in no fixed order.
    | Library
    /// Our own: fp32 inside, every sum in a fixed order, whatever the element types and extents.
    | Exact

    /// As plans write it.
    member this.Name =
        match this with
        | Library -> "library"
        | Exact -> "exact"

    static member All = [| Library; Exact |]

    /// The path of this name; false when there is none.
    static member TryParse(name: string, [<Out>] found: byref<KernelPath>) : bool =
        match Array.tryFind (fun (path: KernelPath) -> path.Name = name) KernelPath.All with
        | Some path ->
            found <- path
            true
        | None -> false

/// Element type and local extents of an operand or a result.
[<Struct>]
type OperandType = {
    DType: DType
    Extents: IReadOnlyList<int>
} with

    /// What a slot holds.
    static member Of(slot: SlotInfo) = {
        DType = slot.DType
        Extents = slot.Extents
    }

/// What the library takes; our own code takes everything. The compiler decides by it, the check holds plans to it.
[<RequireQualifiedAccess>]
module LibraryKernels =
    /// The first element type that is none of 16 bits.
    let private wide (values: OperandType seq) =
        values |> Seq.tryFind (fun v -> v.DType <> DType.BFloat16) |> Option.map (fun v -> v.DType.Name)

    /// cuDNN's causal attention on Hopper: 16 bits, and heads and sequences that it has kernels for. Its mask pairs query i with keys
    /// 0 to i, so that it has no place for positions. `first`: where queries, keys and values stand among the operands.
    let private attention first positions (inputs: IReadOnlyList<OperandType>) =
        let extent i dim = inputs[first + i].Extents[dim]
        let queries, keys, features, values = extent 0 1, extent 1 1, extent 0 3, extent 2 3

        match wide (Seq.truncate (first + 3) inputs) with
        | Some dtype -> dtype
        | None when inputs.Count > positions -> "positions of queries"
        | None when features < 64 || features > 192 || features % 8 <> 0 -> $"heads of %i{features} features"
        | None when values < 64 || values > 128 || values % 8 <> 0 -> $"values of %i{values} features"
        | None when queries < 64 -> $"%i{queries} queries"
        | None when queries <> keys -> $"%i{queries} queries of %i{keys} keys"
        | None -> ""

    /// Features of a row: everything behind batch, seq and expert.
    let private features (rows: OperandType) = rows.Extents |> Seq.skip 3 |> Seq.fold (*) 1

    /// 16-bit rows that begin at multiples of 16 bytes.
    let private grouped (first: OperandType) (second: OperandType) (values: OperandType seq) =
        match wide values, [ features first; features second ] |> List.tryFind (fun n -> n % 8 <> 0) with
        | Some dtype, _ -> dtype
        | None, Some n -> $"rows of %i{n} features"
        | None, None -> ""

    /// Does a GPU have two codes for this kernel, so that its launches carry a path?
    let has (kernel: KernelId) : bool =
        kernel = KernelId.Attention
        || kernel = KernelId.AttentionGrad
        || kernel = KernelId.GroupedMatMul
        || kernel = KernelId.GroupedWeightGrad

    /// Why the library does not compute such a launch, in a few words ("fp32", "heads of 32 features"); empty where it does.
    let refusal (kernel: KernelId) (inputs: IReadOnlyList<OperandType>) (outputs: IReadOnlyList<OperandType>) : string =
        if kernel = KernelId.Attention then
            attention 0 3 inputs
        elif kernel = KernelId.AttentionGrad then
            attention 1 6 inputs
        elif kernel = KernelId.GroupedMatMul then
            grouped inputs[0] outputs[0] [ inputs[0]; inputs[1]; outputs[0] ]
        elif kernel = KernelId.GroupedWeightGrad then
            grouped inputs[0] inputs[1] [ inputs[0]; inputs[1]; outputs[0] ]
        else
            "no kernel of the library"

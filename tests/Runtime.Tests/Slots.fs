/// Slots, kernels and comparisons for the tests of the runtime.
module DeepSeekGraph.Runtime.Tests.Slots

open System
open System.Collections.Generic
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime.Cuda
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Native

let info name kind dtype routed (extents: int seq) : SlotInfo = {
    Id = 0
    Name = name
    Kind = kind
    DType = dtype
    Axes = [| for i in 0 .. Seq.length extents - 1 -> $"d%i{i}" |]
    Extents = Array.ofSeq extents
    Routed = routed
    Density = 1.0
    Padding = 1
    Layout = [||]
}

/// Where kernels are tested: DSG_TEST_DEVICE=cuda runs the same tests on a GPU.
let device =
    lazy
        (if Environment.GetEnvironmentVariable "DSG_TEST_DEVICE" = "cuda" then
             RankDevice.Cuda 0
         else
             RankDevice.Cpu)

/// Ends a test that looks at what a GPU keeps to itself, where kernels are tested on one.
let onHostOnly () =
    if device.Value.IsCuda then
        skiptest "looks at row sets or memory of the processor"

let private placed (slot: SlotInfo) =
    let device = device.Value
    LibTorch.Load()
    new SlotValue(slot, null, device.Torch)

/// An empty slot.
let slot dtype (extents: int seq) = placed (info "out" SlotKind.Temporary dtype false extents)

/// An empty slot of routed rows; extents are batch, seq, expert and the rest.
let rowSlot dtype (extents: int seq) = placed (info "rows" SlotKind.Temporary dtype true extents)

/// An empty slot of routed rows in blocks of multiples of `padding`.
let blockSlot padding dtype (extents: int seq) =
    placed {
        info "blocks" SlotKind.Temporary dtype true extents with
            Padding = padding
    }

let private put (values: float[]) (value: SlotValue) (tensor: torch.Tensor) =
    use source = torch.tensor (values |> Array.map float32)
    use shaped = source.reshape tensor.shape
    tensor.copy_ shaped |> ignore
    value

/// A slot that holds these elements, rounded to its type.
let filled dtype (extents: int seq) (values: float[]) =
    let value = slot dtype extents
    put values value (value.Fill())

/// A routed slot that holds these rows.
let filledRows dtype (extents: int seq) rows (values: float[]) =
    let value = rowSlot dtype extents
    put values value (value.Fill rows)

let ids (extents: int seq) (values: int64[]) =
    let value = slot DType.Int64 extents
    use source = torch.tensor values
    use shaped = source.reshape [| for e in extents -> int64 e |]
    value.Fill().copy_ shaped |> ignore
    value

/// The elements as doubles.
let read (value: SlotValue) : float[] =
    use floats = value.Tensor.to_type torch.ScalarType.Float64
    // nobody may read the slot again: collected during the call above, it would free what native code reads
    System.GC.KeepAlive value
    use flat = floats.reshape -1L
    use host = flat.OnHost()
    host.data<float>().ToArray()

let alone = RankContext(0, 0, [||], [||])

/// Fills outputs that hold nothing yet with NaN, so that what a kernel leaves out shows.
let private poison (outputs: SlotValue list) =
    for output in outputs do
        if
            not output.IsSet
            && not output.Info.Routed
            && output.Info.DType.IsFloat
            && output.Info.Extents |> Seq.forall (fun e -> e > 0)
        then
            output.Fill().fill_(TorchSharp.Scalar.op_Implicit nan) |> ignore

let runAt rank kernel (attributes: Attribute list) (inputs: SlotValue list) (outputs: SlotValue list) =
    poison outputs
    KernelTable.Run(kernel, Array.ofList attributes, Array.ofList inputs, Array.ofList outputs, rank, device.Value)

let run kernel attributes inputs outputs = runAt alone kernel attributes inputs outputs

/// Runs a kernel with one output and reads it.
let apply kernel attributes inputs (output: SlotValue) =
    run kernel attributes inputs [ output ]
    read output

/// The path that every launch of a kernel with two can have.
let exact = Attribute.Text KernelPath.Exact.Name

/// The paths that a launch can have: exact, and library where it takes the operands. On the processor both are one implementation.
let pathsOf kernel (inputs: SlotValue list) (outputs: SlotValue list) : Attribute list =
    let types (values: SlotValue list) = [| for v in values -> OperandType.Of v.Info |]

    [
        exact
        if LibraryKernels.refusal kernel (types inputs) (types outputs) = "" then
            Attribute.Text KernelPath.Library.Name
    ]

let int (n: int) = Attribute.Int(int64 n)
let ints (values: int list) = Attribute.Ints [| for v in values -> int64 v |]

let random (seed: int) n =
    let source = Random seed
    Array.init n (fun _ -> 2.0 * source.NextDouble() - 1.0)

/// As the slot's type holds them.
let rounded dtype (values: float[]) = read (filled dtype [ values.Length ] values)

/// Relative to the largest element: 1e-5 in fp32, 2 % in bf16.
let tolerance (dtype: DType) = if dtype = DType.BFloat16 then 2e-2 else 1e-5

let close what dtype (actual: float[]) (expected: float[]) =
    Expect.equal actual.Length expected.Length $"%s{what}: elements"
    let scale = Array.fold (fun m x -> max m (abs x)) 1e-3 expected

    Array.iter2
        (fun a e ->
            if not (abs (a - e) <= tolerance dtype * scale) then
                failtest $"%s{what}: %g{a} instead of %g{e} (largest %g{scale})")
        actual
        expected

let dot (a: float[]) (b: float[]) = Array.fold2 (fun sum x y -> sum + x * y) 0.0 a b

let product (extents: int seq) = Seq.fold (*) 1 extents

/// A random mask [tokens, experts], `perToken` choices each; expert 1 and token 2 get nothing.
let randomMask seed tokens experts perToken =
    let source = Random seed

    Array.init (tokens * experts) (fun i ->
        let t, e = i / experts, i % experts

        if e = 1 || t = 2 then 0.0
        elif source.Next experts < perToken then 1.0
        else 0.0)

let maskSlot b s e (mask: float[]) = filled DType.Bool [ b; s; e ] mask

let routeOf b s e mask =
    let route = rowSlot DType.Bool [ b; s; e ]
    run KernelId.Route [] [ maskSlot b s e mask ] [ route ]
    route

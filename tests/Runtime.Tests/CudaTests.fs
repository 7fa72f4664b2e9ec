/// What of the CUDA backend needs no GPU: its table, its sources, how gradients count as zero, and what is said where there is none.
/// DSG_TEST_DEVICE=cuda runs the tests of kernels on a GPU.
module DeepSeekGraph.Runtime.Tests.CudaTests

open System
open System.Text.RegularExpressions
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Cuda
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Tests.Slots

let private f32 = DType.Float32

let private sources =
    testList "sources" [
        testCase "the table knows every kernel" (fun () ->
            for kernel in Enum.GetValues<KernelId>() do
                Expect.isTrue (CudaKernels.Table.ContainsKey kernel) $"%O{kernel}")

        testCase "each begins with one sentence, needs no header, and names its kernels once" (fun () ->
            let common = DeviceModule.Text "Gated" |> fun text -> text.Substring(0, text.IndexOf "#define FOR_EACH")
            let names = DeviceModule.Sources
            Expect.isGreaterThan names.Count 8 "sources are embedded"

            for name in names do
                let text = DeviceModule.Text name
                Expect.isFalse (text.Contains "#include") $"%s{name} needs a header"
                let own = text.Substring common.Length
                Expect.isTrue (Regex.IsMatch(own, @"\n// \S")) $"%s{name} begins with a comment"
                let kernels = [ for m in Regex.Matches(own, @"__global__ void (\w+)\(") -> m.Groups[1].Value ]
                Expect.equal kernels (List.distinct kernels) $"%s{name}")
    ]

let private gradient () =
    LibTorch.Load()
    new SlotValue(info "grad:w" SlotKind.Gradient f32 false [ 3 ])

let private valueOf once (values: float[]) =
    let value = new SlotValue(info "dw" SlotKind.Temporary f32 false [ 3 ], null, null, ReadOnce = once)

    use source = TorchSharp.torch.tensor (values |> Array.map float32)
    value.Fill().copy_ source |> ignore
    value

let private zeros =
    testList "a gradient that counts as zero" [
        testCase "is zero to whoever reads it" (fun () ->
            let slot = gradient ()
            slot.Fill().fill_(TorchSharp.Scalar.op_Implicit 7.0f) |> ignore
            slot.SetZero()
            Expect.equal (read slot) [| 0.0; 0.0; 0.0 |] "zero"
            slot.SetZero()
            slot.AdoptCopy((valueOf false [| 1.0; 2.0; 3.0 |]).Tensor)
            Expect.equal (read slot) [| 1.0; 2.0; 3.0 |] "overwritten")

        testCase "takes over the first sum if nobody reads that again, and only then" (fun () ->
            let slot = gradient ()
            let value = valueOf true [| 1.0; 2.0; 3.0 |]
            Expect.isFalse (slot.TakeFirst value) "it holds something else"
            slot.SetZero()
            Expect.isFalse (slot.TakeFirst(valueOf false [| 4.0; 4.0; 4.0 |])) "somebody else reads the value"
            Expect.isTrue (slot.TakeFirst value) "the first sum"
            Expect.equal (read slot) [| 1.0; 2.0; 3.0 |] "the value"
            Expect.isFalse (slot.TakeFirst(valueOf true [| 5.0; 5.0; 5.0 |])) "the second is added")

        testCase "says to the first sum that it must overwrite" (fun () ->
            let slot = gradient ()
            slot.SetZero()
            let mutable fresh = false
            slot.ToAddTo(&fresh) |> ignore
            Expect.isTrue fresh "the first"
            slot.ToAddTo(&fresh) |> ignore
            Expect.isFalse fresh "the second")

        testCase "a result takes over an operand that nobody else reads, which then holds nothing" (fun () ->
            let meter = MemoryMeter()

            let temporary name once =
                new SlotValue(info name SlotKind.Temporary f32 false [ 3 ], meter, null, ReadOnce = once)

            let from, into = temporary "q" true, temporary "rotated" false
            use source = TorchSharp.torch.tensor [| 1.0f; 2.0f; 3.0f |]
            from.Fill().copy_ source |> ignore
            Expect.isTrue (into.TakeOver from) "taken"
            Expect.isFalse from.IsSet "the operand holds nothing"
            Expect.equal meter.Live 12L "counted once"
            Expect.equal (read into) [| 1.0; 2.0; 3.0 |] "the elements"
            Expect.isFalse ((temporary "other" false).TakeOver into) "others read it")
    ]

let private missing =
    testCase "without a GPU one diagnostic says so"
    <| fun () ->
        if Driver.IsPresent then
            skiptest "there is a GPU"

        let said = Expect.throwsC (fun () -> RankDevice.Cuda 0 |> ignore) id
        Expect.stringContains said.Message Codes.CudaMissing "code"

/// Whether a GPU would run the library's code for this launch; nothing is run.
let private library kernel (path: string) (inputs: SlotValue list) (outputs: SlotValue list) =
    let attributes = [| Attribute.Float 0.1; Attribute.Text path |]
    let call = KernelCall(attributes, ReadOnlySpan(Array.ofList inputs), ReadOnlySpan(Array.ofList outputs), alone)
    CudaPath.IsLibrary(&call, kernel, 1)

let private paths =
    testList "paths" [
        testCase "what the plan says is run, whatever the operands would allow" (fun () ->
            let heads = [
                for features in [ 192; 192; 128 ] -> slot DType.BFloat16 [ 1; 64; 2; features ]
            ]

            let results = [ slot DType.BFloat16 [ 1; 64; 2; 128 ]; slot f32 [ 1; 2; 64 ] ]
            Expect.isTrue (library KernelId.Attention "library" heads results) "library"
            Expect.isFalse (library KernelId.Attention "exact" heads results) "exact")

        testCase "the library for what it does not take is an error, never our own code" (fun () ->
            let heads = [ for features in [ 6; 6; 4 ] -> slot DType.BFloat16 [ 1; 64; 2; features ] ]
            let results = [ slot DType.BFloat16 [ 1; 64; 2; 4 ]; slot f32 [ 1; 2; 64 ] ]
            Expect.isFalse (library KernelId.Attention "exact" heads results) "exact"

            let said = Expect.throwsC (fun () -> library KernelId.Attention "library" heads results |> ignore) id

            Expect.stringContains said.Message Codes.PlanPath "code"
            Expect.stringContains said.Message "heads of 6 features" "reason")

        testCase "a launch without a path is an error" (fun () ->
            for word in [ ""; "auto" ] do
                let said = Expect.throwsC (fun () -> library KernelId.Attention word [] [] |> ignore) id
                Expect.stringContains said.Message "library or exact" word)
    ]

let tests = testList "Cuda" [ sources; zeros; missing; paths ]

/// fp32 masters as a bf16 weight and a 16-bit remainder: recovered bit for bit, and where the weight is not the nearest even one.
module DeepSeekGraph.Runtime.Tests.MasterTests

open System
open Expecto
open Microsoft.FSharp.NativeInterop
open DeepSeekGraph
open DeepSeekGraph.Runtime.Checkpoints
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Runtime.Tests.Slots
open DeepSeekGraph.Runtime.Weights

#nowarn "9" // raw bits in and out of slots

let private bf16, f32, i16 = DType.BFloat16, DType.Float32, DType.Int16

/// A slot that holds these bit patterns.
let private ofBits<'a when 'a: unmanaged> dtype (bits: 'a[]) =
    let value = slot dtype [ bits.Length ]
    let target = Span<'a>(NativePtr.toVoidPtr (NativePtr.ofVoidPtr<'a>(value.Fill().Pointer())), bits.Length)
    bits.AsSpan().CopyTo target
    value

let private bitsOf<'a when 'a: unmanaged> (value: SlotValue) : 'a[] =
    let bits = Span<'a>(value.Tensor.Pointer(), Operators.int (value.Tensor.numel ())).ToArray()
    GC.KeepAlive value
    bits

let private isNaN (bits: uint32) = Single.IsNaN(BitConverter.UInt32BitsToSingle bits)

/// To nearest even, by torch.
let private nearestEven (masters: uint32[]) : uint16[] =
    use wide = ofBits f32 masters
    use narrow = slot bf16 [ masters.Length ]
    narrow.Fill().copy_ wide.Tensor |> ignore
    bitsOf narrow

/// One update of all elements; `kept` is the master, or the remainder beside `weight`.
let private update
    lr
    (grad: SlotValue)
    (weight: SlotValue option)
    (kept: SlotValue)
    (m: SlotValue)
    (v: SlotValue)
    param
    step
    =
    run
        KernelId.AdamW
        (List.map Attribute.Float [ 0.9; 0.95; 1e-8; 0.1 ])
        ([
            grad
            filled f32 [] [| 0.5 |]
            filled f32 [] [| lr |]
            filled f32 [] [| float step |]
         ]
         @ Option.toList weight)
        [ kept; m; v; param ]

let private zeros dtype n = filled dtype [ n ] (Array.zeroCreate n)

/// Masters whose halves are the kernel's, and masters again: an update of size zero leaves every bit.
let private through (masters: uint32[]) : uint16[] * int16[] =
    let n = masters.Length
    let m, v, param = zeros f32 n, zeros f32 n, slot bf16 [ n ]
    use kept = ofBits f32 masters
    update 0.0 (zeros f32 n) None kept m v param 1
    Expect.equal (bitsOf<uint32> kept) masters "an update of size zero changes no master"
    // the same with halves, made here by integers
    let remainders = masters |> Array.map (fun bits -> int16 (bits &&& 0xFFFFu))
    let weights = Array.map2 (fun bits (r: int16) -> uint16 ((bits - uint32 (int32 r)) >>> 16)) masters remainders
    use weight = ofBits bf16 weights
    use remainder = ofBits i16 remainders
    update 0.0 (zeros f32 n) (Some weight) remainder m v param 1
    Expect.equal (bitsOf<uint16> param) weights "weight"
    Expect.equal (bitsOf<int16> remainder) remainders "remainder"
    weights, remainders

/// Zeros, denormals, powers of two and their neighbours, odd and even, up to the largest; of both signs.
let private highs = [
    for sign in [ 0u; 0x8000u ] do
        for high in
            [
                0u
                1u
                2u
                0x007Fu
                0x0080u
                0x0081u
                0x3F7Fu
                0x3F80u
                0x3F81u
                0x4049u
                0x7F7Eu
                0x7F7Fu
            ] do
            sign ||| high
]

let private every = [|
    for high in highs do
        for low in 0u .. 0xFFFFu -> (high <<< 16) ||| low
|]

let private halves =
    testList "halves" [
        testCase "every low half of 24 high ones: the master comes back, and only ties differ from nearest even"
        <| fun () ->
            let weights, remainders = through every
            let even = nearestEven every
            let mutable ties = 0

            for i in 0 .. every.Length - 1 do
                let high, low = every[i] >>> 16, every[i] &&& 0xFFFFu

                if (uint32 weights[i] <<< 16) + uint32 (int32 remainders[i]) <> every[i] then
                    failtestf "%08x does not come back" every[i]

                if low = 0x8000u && high &&& 1u = 0u then
                    ties <- ties + 1
                    Expect.equal (uint32 even[i]) high "nearest even goes toward zero"
                    Expect.equal (uint32 weights[i]) (high + 1u) "the weight away from it"
                elif weights[i] <> even[i] then
                    failtestf "%08x has the weight %04x, nearest is %04x" every[i] weights[i] even[i]

            Expect.equal
                ties
                (highs |> List.filter (fun h -> h &&& 1u = 0u) |> List.length)
                "one a high half that is even"

        testCase "no form of 16 bits has nearest even and the master: 65,537 masters round to an even weight"
        <| fun () ->
            let masters = [| 0x3F7F_0000u .. 0x3F81_FFFFu |]
            let found = nearestEven masters |> Array.countBy id |> Map
            Expect.equal (found[0x3F80us], found[0x3F81us]) (65537, 65535) "masters of an even and of an odd weight"

        testCase "the weight is nearest: no bf16 number is nearer"
        <| fun () ->
            let weights, _ = through every
            let value (high: uint32) = float (BitConverter.UInt32BitsToSingle(high <<< 16))

            for i in 0 .. every.Length - 1 do
                let high = every[i] >>> 16
                let master = float (BitConverter.UInt32BitsToSingle every[i])
                let off w = abs (value w - master)
                let chosen = uint32 weights[i]

                // beyond the largest number lies infinity, which is no neighbour to measure
                if high &&& 0x7FFFu <> 0x7F7Fu && (off chosen > off high || off chosen > off (high + 1u)) then
                    failtestf "%08x has the weight %04x" every[i] chosen

        testCase "infinities keep their bits; a NaN stays one"
        <| fun () ->
            let n = 19
            let infinities = Array.init n (fun i -> if i % 2 = 0 then 0x7F80_0000u else 0xFF80_0000u)
            through infinities |> ignore
            let masters = Array.init n (fun i -> 0x7F80_0001u + uint32 i * 0x0007_1C71u)
            Expect.all masters isNaN "NaN"
            let weight, remainder = ofBits bf16 (Array.create n 0x7FC0us), zeros i16 n
            let gradient = ofBits f32 masters
            update 0.1 gradient (Some weight) remainder (zeros f32 n) (zeros f32 n) weight 1
            Expect.equal (bitsOf<uint16> weight) (Array.create n 0x7FC0us) "weight"
            Expect.equal (bitsOf<int16> remainder) (Array.zeroCreate n) "remainder"
    ]

/// Fifty steps on bf16 gradients, with a master and with halves: one trajectory.
let private trajectory inPlace =
    let place = if inPlace then "in place" else "of a shard"

    testCase $"50 updates %s{place}: the masters and moments of fp32 masters, bit for bit; weights differ at ties alone"
    <| fun () ->
        // a tail of less than a vector too
        let n = 60_003
        let start = random 1 n |> Array.map (fun x -> BitConverter.SingleToUInt32Bits(float32 (x * 0.02)))
        let weights, remainders = through start
        use master = ofBits f32 start
        use param = ofBits bf16 (nearestEven start)
        use weight = ofBits bf16 weights
        use remainder = ofBits i16 remainders
        let moments () = zeros bf16 n, zeros bf16 n
        let m, v = moments ()
        let m', v' = moments ()
        let mutable ties = 0

        for step in 1..50 do
            use gradient = filled bf16 [ n ] (random (step + 1) n)
            update 1e-3 gradient None master m v param step
            use fresh = slot bf16 [ n ]
            update 1e-3 gradient (Some weight) remainder m' v' (if inPlace then weight else fresh) step

            if not inPlace then
                weight.Tensor.copy_ fresh.Tensor |> ignore

            let masters, low = bitsOf<uint32> master, bitsOf<int16> remainder
            let wide, narrow = bitsOf<uint16> param, bitsOf<uint16> weight
            Expect.equal (bitsOf<uint16> m', bitsOf<uint16> v') (bitsOf<uint16> m, bitsOf<uint16> v) "moments"

            for i in 0 .. n - 1 do
                if (uint32 narrow[i] <<< 16) + uint32 (int32 low[i]) <> masters[i] then
                    failtestf "master %i of step %i" i step

                let isTie = masters[i] &&& 0x1FFFFu = 0x8000u

                if isTie then
                    ties <- ties + 1

                if narrow[i] <> wide[i] + (if isTie then 1us else 0us) then
                    failtestf "weight %i of step %i: %04x beside %04x of %08x" i step narrow[i] wide[i] masters[i]

        // one of 131,072 masters is a tie above an even number
        Expect.isTrue (ties > 3 && ties < 100) $"%i{ties} ties of 3,000,150"

let private refused =
    testCase "a remainder without its weight is refused"
    <| fun () ->
        let n = 8
        let kept () = zeros i16 n
        let call weight kept = update 0.1 (zeros f32 n) weight kept (zeros f32 n) (zeros f32 n) (zeros bf16 n) 1

        Expect.throwsT<InvalidOperationException> (fun () -> call None (kept ())) "no weight"
        Expect.throwsT<InvalidOperationException> (fun () -> call (Some(zeros bf16 (n + 1))) (kept ())) "another size"
        Expect.throwsT<InvalidOperationException> (fun () -> call None (zeros DType.Int64 n)) "another type"

/// A checkpoint of these tensors (name, kind, type, shape), in one file.
let private write (root: string) (tensors: (string * string * string * int list) list) =
    use claim = CheckpointRoot.Claim root
    use writer = CheckpointWriter.Create(root, 1L)

    let specs = [
        for name, _, dtype, shape in tensors -> SafeTensorSpec(name, dtype, [| for e in shape -> int64 e |])
    ]

    use file = writer.Begin(0, specs)

    for info in file.Tensors do
        file.Append(ReadOnlySpan(Array.zeroCreate<byte>(int32 info.Elements * SafeTensorTypes.BytesOf info.DType)))

    writer.Commit(
        CheckpointManifest(
            Version = 1,
            Step = 1L,
            Sequences = 1L,
            Seed = 1UL,
            Data = CheckpointData("bytes", 1000L, String('0', 32), 16),
            Recipe = [| "name=\"test\"" |],
            Training = [||],
            Files = [| file.Finish() |],
            Kept = [||],
            Tensors = [|
                for name, kind, dtype, shape in tensors |> List.sortBy (fun (name, _, _, _) -> name) ->
                    StoredTensor(name, kind, dtype, Array.ofList shape, Array.ofList shape, [| 0 |])
            |]
        ),
        0
    )

/// A plan whose states are one bf16 weight and what is kept of its master.
let private planOf (master: string) (dtype: DType) =
    let plan = TinyPlan.plan 1 1 1
    let stage = plan.Stages[0]

    let state name kind dtype = {
        info name kind dtype false [ 2; 3 ] with
            Layout = [||]
    }

    {
        plan with
            Stages = [|
                {
                    stage with
                        Slots = [|
                            state "w" SlotKind.Parameter bf16
                            state $"%s{master}w" SlotKind.Optimizer dtype
                        |]
                }
            |]
    }

let private unsound =
    testCase "a checkpoint whose remainder does not go with its weight is refused, by name and types"
    <| fun () ->
        let load plan tensors =
            inFolder (fun root ->
                write root tensors
                use checkpoint = CheckpointReader.Open root
                StateSources.Of(plan, checkpoint) |> ignore)

        let split, whole = planOf "remainder:" i16, planOf "master:" f32
        let weight dtype = "w", "parameter", dtype, [ 2; 3 ]
        let remainder dtype shape = "remainder:w", "optimizer", dtype, shape

        for plan in [ split; whole ] do
            load plan [ weight "BF16"; remainder "I16" [ 2; 3 ] ]

            for tensors, both in
                [
                    [ weight "F32"; remainder "I16" [ 2; 3 ] ], "F32 [2, 3] with a remainder of I16 [2, 3]"
                    [ weight "BF16"; remainder "F32" [ 2; 3 ] ], "BF16 [2, 3] with a remainder of F32 [2, 3]"
                    [ weight "BF16"; remainder "I16" [ 3; 2 ] ], "BF16 [2, 3] with a remainder of I16 [3, 2]"
                ] do
                let d = diagnosticOf (fun () -> load plan tensors)
                Expect.equal d.Code Codes.CheckpointMismatch "code"
                Expect.stringContains d.Message both "types and shapes"

let tests = testList "Masters" [ halves; trajectory true; trajectory false; refused; unsound ]

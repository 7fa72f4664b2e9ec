/// E4M3 and block scales against an oracle that knows the 256 codes and searches the nearest.
module DeepSeekGraph.Runtime.Tests.Fp8KernelTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Tests.Slots

/// What the 8 bits of a code mean: sign, 4 of exponent with bias 7, 3 of mantissa; all ones is NaN.
let private decode (code: int) =
    let sign = if code >= 128 then -1.0 else 1.0
    let exponent, mantissa = code / 8 % 16, code % 8

    if exponent = 15 && mantissa = 7 then nan
    elif exponent = 0 then sign * float mantissa / 8.0 * 2.0 ** -6.0
    else sign * (1.0 + float mantissa / 8.0) * 2.0 ** float (exponent - 7)

/// Codes of magnitudes, ascending: neighbours differ by one.
let private magnitudes = Array.init 127 decode

/// The nearest magnitude; of two that are equally near, that of the even code.
let private nearest (x: float) =
    if Double.IsNaN x then
        nan
    else
        let code = [ 0..126 ] |> List.minBy (fun c -> abs (magnitudes[c] - min (abs x) 448.0), c % 2)

        float (sign x) * magnitudes[code]

/// Blocks as the kernel's attribute says: rounded each with the scale of its largest element, all in fp32 but the search.
let private oracle (extents: int list) (blocks: int list) (x: float[]) =
    let strides = List.scanBack (*) extents.Tail 1
    let blockOf flat = List.map3 (fun s e b -> flat / s % e / b) strides extents blocks
    let members = [| 0 .. x.Length - 1 |] |> Array.groupBy blockOf
    let y = Array.zeroCreate x.Length

    for _, flats in members do
        let largest =
            flats
            |> Array.map (fun i -> abs x[i])
            |> Array.fold (fun a b -> if Double.IsNaN b then b else max a b) 0.0

        let scale = if Double.IsFinite largest then float32 largest / 448.0f else Single.NaN

        for i in flats do
            y[i] <-
                if scale = 0.0f then
                    0.0
                else
                    float (float32 (nearest (float (float32 x[i] / scale))) * scale)

    y

let private quantized dtype extents blocks x =
    let out = slot dtype extents
    apply KernelId.Fp8Quantize [ ints blocks ] [ filled dtype extents x ] out

let private round = [
    testCase "each of the 256 codes stays what it is" (fun () ->
        for code in 0..255 do
            let value = float32 (decode code)
            let rounded = E4M3.Round value

            if Single.IsNaN value then
                Expect.isTrue (Single.IsNaN rounded) $"code %i{code}"
            else
                Expect.equal rounded value $"code %i{code}")

    testCase "between two codes the nearer one, at the middle the even one" (fun () ->
        for code in 0..125 do
            let low, high = decode code, decode (code + 1)
            let middle = float32 ((low + high) / 2.0)
            let even = if code % 2 = 0 then low else high

            for sign in [ 1.0f; -1.0f ] do
                let check (x: float32) (expected: float) =
                    Expect.equal (E4M3.Round(sign * x)) (sign * float32 expected) $"%g{x} between %g{low} and %g{high}"

                check middle even
                check (MathF.BitDecrement middle) low
                check (MathF.BitIncrement middle) high
                check (float32 low + (middle - float32 low) / 2.0f) low)

    testCase "beyond the largest it saturates; NaN stays" (fun () ->
        for x in [ 448.0f; 449.0f; 464.0f; 480.0f; 1e30f; Single.PositiveInfinity ] do
            Expect.equal (E4M3.Round x) 448.0f $"%g{x}"
            Expect.equal (E4M3.Round -x) -448.0f $"-%g{x}"

        Expect.isTrue (Single.IsNaN(E4M3.Round Single.NaN)) "NaN")

    testCase "random values equal the search" (fun () ->
        for x in random 5 20000 do
            let x = float32 (x * 2.0 ** float (int64 (x * 1e6) % 20L - 10L))
            Expect.equal (float (E4M3.Round x)) (nearest (float x)) $"%g{x}")
]

let private kernel = [
    for dtype in [ DType.Float32; DType.BFloat16 ] do
        for extents, blocks in
            [
                [ 3; 5; 300 ], [ 1; 1; 128 ]
                [ 2; 300; 3 ], [ 1; 128; 1 ]
                [ 2; 130; 260 ], [ 1; 128; 128 ]
                [ 130; 3; 140 ], [ 128; 1; 128 ]
                [ 7 ], [ 128 ]
                [ 4; 6 ], [ 1; 1 ]
            ] do
            testCase $"blocks %A{blocks} of %A{extents}, %s{dtype.Name}, equal the oracle" (fun () ->
                let n = product extents
                let x = random 3 n |> Array.mapi (fun i v -> v * 10.0 ** float (i / 50 % 7 - 3)) |> rounded dtype
                Expect.equal (quantized dtype extents blocks x) (oracle extents blocks x |> rounded dtype) "bits")

    testCase "routed rows are tiled by their features" (fun () ->
        let rows, k = 5, 10
        let x = random 8 (rows * k) |> rounded DType.Float32
        let out = rowSlot DType.Float32 [ 1; 4; 2; k ]

        run KernelId.Fp8Quantize [ ints [ 1; 1; 1; 4 ] ] [ filledRows DType.Float32 [ 1; 4; 2; k ] rows x ] [ out ]
        Expect.equal (read out) (oracle [ rows; k ] [ 1; 4 ] x) "bits")

    testCase "zeros stay, NaN and infinity take their block and no other" (fun () ->
        let x =
            Array.concat [
                Array.zeroCreate 4
                [| 1.0; nan; 2.0; 3.0 |]
                [| 1.0; infinity; 0.0; -2.0 |]
                [| 1.0; 2.0; 3.0; 4.0 |]
            ]

        let y = quantized DType.Float32 [ 16 ] [ 4 ] x
        Expect.equal y[0..3] (Array.zeroCreate 4) "zeros"
        Expect.all y[4..11] Double.IsNaN "blocks with what is no number"
        Expect.equal y[12..15] (oracle [ 4 ] [ 4 ] x[12..15]) "the block behind")

    testCase "the largest of a block keeps its value; the error is at most 1/16, or half the smallest step" (fun () ->
        let n = 4096
        let x = random 9 n |> rounded DType.Float32
        let y = quantized DType.Float32 [ n ] [ 128 ] x

        for block in 0 .. n / 128 - 1 do
            let xs, ys = x[block * 128 .. block * 128 + 127], y[block * 128 .. block * 128 + 127]
            let largest = xs |> Array.map abs |> Array.max
            let at = xs |> Array.findIndex (fun v -> abs v = largest)
            Expect.floatClose Accuracy.high ys[at] xs[at] "the largest"

            Array.iter2
                (fun a b ->
                    let bound = max (abs a / 16.0) (largest / 448.0 * 2.0 ** -10.0)
                    Expect.isLessThanOrEqual (abs (a - b)) (bound * 1.00001) $"%g{a}")
                xs
                ys)

    testCase "values near the end of fp32 neither overflow nor become NaN" (fun () ->
        for scale in [ 3e38; 1e-37; 1e-44 ] do
            let x = [| scale; -scale / 3.0; 0.0; scale / 7.0 |] |> rounded DType.Float32
            let y = quantized DType.Float32 [ 4 ] [ 4 ] x
            Expect.all y Double.IsFinite $"%g{scale}")
]

let tests = testList "Fp8" [ testList "E4M3" round; testList "blocks" kernel ]

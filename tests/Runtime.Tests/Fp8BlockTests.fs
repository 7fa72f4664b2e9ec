/// fp8 weights in blocks: against a computation element by element, in float64, from the definition of E4M3.
module DeepSeekGraph.Runtime.Tests.Fp8BlockTests

open System
open Expecto
open FsCheck
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Testing

type private Type = torch.ScalarType

/// OCP E4M3: sign, 4 bits of exponent with bias 7, 3 of mantissa; all ones is NaN.
let private e4m3 (code: int) =
    let sign = if code >= 128 then -1.0 else 1.0
    let exponent, mantissa = (code >>> 3) &&& 15, code &&& 7

    if code &&& 127 = 127 then nan
    elif exponent = 0 then sign * float mantissa * Math.Pow(2.0, -9.0)
    else sign * (1.0 + float mantissa / 8.0) * Math.Pow(2.0, float (exponent - 7))

let private positive = [| 0..126 |]

/// By search: the nearest of all values, the even code of two, none beyond the largest.
let private nearest (value: float32) =
    let x = min 512.0 (abs (float value))
    let code = positive |> Array.minBy (fun code -> abs (e4m3 code - x), code % 2)
    byte (code + (if Single.IsNegative value then 128 else 0))

do LibTorch.Load()

let private matrix (rows: int64) (columns: int64) (values: float32[]) = torch.tensor(values).reshape(rows, columns)

let private fp8 (rows: int64) (columns: int64) (codes: byte[]) =
    let weight = torch.empty ([| rows; columns |], dtype = Nullable SafeTensorTypes.Float8E4M3)
    weight.bytes <- Span codes
    weight

let private floats (tensor: torch.Tensor) = tensor.to_type(Type.Float32).data<float32>().ToArray()

/// A random weight with ragged edges, and its scales.
let private sample seed rows columns =
    let random = Random seed
    let codes = Array.init (rows * columns) (fun _ -> byte (random.Next 127 + 128 * random.Next 2))
    let gridRows, gridColumns = (rows + 127) / 128, (columns + 127) / 128
    let scales = Array.init (gridRows * gridColumns) (fun _ -> float32 (Math.Exp(random.NextDouble() * 8.0 - 6.0)))
    codes, scales, gridColumns

/// The law itself: element times the scale of its block, rounded once.
let private expected (codes: byte[]) (scales: float32[]) gridColumns columns r c =
    float32 (e4m3 (int codes[r * columns + c])) * scales[r / 128 * gridColumns + c / 128]

let private bf16 (value: float32) =
    let bits = BitConverter.SingleToUInt32Bits value
    BitConverter.UInt32BitsToSingle((bits + 0x7FFFu + ((bits >>> 16) &&& 1u)) &&& 0xFFFF0000u)

let private codes =
    testList "E4M3" [
        test "all 256 codes decode by the definition, as LibTorch does" {
            let all = Array.init 256 byte
            use weight = fp8 1L 256L all
            let theirs = floats weight

            for code in 0..255 do
                let mine = Fp8Blocks.Decode(byte code)
                Expect.isTrue (mine.Equals(float32 (e4m3 code)) && mine.Equals theirs[code]) $"code %d{code}"

                if code &&& 127 <> 127 then
                    Expect.equal (Single.IsNegative mine) (code >= 128) "sign"
                    Expect.equal (Fp8Blocks.Encode mine) (byte code) "and back"
        }
        test "rounding is to the nearest, ties to even, beyond 448 to 448" {
            let random = Random 3

            let values = [
                for code in 0..125 do
                    let low, high = e4m3 code, e4m3 (code + 1)
                    let middle = float32 ((low + high) / 2.0)
                    yield! [ middle; MathF.BitIncrement middle; MathF.BitDecrement middle ]
                yield! [ 448f; 463.9f; 464f; 465f; 1e30f; Single.MaxValue; 1e-10f; Single.Epsilon; 0f ]
                for _ in 1..2000 -> float32 (Math.Exp(random.NextDouble() * 20.0 - 12.0))
            ]

            for value in values do
                Expect.equal (Fp8Blocks.Encode value) (nearest value) $"%g{value}"
                Expect.equal (Fp8Blocks.Encode -value) (nearest -value) $"-%g{value}"

            Expect.equal (Fp8Blocks.Encode infinityf) 0x7Euy "saturated"
            Expect.equal (Fp8Blocks.Encode nanf) 0x7Fuy "NaN"
        }
    ]

let private blocks =
    testList "Fp8Blocks" [
        testTheory "a weight comes to element times scale, also in part" [
            1, 1
            128, 128
            127, 129
            130, 260
            300, 513
        ]
        <| fun (rows, columns) ->
            let codes, scales, grid = sample (rows + columns) rows columns
            use weight = fp8 (int64 rows) (int64 columns) codes
            use scale = matrix (int64 scales.Length / int64 grid) (int64 grid) scales
            let value = expected codes scales grid columns
            use whole = Fp8Blocks.Dequantize(weight, scale, Type.Float32)

            Expect.sequenceEqual
                (floats whole)
                [|
                    for r in 0 .. rows - 1 do
                        for c in 0 .. columns - 1 -> value r c
                |]
                "fp32"

            use narrow = Fp8Blocks.Dequantize(weight, scale, Type.BFloat16)

            Expect.sequenceEqual
                (floats narrow)
                [|
                    for r in 0 .. rows - 1 do
                        for c in 0 .. columns - 1 -> bf16 (value r c)
                |]
                "bf16"

            let random = Random 5

            for _ in 1..20 do
                let r0, c0 = random.Next rows, random.Next columns
                let height, width = 1 + random.Next(rows - r0), 1 + random.Next(columns - c0)
                use part = torch.empty ([| int64 height; int64 width |], dtype = Nullable Type.Float32)
                Fp8Blocks.DequantizeInto(weight, scale, int64 r0, int64 c0, part)

                Expect.sequenceEqual
                    (floats part)
                    [|
                        for r in r0 .. r0 + height - 1 do
                            for c in c0 .. c0 + width - 1 -> value r c
                    |]
                    $"[%d{r0}, %d{c0}] on"

        test "NaN stays NaN, with its neighbours whole" {
            use weight = fp8 1L 9L [| 0x7Fuy; 0x38uy; 0xFFuy; 0uy; 0x80uy; 1uy; 0x7Euy; 0xFEuy; 0x7Fuy |]
            use scale = matrix 1L 1L [| 2f |]
            use value = Fp8Blocks.Dequantize(weight, scale, Type.Float32)

            for mine, wanted in Seq.zip (floats value) [ nanf; 2f; nanf; 0f; -0f; 2f / 512f; 896f; -896f; nanf ] do
                Expect.isTrue (mine.Equals wanted) $"%g{mine} for %g{wanted}"
        }
        Properties.property "what is quantised comes back within half a step, and then stays"
        <| fun (NonNegativeInt seed) ->
            let random = Random seed
            let rows, columns = 1 + random.Next 140, 1 + random.Next 140
            let size = Math.Pow(10.0, random.NextDouble() * 12.0 - 6.0)

            let values =
                Array.init (rows * columns) (fun _ -> float32 (size * Math.Pow(random.NextDouble() - 0.5, 3.0)))

            use source = matrix (int64 rows) (int64 columns) values
            use quantised = Fp8Blocks.Quantize source
            let weight, scales = quantised.Weight, quantised.Scales
            use back = Fp8Blocks.Dequantize(weight, scales, Type.Float32)
            let back, codes, scale = floats back, weight.bytes.ToArray(), floats scales
            let grid = (columns + 127) / 128

            let mutable worst = 0.0

            for i in 0 .. values.Length - 1 do
                let s = scale[i / columns / 128 * grid + i % columns / 128]
                let error = abs (float back[i] - float values[i])
                // half a step: 2^-4 of a value, or 2^-10 where steps are 2^-9
                worst <- max worst (error / max (abs (float values[i]) / 16.0) (float s / 1024.0))

                if i % 97 = 0 then
                    Expect.equal codes[i] (nearest (values[i] / s)) "the nearest code"

            Expect.isLessThan worst 1.00001 "within half a step"

            for block in 0 .. scale.Length - 1 do
                let r0, c0 = block / grid * 128, block % grid * 128

                let most =
                    Seq.max [
                        for r in r0 .. min rows (r0 + 128) - 1 do
                            for c in c0 .. min columns (c0 + 128) - 1 -> abs values[r * columns + c]
                    ]

                Expect.equal scale[block] (if most = 0f then 1f else most / 448f) "scale"

            use again = matrix (int64 rows) (int64 columns) back
            use second = Fp8Blocks.Quantize again
            Expect.sequenceEqual (second.Weight.bytes.ToArray()) codes "the same codes"

        test "zeros have scale 1, also as bf16" {
            use zeros = torch.zeros ([| 130L; 3L |], dtype = Nullable Type.BFloat16)
            use quantised = Fp8Blocks.Quantize zeros
            Expect.sequenceEqual (floats quantised.Scales) [ 1f; 1f ] "scales"
            Expect.isTrue (quantised.Weight.bytes.ToArray() |> Array.forall ((=) 0uy)) "codes"
        }
        test "parts that do not fit are told" {
            let fails (action: unit -> unit) = Expect.equal (diagnosticOf action).Code Codes.Fp8Blocks "code"
            use weight = fp8 130L 3L (Array.zeroCreate 390)
            use right = torch.ones ([| 2L; 1L |])
            use wrong = torch.ones ([| 1L; 2L |])
            use flat = torch.ones ([| 2L |])
            use wide = torch.ones ([| 2L; 1L |], dtype = Nullable Type.Float64)

            for scales in [ wrong; flat; wide ] do
                fails (fun () -> Fp8Blocks.Dequantize(weight, scales, Type.Float32, "w").Dispose())

            fails (fun () -> Fp8Blocks.Dequantize(right, right, Type.Float32).Dispose())
            fails (fun () -> Fp8Blocks.Quantize(matrix 1L 2L [| 1f; infinityf |]) |> ignore)
            fails (fun () -> Fp8Blocks.Quantize(matrix 1L 2L [| 1f; nanf |]) |> ignore)
            fails (fun () -> Fp8Blocks.Quantize flat |> ignore)
            use target = torch.empty ([| 2L; 3L |])

            Expect.throwsT<ArgumentException>
                (fun () -> Fp8Blocks.DequantizeInto(weight, right, 129L, 0L, target))
                "outside"
        }
        Shared.testOn
            "Hugging Face's fp8 checkpoint: every weight, whole and cut over ranks"
            "golden/v3_tiny_fp8"
            (fun folder ->
                use set = SafeTensorsSet.Open folder

                for name in set.Names |> Seq.filter (fun name -> (set.Info name).DType = "F8_E4M3") do
                    use weight = set.Tensor name
                    use scales = set.Tensor(name + Fp8Blocks.ScaleSuffix)
                    let rows, columns = int weight.shape[0], int weight.shape[1]
                    let codes, scale = set.FileOf(name).Bytes(name).ToArray(), floats scales
                    let value = expected codes scale (int scales.shape[1]) columns
                    use whole = Fp8Blocks.Dequantize(weight, scales, Type.BFloat16, name)

                    Expect.sequenceEqual
                        (floats whole)
                        [|
                            for r in 0 .. rows - 1 do
                                for c in 0 .. columns - 1 -> bf16 (value r c)
                        |]
                        name

                    // three ranks by rows: shards that cut through blocks
                    for rank in 0..2 do
                        let first, last = rows * rank / 3, rows * (rank + 1) / 3

                        use part =
                            torch.empty ([| int64 (last - first); int64 columns |], dtype = Nullable Type.BFloat16)

                        Fp8Blocks.DequantizeInto(weight, scales, int64 first, 0L, part, name)
                        use wanted = whole.narrow (0L, int64 first, int64 (last - first))
                        Expect.sequenceEqual (floats part) (floats wanted) $"%s{name}, rank %d{rank}")
    ]

let tests = testList "Fp8Blocks" [ codes; blocks ]

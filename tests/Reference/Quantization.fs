/// Block quantisation by its definition: each block's elements to the nearest of the codes that E4M3 has.
module DeepSeekGraph.Reference.Quantization

open System
open DeepSeekGraph

/// Magnitudes of the codes 0 to 126 (127 is NaN): exponent bias 7, three bits of mantissa, subnormals below 2^-6.
let private magnitudes =
    Array.init 127 (fun code ->
        let exponent, mantissa = code / 8, float (code % 8) / 8.0

        if exponent = 0 then
            mantissa * 2.0 ** -6.0
        else
            (1.0 + mantissa) * 2.0 ** float (exponent - 7))

/// The nearest code, of two the even one.
let private round (x: float) =
    let magnitude = min (abs x) 448.0
    let found = Array.BinarySearch(magnitudes, magnitude)

    let code =
        if found >= 0 then
            found
        else
            let high = ~~~found
            let below, above = magnitude - magnitudes[high - 1], magnitudes[high] - magnitude
            if below < above || below = above && (high - 1) % 2 = 0 then high - 1 else high

    float (Math.Sign x) * magnitudes[code]

/// Every block has the scale that makes its largest element 448; scales are fp32.
let fp8 (blocks: int[]) (x: DenseTensor) : DenseTensor =
    let blockOf (index: int[]) = Array.map2 (/) index blocks
    let grid = Array.map2 (fun e b -> (e + b - 1) / b) x.Extents blocks
    let scales = Dense.zeros grid
    Dense.each x.Extents (fun i -> Dense.update scales (blockOf i) (fun most -> max most (abs (Dense.at x i))))
    let scaleOf i = float (float32 (Dense.at scales (blockOf i)) / 448.0f)

    Dense.init x.Extents (fun i ->
        let scale = scaleOf i
        if scale = 0.0 then 0.0 else round (Dense.at x i / scale) * scale)

/// Fused kernels against the kernels they replace, and against their definitions in float64.
module DeepSeekGraph.Runtime.Tests.FusedKernelTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Tests.Slots
open DeepSeekGraph.Runtime.Kernels

let private f32 = DType.Float32

let private both name check =
    testList name [
        for dtype in [ f32; DType.BFloat16 ] -> testCase dtype.Name (fun () -> check dtype)
    ]

let private eps = [ Attribute.Float 1e-3 ]

let private norm =
    both "add and norm" (fun dtype ->
        for n in [ 1; 5; 8; 19; 64 ] do
            let shape = [ 2; 3; n ]
            let tensor seed = filled dtype shape (random seed (6 * n))
            let x, r, w = tensor 1, tensor 2, filled f32 [ n ] (random 3 n)
            let sum, y = slot dtype shape, slot dtype shape
            run KernelId.AddRmsNorm eps [ x; r; w ] [ sum; y ]
            let plain = slot dtype shape
            run KernelId.Add [] [ x; r ] [ plain ]
            Expect.equal (read sum) (read plain) $"sum of %i{n}, bitwise"

            Expect.equal
                (read y)
                (apply KernelId.RmsNorm eps [ plain; w ] (slot dtype shape))
                $"norm of %i{n}, bitwise"

            let dy, c = tensor 4, tensor 5
            let fused = apply KernelId.RmsNormGradXAdd eps [ dy; plain; w; c ] (slot dtype shape)
            let own = slot dtype shape
            run KernelId.RmsNormGradX eps [ dy; plain; w ] [ own ]
            let added = apply KernelId.Add [] [ own; c ] (slot dtype shape)

            if dtype = f32 then
                Expect.equal fused added $"gradient of %i{n}, bitwise"
            else
                // rounded once instead of twice
                close $"gradient of %i{n}" dtype fused added)

let private sigmoid x = 1.0 / (1.0 + exp -x)
let private b, s, e = 2, 5, 12

/// top 3 of 2 of 4 groups.
let private choice = [ int 3; int 4; int 2; int 0; int 0 ]

let private routing normalize softmax =
    choice
    @ [
        int (if normalize then 1 else 0)
        Attribute.Float 1e-2
        Attribute.Float 2.5
        int (if softmax then 1 else 0)
    ]

/// Scores of one token's experts.
let private scored softmax (logits: float[]) =
    if softmax then
        let e = Array.map exp logits
        e |> Array.map (fun v -> v / Array.sum e)
    else
        Array.map sigmoid logits

/// Weights of one token's chosen experts.
let private weights normalize softmax (mask: float[]) (logits: float[]) =
    let raw = Array.map2 (*) (scored softmax logits) mask
    let total = if normalize then Array.sum raw + 1e-2 else 1.0
    raw |> Array.map (fun v -> 2.5 * v / total)

/// A function of all tokens, token by token.
let private tokenwise f (a: float[]) (c: float[]) =
    Array.map2 f (Array.chunkBySize e a) (Array.chunkBySize e c) |> Array.concat

/// The central difference of <dy, f x>.
let private difference (dy: float[]) (x: float[]) f =
    Array.init x.Length (fun i ->
        let moved h = dot dy (f (Array.mapi (fun j v -> if j = i then v + h else v) x))
        (moved 1e-5 - moved -1e-5) / 2e-5)

let private router =
    testList "router" [
        for normalize, softmax in [ true, false; false, false; true, true; false, true ] do
            testCase $"normalized %b{normalize}, softmax %b{softmax}"
            <| fun () ->
                let logits, bias = rounded f32 (random 1 (b * s * e)), random 2 e |> Array.map ((*) 0.1) |> rounded f32
                let x, biases = filled f32 [ b; s; e ] logits, filled f32 [ e ] bias
                let p, mask, counts = slot f32 [ b; s; e ], slot DType.Bool [ b; s; e ], slot DType.Int64 [ e ]
                run KernelId.Router (routing normalize softmax) [ x; biases ] [ p; mask; counts ]

                let scores =
                    logits
                    |> Array.chunkBySize e
                    |> Array.collect (scored softmax >> Array.mapi (fun i v -> v + bias[i]))

                let chosen =
                    apply KernelId.GroupTopK choice [ filled f32 [ b; s; e ] scores ] (slot DType.Bool [ b; s; e ])

                Expect.equal (read mask) chosen "the choice"
                close "weights" f32 (read p) (tokenwise (weights normalize softmax) chosen logits)

                Expect.equal
                    (read counts)
                    (Array.init e (fun i -> Seq.sum [ for t in 0 .. b * s - 1 -> chosen[t * e + i] ]))
                    "tokens per expert"

                let dp = rounded f32 (random 3 (b * s * e))

                let dx =
                    apply
                        KernelId.RouterGrad
                        (routing normalize softmax)
                        [ filled f32 [ b; s; e ] dp; x; mask ]
                        (slot f32 [ b; s; e ])

                close "gradient" f32 dx (difference dp logits (tokenwise (weights normalize softmax) chosen))
    ]

/// Positions of the k largest, the lower first among equals; NaN is the least.
let private largest k (values: float[]) =
    Array.init values.Length id
    |> Array.sortBy (fun i -> Double.IsNaN values[i], -values[i], i)
    |> Array.truncate k

/// The rule of DeepSeek-V3, one expert after the other: ones for the chosen. `byBest`: a group scores as DeepSeek-V2's do.
let private chosenOf groups keep topK zeroMasked byBest (row: float[]) =
    let width = row.Length / groups

    /// The two best of a group, of which there may be one or none.
    let score (group: float[]) =
        let best = group |> Array.filter (Double.IsNaN >> not) |> Array.sortDescending
        let at i = if i < best.Length then best[i] else -infinity
        if byBest || group.Length = 1 then at 0 else at 0 + at 1

    let lost = if zeroMasked then 0.0 else -infinity

    let best =
        if keep >= groups then
            largest topK row
        else
            let kept = row |> Array.chunkBySize width |> Array.map score |> largest keep
            row |> Array.mapi (fun i v -> if Array.contains (i / width) kept then v else lost) |> largest topK

    Array.init row.Length (fun i -> if Array.contains i best then 1.0 else 0.0)

let private choices =
    testCase "experts are chosen as one by one, with ties, zeros of both signs, infinities and NaN"
    <| fun () ->
        // a few values many times, and what is no number; 9 in 10 tokens have no NaN
        let odd = [| nan; infinity; -infinity; 0.0; -0.0; 1.0; -1.0 |]
        let source = Random 11

        let score t _ =
            match source.Next 24 with
            | i when i < odd.Length && (t % 10 = 9 || not (Double.IsNaN odd[i])) && t % 3 = 0 -> odd[i]
            | _often -> round (8.0 * (2.0 * source.NextDouble() - 1.0)) / 8.0

        let cases = [
            256, 8, 4, 8
            60, 3, 2, 7
            33, 1, 1, 5
            64, 8, 8, 64
            48, 2, 1, 1
            // groups of one, of two and of odd sizes; more wanted than the kept groups have
            7, 7, 3, 2
            10, 5, 2, 3
            27, 9, 4, 6
            104, 8, 3, 13
            24, 4, 1, 9
            1, 1, 1, 1
            5, 1, 1, 9
        ]

        for experts, groups, keep, topK in cases do
            for zeroMasked, byBest in [ false, false; true, false; false, true ] do
                let flag b = int (if b then 1 else 0)
                let tokens = 60
                let rows = Array.init tokens (fun t -> Array.init experts (score t))

                let mask =
                    apply
                        KernelId.GroupTopK
                        [ int topK; int groups; int keep; flag zeroMasked; flag byBest ]
                        [ filled f32 [ 1; tokens; experts ] (Array.concat rows) ]
                        (slot DType.Bool [ 1; tokens; experts ])
                    |> Array.chunkBySize experts

                for t in 0 .. tokens - 1 do
                    if mask[t] <> chosenOf groups keep topK zeroMasked byBest rows[t] then
                        failtest
                            $"top %i{topK} of %i{keep} of %i{groups} groups of %i{experts}, zero %b{zeroMasked}, by best %b{byBest}: %A{rows[t]}"

let private weighs =
    testCase "weights made with the choice and from a mask have the same bits"
    <| fun () ->
        onHostOnly ()

        for experts, groups, keep, topK, softmax in [ 256, 8, 4, 8, 0; 30, 3, 2, 5, 0; 30, 3, 2, 5, 1 ] do
            let tokens = 40
            let axes = [ 1; tokens; experts ]
            let x = filled f32 axes (random 7 (tokens * experts) |> Array.map ((*) 3.0))
            let bias = filled f32 [ experts ] (random 8 experts)
            let p, mask, counts = slot f32 axes, slot DType.Bool axes, slot DType.Int64 [ experts ]

            let attributes = [
                int topK
                int groups
                int keep
                int 0
                int softmax
                int 1
                Attribute.Float 1e-20
                Attribute.Float 2.5
                int softmax
            ]

            run KernelId.Router attributes [ x; bias ] [ p; mask; counts ]
            let again, recounted = slot f32 axes, slot DType.Int64 [ experts ]
            let inputs, outputs = [| x; bias |], [| again; mask; recounted |]
            let call = KernelCall(Array.ofList attributes, ReadOnlySpan inputs, ReadOnlySpan outputs, alone)
            RouterKernels.Weigh &call
            Expect.equal (read again) (read p) "weights"
            Expect.equal (read recounted) (read counts) "counts"
            Expect.equal (Array.sum (read counts)) (float (tokens * topK)) "as many as wanted"

/// Shares of affinity, by sequence.
let private shares (w: float[]) (logits: float[]) =
    let token =
        logits
        |> Array.chunkBySize e
        |> Array.mapi (fun t row ->
            let scores = Array.map sigmoid row
            scores |> Array.map (fun v -> w[t] * v / (Array.sum scores + 1e-2)))

    Array.init (b * e) (fun i -> Seq.sum [ for t in 0 .. s - 1 -> token[i / e * s + t][i % e] ])

let private balance =
    testCase "balance"
    <| fun () ->
        let logits = rounded f32 (random 1 (b * s * e))
        let w = Array.init (b * s) (fun t -> if t = 3 then 0.0 else 1.0 + float t / 8.0)
        let x, weights = filled f32 [ b; s; e ] logits, filled f32 [ b; s ] w
        let counts, share = slot f32 [ b; e ], slot f32 [ b; e ]
        run KernelId.Balance [ int 3; Attribute.Float 1e-2 ] [ x; weights ] [ counts; share ]

        let plain = apply KernelId.GroupTopK [ int 3; int 1; int 1; int 0; int 0 ] [ x ] (slot DType.Bool [ b; s; e ])

        close
            "counts"
            f32
            (read counts)
            (Array.init (b * e) (fun i ->
                Seq.sum [ for t in 0 .. s - 1 -> w[i / e * s + t] * plain[(i / e * s + t) * e + i % e] ]))

        close "shares" f32 (read share) (shares w logits)
        let d = rounded f32 (random 4 (b * e))

        let dx =
            apply
                KernelId.BalanceGrad
                [ Attribute.Float 1e-2 ]
                [ filled f32 [ b; e ] d; x; weights ]
                (slot f32 [ b; s; e ])

        close "gradient" f32 dx (difference d logits (shares w))

/// Logits [tokens, v] of hidden states and a head.
let private logits tokens k v (h: float[]) (w: float[]) =
    Array.init (tokens * v) (fun i -> Seq.sum [ for f in 0 .. k - 1 -> h[i / v * k + f] * w[i % v * k + f] ])

/// Gradients of hidden states and head, from those of the logits.
let private gradients tokens k v (h: float[]) (w: float[]) (dz: float[]) =
    let dh, dw = Array.zeroCreate (tokens * k), Array.zeroCreate (v * k)

    for i in 0 .. dz.Length - 1 do
        for f in 0 .. k - 1 do
            let a, b = i / v * k + f, i % v * k + f
            dh[a] <- dh[a] + dz[i] * w[b]
            dw[b] <- dw[b] + dz[i] * h[a]

    dh, dw

/// Labels spread over the vocabulary; token 1 has none.
let private labelOf v t = if t = 1 then -1 else (t * 7919) % v

/// Hidden states, head, labels and ids that begin at 100.
let private headOperands dtype tokens k v h w = [
    filled dtype [ 2; tokens / 2; k ] h
    filled dtype [ v; k ] w
    ids [ 2; tokens / 2 ] [| for t in 0 .. tokens - 1 -> int64 (100 + labelOf v t) |]
    ids [ v ] [| for i in 0 .. v - 1 -> int64 (100 + i) |]
]

let private head =
    both "head and log-sum-exp" (fun dtype ->
        // the last one has more logits than exist at once
        for tokens, k, v, block in [ 6, 5, 12, 3; 6, 8, 32, 16; 4, 3, 7, 7; 64, 2, 98304, 512 ] do
            let h, w = rounded dtype (random 1 (tokens * k)), rounded dtype (random 2 (v * k))
            let label = labelOf v
            let operands = headOperands dtype tokens k v h w

            let z = logits tokens k v h w
            let blocks = v / block
            let lse, at = slot f32 [ 2; tokens / 2; blocks ], slot f32 [ 2; tokens / 2 ]
            run KernelId.LinearLogSumExp [ int block ] operands [ lse; at ]

            close "log-sum-exp" f32 (read lse) (z |> Array.chunkBySize block |> Array.map (Array.sumBy exp >> log))

            close "label" f32 (read at) (Array.init tokens (fun t -> if label t < 0 then 0.0 else z[t * v + label t]))

            let dlse, dat = rounded f32 (random 3 (tokens * blocks)), rounded f32 (random 4 tokens)
            let dh, dw = slot dtype [ 2; tokens / 2; k ], slot dtype [ v; k ]

            run
                KernelId.LinearLogSumExpGrad
                [ int block ]
                (operands
                 @ [
                     lse
                     filled f32 [ 2; tokens / 2; blocks ] dlse
                     filled f32 [ 2; tokens / 2 ] dat
                 ])
                [ dh; dw ]

            let sums = read lse

            let dz =
                z
                |> Array.mapi (fun i x ->
                    let c = i / block
                    let own = exp (x - sums[c]) * dlse[c]
                    if label (i / v) = i % v then own + dat[i / v] else own)

            let expectedH, expectedW = gradients tokens k v h w dz
            close "hidden states" dtype (read dh) expectedH
            close "head" dtype (read dw) expectedW)

/// Of each token: log-sum-exp less the label's logit, and the gradient of its logits for a cotangent.
let private crossEntropy v (z: float[]) (label: int -> int) (dloss: float[]) =
    let rows = z |> Array.chunkBySize v
    let lse = rows |> Array.map (Array.sumBy exp >> log)
    let at t = if label t < 0 then 0.0 else rows[t][label t]

    let dz =
        rows
        |> Array.mapi (fun t ->
            Array.mapi (fun i x -> dloss[t] * (exp (x - lse[t]) - (if i = label t then 1.0 else 0.0))))

    lse |> Array.mapi (fun t l -> l - at t), Array.concat dz

let private wholeHead =
    both "head and cross-entropy" (fun dtype ->
        // one token and one id; a chunk and a part of one; a head that is bf16 by blocks
        for tokens, k, v in [ 2, 1, 1; 6, 5, 12; 10, 19, 33; 300, 3, 20000; 2, 300, 20000 ] do
            let h, w = rounded dtype (random 1 (tokens * k)), rounded dtype (random 2 (v * k))
            let label = labelOf v
            let operands = headOperands dtype tokens k v h w

            // some tokens are masked
            let dloss = random 3 tokens |> Array.mapi (fun t x -> if t % 5 = 4 then 0.0 else x) |> rounded f32

            let loss, dh, dw = slot f32 [ 2; tokens / 2 ], slot dtype [ 2; tokens / 2; k ], slot f32 [ v; k ]
            let weights = filled f32 [ 2; tokens / 2 ] dloss
            run KernelId.LinearCrossEntropyGrad [] (operands @ [ weights ]) [ loss; dh; dw ]

            let expected, dz = crossEntropy v (logits tokens k v h w) label dloss
            let size = $"%i{tokens} x %i{k}, %i{v} ids"
            close $"loss, %s{size}" f32 (read loss) expected
            let alone = apply KernelId.LinearCrossEntropy [] operands (slot f32 [ 2; tokens / 2 ])
            Expect.equal alone (read loss) "the loss alone, bitwise"

            let expectedH, expectedW = gradients tokens k v h w dz
            close $"hidden states, %s{size}" dtype (read dh) expectedH
            // fp32 for bf16 operands as well: summed over chunks
            close $"head, %s{size}" (if device.Value.IsCuda then dtype else f32) (read dw) expectedW
            let again = slot f32 [ v; k ]
            run KernelId.LinearCrossEntropyGrad [] (operands @ [ weights ]) [ loss; dh; again ]
            Expect.equal (read again) (read dw) "the same bits again")

let tests = testList "Fused kernels" [ norm; choices; weighs; router; balance; head; wholeHead ]

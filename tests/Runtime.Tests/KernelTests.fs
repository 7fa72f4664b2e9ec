/// Each kernel against a naive loop in float64; fused against unfused; gradients against adjoints and differences.
module DeepSeekGraph.Runtime.Tests.KernelTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Tests.Slots

let private both name check =
    testList name [
        for dtype in [ DType.Float32; DType.BFloat16 ] -> testCase dtype.Name (fun () -> check dtype)
    ]

/// Letters of a spec without marks.
let private letters (side: string) =
    side.Split(' ', StringSplitOptions.RemoveEmptyEntries) |> Array.map _.TrimEnd('+', '^')

let private contractNaive (spec: string) (extent: string -> int) (a: float[]) (b: float[]) =
    let sides = spec.Split "->"
    let operands = sides[0].Split ','
    let la, lb, lo = letters operands[0], letters operands[1], letters sides[1]
    let all = Array.distinct (Array.append la lb)
    let out = Array.zeroCreate (product (Seq.map extent lo))
    let index (ls: string[]) (at: Map<string, int>) = ls |> Array.fold (fun i l -> i * extent l + at[l]) 0

    let rec walk k at =
        if k = all.Length then
            let o = index lo at
            out[o] <- out[o] + a[index la at] * b[index lb at]
        else
            for i in 0 .. extent all[k] - 1 do
                walk (k + 1) (Map.add all[k] i at)

    walk 0 Map.empty
    out

let private specs = [
    "b s k+, n k+ -> b s n"
    "b s n+, n+ k -> b s k"
    "b+ s+ n, b+ s+ k -> n k"
    "b s h+ d+, n h+ d+ -> b s n"
    "b s k+, h d k+ -> b s h d"
    "b s h k+, h d k+ -> b s h d"
    "b+ s+ h d, b+ s+ h k -> h d k"
    "n k+, b s k+ -> b s n"
    "b s e, b+ e -> s e"
    "e+, b s e+ -> b s"
]

let private contractions =
    testList "contract" [
        for spec in specs |> List.filter (fun s -> s <> "b s e, b+ e -> s e") do
            both spec (fun dtype ->
                let extent (l: string) = 2 + (int32 l[0] * 7 % 4)
                let sides = spec.Split([| "->"; "," |], StringSplitOptions.None) |> Array.map letters
                let shape i = [ for l in sides[i] -> extent l ]
                let a = rounded dtype (random 1 (product (shape 0)))
                let b = rounded dtype (random 2 (product (shape 1)))

                let actual =
                    apply
                        KernelId.Contract
                        [ Attribute.Text spec ]
                        [ filled dtype (shape 0) a; filled dtype (shape 1) b ]
                        (slot dtype (shape 2))

                close spec dtype actual (contractNaive spec extent a b))
    ]

let private rmsNorm =
    both "rms-norm and its gradients" (fun dtype ->
        for n in [ 5; 8; 19 ] do
            let rows, eps = 6, 1e-3
            let x, dy = rounded dtype (random 1 (rows * n)), rounded dtype (random 2 (rows * n))
            let w = random 3 n |> rounded DType.Float32
            let slotOf t = filled dtype [ 2; 3; n ] t
            let weight = filled DType.Float32 [ n ] w
            let rate r = 1.0 / sqrt ((Seq.sumBy (fun i -> x[r * n + i] ** 2.0) [ 0 .. n - 1 ]) / float n + eps)
            let y = Array.init (rows * n) (fun i -> x[i] * rate (i / n) * w[i % n])
            let attributes = [ Attribute.Float eps ]
            close "y" dtype (apply KernelId.RmsNorm attributes [ slotOf x; weight ] (slot dtype [ 2; 3; n ])) y

            let dx =
                Array.init (rows * n) (fun i ->
                    let r = i / n
                    let mean = (Seq.sumBy (fun j -> dy[r * n + j] * w[j] * x[r * n + j]) [ 0 .. n - 1 ]) / float n
                    rate r * (dy[i] * w[i % n] - x[i] * rate r * rate r * mean))

            close
                "dx"
                dtype
                (apply KernelId.RmsNormGradX attributes [ slotOf dy; slotOf x; weight ] (slot dtype [ 2; 3; n ]))
                dx

            let dw =
                Array.init n (fun j -> Seq.sumBy (fun r -> dy[r * n + j] * x[r * n + j] * rate r) [ 0 .. rows - 1 ])

            close
                "dw"
                dtype
                (apply KernelId.RmsNormGradW attributes [ slotOf dy; slotOf x ] (slot DType.Float32 [ n ]))
                dw)

let private rotaryAttributes rope factor =
    int rope :: List.map Attribute.Float [ 10000.0; factor; 4096.0; 32.0; 1.0; 1.0 ]

let private table seq rope =
    let result = slot DType.Float32 [ seq; rope ]

    run KernelId.RotaryTable (rotaryAttributes rope 1.0) [ ids [ seq ] [| for i in 0 .. seq - 1 -> int64 (3 * i) |] ] [
        result
    ]

    result

let private rotary =
    testList "rotary" [
        testCase "YaRN frequencies are DeepSeek-V3's" (fun () ->
            let result =
                apply
                    KernelId.RotaryTable
                    (rotaryAttributes 64 40.0)
                    [ ids [ 1 ] [| 1L |] ]
                    (slot DType.Float32 [ 1; 64 ])

            for i, expected in
                [
                    0, 1.0
                    9, 0.0749894
                    10, 0.0562341
                    11, 0.0390069
                    16, 0.0055
                    22, 1.77828e-4
                    23, 3.33380e-5
                    31, 3.33380e-6
                ] do
                Expect.isLessThan (abs (asin result[32 + i] / expected - 1.0)) 2e-5 $"frequency %i{i}")

        both "rope turns pairs, and back" (fun dtype ->
            for rope in [ 6; 16 ] do
                let b, s, n = 2, 3, 2
                let x = rounded dtype (random 1 (b * s * n * rope))
                let angles = table s rope
                let t = read angles
                let shape = [ b; s; n; rope ]

                let expected =
                    Array.init x.Length (fun i ->
                        let f, p = i % rope, i / rope / n % s
                        let c, sn = t[p * rope + f / 2], t[p * rope + rope / 2 + f / 2]
                        if f % 2 = 0 then x[i] * c - x[i + 1] * sn else x[i - 1] * sn + x[i] * c)

                let y = slot dtype shape
                run KernelId.Rope [ int 0 ] [ filled dtype shape x; angles ] [ y ]
                close "rope" dtype (read y) expected
                close "inverse" dtype (apply KernelId.Rope [ int 1 ] [ y; angles ] (slot dtype shape)) x)

        both "rope of q leaves the other features" (fun dtype ->
            let b, s, n, d, rope = 1, 3, 2, 13, 8
            let x = rounded dtype (random 1 (b * s * n * d))
            let angles = table s rope

            let whole =
                apply KernelId.RopeQ [ int 0 ] [ filled dtype [ b; s; n; d ] x; angles ] (slot dtype [ b; s; n; d ])

            let part = x |> Array.chunkBySize d |> Array.collect (Array.skip (d - rope))

            let turned =
                apply
                    KernelId.Rope
                    [ int 0 ]
                    [ filled dtype [ b; s; n; rope ] part; angles ]
                    (slot dtype [ b; s; n; rope ])
                |> Array.chunkBySize rope

            let expected =
                x
                |> Array.chunkBySize d
                |> Array.mapi (fun i h -> Array.append (Array.take (d - rope) h) turned[i])
                |> Array.concat

            close "q" dtype whole expected)

        both "rope of kv joins, and its gradient is the adjoint" (fun dtype ->
            for nope, v, rope in [ 5, 3, 4; 16, 8, 8 ] do
                let b, s, n = 2, 3, 2
                let kv = rounded dtype (random 1 (b * s * n * (nope + v)))
                let pe = rounded dtype (random 2 (b * s * rope))
                let dk = rounded dtype (random 3 (b * s * n * (nope + rope)))
                let dv = rounded dtype (random 4 (b * s * n * v))
                let angles = table s rope
                let k, values = slot dtype [ b; s; n; nope + rope ], slot dtype [ b; s; n; v ]

                run KernelId.RopeKv [ int nope ] [
                    filled dtype [ b; s; n; nope + v ] kv
                    filled dtype [ b; s; rope ] pe
                    angles
                ] [ k; values ]

                let dkv, dpe = slot dtype [ b; s; n; nope + v ], slot dtype [ b; s; rope ]

                run KernelId.RopeKvGrad [ int nope ] [
                    filled dtype [ b; s; n; nope + rope ] dk
                    filled dtype [ b; s; n; v ] dv
                    angles
                ] [ dkv; dpe ]

                let turned =
                    apply
                        KernelId.Rope
                        [ int 0 ]
                        [ filled dtype [ b; s; 1; rope ] pe; angles ]
                        (slot dtype [ b; s; 1; rope ])

                let expected =
                    Array.init (b * s * n) (fun h ->
                        Array.append (Array.sub kv (h * (nope + v)) nope) (Array.sub turned (h / n * rope) rope))
                    |> Array.concat

                close "k" dtype (read k) expected
                close "v" dtype (read values) (kv |> Array.chunkBySize (nope + v) |> Array.collect (Array.skip nope))
                let left = dot (read k) dk + dot (read values) dv
                let right = dot kv (read dkv) + dot pe (read dpe)
                Expect.isLessThan (abs (left - right)) (tolerance dtype * float kv.Length) "<f x, y> = <x, f* y>")
    ]

/// q[b s n d], k[b t n d], v[b t n e] -> out
let private attentionNaive b s t n d e offset scale (q: float[]) (k: float[]) (v: float[]) =
    let out = Array.zeroCreate (b * s * n * e)
    let lse = Array.zeroCreate (b * n * s)

    for bi in 0 .. b - 1 do
        for ni in 0 .. n - 1 do
            for i in 0 .. s - 1 do
                let score j =
                    scale
                    * Seq.sumBy (fun f -> q[((bi * s + i) * n + ni) * d + f] * k[((bi * t + j) * n + ni) * d + f]) [
                        0 .. d - 1
                    ]

                let scores = [| for j in 0 .. offset + i -> score j |]
                let total = log (Seq.sumBy exp scores)
                lse[(bi * n + ni) * s + i] <- total

                for f in 0 .. e - 1 do
                    out[((bi * s + i) * n + ni) * e + f] <-
                        Seq.sum [
                            for j in 0 .. offset + i -> exp (scores[j] - total) * v[((bi * t + j) * n + ni) * e + f]
                        ]

    out, lse

let private attention =
    testList "attention" [
        both "forward, with more keys than queries too" (fun dtype ->
            for s, t, coordinate in [ 7, 7, 0; 130, 130, 0; 4, 8, 1 ] do
                let b, n, d, e, scale = 2, 2, 6, 5, 0.7
                let q, k, v = random 1 (b * s * n * d), random 2 (b * t * n * d), random 3 (b * t * n * e)
                let q, k, v = rounded dtype q, rounded dtype k, rounded dtype v
                let out, lse = slot dtype [ b; s; n; e ], slot DType.Float32 [ b; n; s ]

                run KernelId.Attention [ Attribute.Float scale; exact ] [
                    filled dtype [ b; s; n; d ] q
                    filled dtype [ b; t; n; d ] k
                    filled dtype [ b; t; n; e ] v
                    if t > s then
                        ids [ s ] [| for i in 0 .. s - 1 -> int64 (s * coordinate + i) |]
                ] [ out; lse ]

                let expected, total = attentionNaive b s t n d e (s * coordinate) scale q k v
                close "out" dtype (read out) expected
                close "log-sum-exp" dtype (read lse) total)

        testCase "gradient is the central difference" (fun () ->
            let b, s, n, d, e, scale = 2, 5, 2, 3, 4, 0.6
            let q, k, v = random 1 (b * s * n * d), random 2 (b * s * n * d), random 3 (b * s * n * e)
            let dout = random 4 (b * s * n * e)
            let f32 = DType.Float32
            let qs, ks, vs = filled f32 [ b; s; n; d ] q, filled f32 [ b; s; n; d ] k, filled f32 [ b; s; n; e ] v
            let out, lse = slot f32 [ b; s; n; e ], slot f32 [ b; n; s ]
            run KernelId.Attention [ Attribute.Float scale; exact ] [ qs; ks; vs ] [ out; lse ]
            let dq, dk, dv = slot f32 [ b; s; n; d ], slot f32 [ b; s; n; d ], slot f32 [ b; s; n; e ]

            run KernelId.AttentionGrad [ Attribute.Float scale; exact ] [
                filled f32 [ b; s; n; e ] dout
                qs
                ks
                vs
                out
                lse
            ] [ dq; dk; dv ]

            let loss q k v = dot dout (fst (attentionNaive b s s n d e 0 scale q k v))

            let difference (x: float[]) (at: float[] -> float) =
                Array.init x.Length (fun i ->
                    let moved h = Array.mapi (fun j v -> if j = i then v + h else v) x
                    (at (moved 1e-4) - at (moved -1e-4)) / 2e-4)

            close "dq" f32 (read dq) (difference q (fun q -> loss q k v))
            close "dk" f32 (read dk) (difference k (fun k -> loss q k v))
            close "dv" f32 (read dv) (difference v (fun v -> loss q k v)))

        both "gradient over several blocks equals that of the definition" (fun dtype ->
            let b, s, n, d, e, scale = 1, 150, 1, 4, 3, 0.5

            let q, k, v =
                rounded dtype (random 1 (s * d)), rounded dtype (random 2 (s * d)), rounded dtype (random 3 (s * e))

            let dout = rounded dtype (random 4 (s * e))

            let qs, ks, vs =
                filled dtype [ b; s; n; d ] q, filled dtype [ b; s; n; d ] k, filled dtype [ b; s; n; e ] v

            let out, lse = slot dtype [ b; s; n; e ], slot DType.Float32 [ b; n; s ]
            run KernelId.Attention [ Attribute.Float scale; exact ] [ qs; ks; vs ] [ out; lse ]
            let dv = slot dtype [ b; s; n; e ]

            run KernelId.AttentionGrad [ Attribute.Float scale; exact ] [
                filled dtype [ b; s; n; e ] dout
                qs
                ks
                vs
                out
                lse
            ] [ slot dtype [ b; s; n; d ]; slot dtype [ b; s; n; d ]; dv ]

            let _, total = attentionNaive b s s n d e 0 scale q k v

            let expected =
                Array.init (s * e) (fun at ->
                    let j, f = at / e, at % e

                    Seq.sum [
                        for i in j .. s - 1 do
                            let score = scale * Seq.sumBy (fun c -> q[i * d + c] * k[j * d + c]) [ 0 .. d - 1 ]
                            exp (score - total[i]) * dout[i * e + f]
                    ])

            close "dv" dtype (read dv) expected)

        both "heads of DeepSeek-V3's size, forward and backward" (fun dtype ->
            let b, s, n, d, e = 1, 96, 2, 192, 128
            let scale = 1.0 / sqrt (float d)
            let value seed width = rounded dtype (random seed (b * s * n * width))
            let q, k, v, dout = value 1 d, value 2 d, value 3 e, value 4 e
            let of' width = filled dtype [ b; s; n; width ]
            let qs, ks, vs = of' d q, of' d k, of' e v
            let expected, total = attentionNaive b s s n d e 0 scale q k v
            let eq, ek, ev = Array.zeroCreate q.Length, Array.zeroCreate k.Length, Array.zeroCreate v.Length

            for h in 0 .. n - 1 do
                for i in 0 .. s - 1 do
                    let row width at = (at * n + h) * width
                    let delta = Seq.sumBy (fun f -> dout[row e i + f] * expected[row e i + f]) [ 0 .. e - 1 ]

                    for j in 0..i do
                        let score = Seq.sumBy (fun f -> q[row d i + f] * k[row d j + f]) [ 0 .. d - 1 ]
                        let p = exp (scale * score - total[h * s + i])
                        let dp = Seq.sumBy (fun f -> dout[row e i + f] * v[row e j + f]) [ 0 .. e - 1 ]
                        let ds = p * (dp - delta) * scale

                        for f in 0 .. d - 1 do
                            eq[row d i + f] <- eq[row d i + f] + ds * k[row d j + f]
                            ek[row d j + f] <- ek[row d j + f] + ds * q[row d i + f]

                        for f in 0 .. e - 1 do
                            ev[row e j + f] <- ev[row e j + f] + p * dout[row e i + f]

            let results () = slot dtype [ b; s; n; e ], slot DType.Float32 [ b; n; s ]
            let paths = let out, lse = results () in pathsOf KernelId.Attention [ qs; ks; vs ] [ out; lse ]
            Expect.equal paths.Length (if dtype = DType.BFloat16 then 2 else 1) "the library takes 16 bits"

            for path in paths do
                let out, lse = results ()
                run KernelId.Attention [ Attribute.Float scale; path ] [ qs; ks; vs ] [ out; lse ]
                let dq, dk, dv = slot dtype [ b; s; n; d ], slot dtype [ b; s; n; d ], slot dtype [ b; s; n; e ]
                let saved = [ of' e dout; qs; ks; vs; out; lse ]
                run KernelId.AttentionGrad [ Attribute.Float scale; path ] saved [ dq; dk; dv ]
                close $"out, %O{path}" dtype (read out) expected
                close $"log-sum-exp, %O{path}" dtype (read lse) total
                close $"dq, %O{path}" dtype (read dq) eq
                close $"dk, %O{path}" dtype (read dk) ek
                close $"dv, %O{path}" dtype (read dv) ev)
    ]

let private sigmoid x = 1.0 / (1.0 + exp -x)

let private gated =
    both "SwiGLU, with and without probabilities" (fun dtype ->
        for f in [ 3; 8; 21 ] do
            let rows = 4
            let x, dy = rounded dtype (random 1 (rows * 2 * f)), rounded dtype (random 2 (rows * f))
            let p = rounded DType.Float32 (random 3 rows)

            let xs, dys, ps =
                filled dtype [ rows; 2 * f ] x, filled dtype [ rows; f ] dy, filled DType.Float32 [ rows ] p

            let gate i = x[i / f * 2 * f + i % f]
            let up i = x[i / f * 2 * f + f + i % f]
            let silu z = z * sigmoid z
            let y = Array.init (rows * f) (fun i -> silu (gate i) * up i)
            close "y" dtype (apply KernelId.SwiGlu [] [ xs ] (slot dtype [ rows; f ])) y
            let weighted = y |> Array.mapi (fun i v -> v * p[i / f])
            close "y p" dtype (apply KernelId.SwiGluProbs [] [ xs; ps ] (slot dtype [ rows; f ])) weighted

            let dx scale =
                Array.init (rows * 2 * f) (fun at ->
                    let row, c = at / (2 * f), at % (2 * f)
                    let i = row * f + c % f
                    let g = gate i
                    let slope = sigmoid g * (1.0 + g * (1.0 - sigmoid g))
                    scale row * dy[i] * (if c < f then up i * slope else silu g))

            close
                "dx"
                dtype
                (apply KernelId.SwiGluGrad [] [ dys; xs ] (slot dtype [ rows; 2 * f ]))
                (dx (fun _ -> 1.0))

            let grad, dp = slot dtype [ rows; 2 * f ], slot DType.Float32 [ rows ]
            run KernelId.SwiGluProbsGrad [] [ dys; xs; ps ] [ grad; dp ]
            close "dx p" dtype (read grad) (dx (fun row -> p[row]))

            close
                "dp"
                dtype
                (read dp)
                (Array.init rows (fun row -> Seq.sumBy (fun c -> dy[row * f + c] * y[row * f + c]) [ 0 .. f - 1 ])))

let private topKNaive (scores: float[]) experts topK groups keep zeroMasked (of': int) =
    scores
    |> Array.chunkBySize experts
    |> Array.collect (fun row ->
        let size = experts / groups
        let best n (values: (int * float)[]) = values |> Array.sortBy (fun (i, v) -> -v, i) |> Array.truncate n

        let kept =
            Array.init groups (fun g ->
                g, Array.sub row (g * size) size |> Array.sortDescending |> Array.truncate of' |> Array.sum)
            |> best keep
            |> Array.map fst
            |> Set.ofArray

        let masked =
            row
            |> Array.mapi (fun e v ->
                if Set.contains (e / size) kept then v
                elif zeroMasked then 0.0
                else Double.NegativeInfinity)

        let chosen = masked |> Array.indexed |> best topK |> Array.map fst |> Set.ofArray
        Array.init experts (fun e -> if Set.contains e chosen then 1.0 else 0.0))

let private router =
    testList "router" [
        for zero, best in [ false, 2; true, 2; false, 1; true, 1 ] do
            testCase
                $"group-limited top-k by %i{best} of each group, unselected groups %s{if zero then string 0 else string infinity}"
            <| fun () ->
                let b, s, e = 2, 5, 24
                // few distinct values: ties everywhere
                let scores = random 1 (b * s * e) |> Array.map (fun v -> Math.Round(v * 4.0) / 4.0)

                let mask =
                    apply
                        KernelId.GroupTopK
                        [ int 5; int 6; int 3; int (if zero then 1 else 0); int (2 - best) ]
                        [ filled DType.Float32 [ b; s; e ] scores ]
                        (slot DType.Bool [ b; s; e ])

                Expect.equal mask (topKNaive scores e 5 6 3 zero best) "mask"

        testCase "a NaN is chosen last, and every token gets its experts" (fun () ->
            let scores = [| nan; 1.0; nan; 0.5; 0.25; nan |]

            let mask =
                apply
                    KernelId.GroupTopK
                    [ int 3; int 1; int 1; int 0; int 0 ]
                    [ filled DType.Float32 [ 1; 1; 6 ] scores ]
                    (slot DType.Bool [ 1; 1; 6 ])

            Expect.equal mask [| 0.0; 1.0; 0.0; 1.0; 1.0; 0.0 |] "mask")

        testCase "a number as a bool is whether it is not zero" (fun () ->
            let x = filled DType.Float32 [ 5 ] [| 0.0; -0.0; 0.5; -2.0; 1e-30 |]
            Expect.equal (apply KernelId.Cast [] [ x ] (slot DType.Bool [ 5 ])) [| 0.0; 0.0; 1.0; 1.0; 1.0 |] "mask")

        testCase "router bias moves against the load" (fun () ->
            let bias = filled DType.Float32 [ 4 ] [| 0.0; 0.0; 1.0; 0.0 |]
            run KernelId.RouterBias [ Attribute.Float 0.5 ] [ ids [ 4 ] [| 3L; 1L; 2L; 2L |] ] [ bias ]
            Expect.equal (read bias) [| -0.5; 0.5; 1.0; 0.0 |] "bias")
    ]

let tests =
    testList "Kernels" [
        testCase "the table knows every kernel" (fun () ->
            for kernel in Enum.GetValues<KernelId>() do
                Expect.isTrue (KernelTable.Cpu.ContainsKey kernel) $"%O{kernel}")

        contractions
        rmsNorm
        rotary
        attention
        gated
        router
    ]

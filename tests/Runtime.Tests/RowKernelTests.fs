/// Kernels of routed rows, vocabulary, movement and the step, against naive loops.
module DeepSeekGraph.Runtime.Tests.RowKernelTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Tests.Slots

let private f32 = DType.Float32

let private both name check =
    testList name [
        for dtype in [ DType.Float32; DType.BFloat16 ] -> testCase dtype.Name (fun () -> check dtype)
    ]

/// (token, expert) of each row: by expert, then by token.
let private rowsOf tokens experts (mask: float[]) = [|
    for e in 0 .. experts - 1 do
        for t in 0 .. tokens - 1 do
            if mask[t * experts + e] <> 0.0 then
                t, e
|]

let private permutation =
    both "permute and unpermute" (fun dtype ->
        for b, s, e, h in [ 2, 3, 5, 7; 1, 6, 4, 16; 1, 3, 2, 4 ] do
            let tokens = b * s
            let mask = randomMask (e + h) tokens e 2
            let rows = rowsOf tokens e mask
            let route = routeOf b s e mask
            let count = rows.Length
            let x, r = rounded dtype (random 1 (tokens * h)), rounded dtype (random 2 (count * h))
            let p, q = rounded f32 (random 3 (tokens * e)), rounded f32 (random 4 count)
            let xs, rs = filled dtype [ b; s; h ] x, filledRows dtype [ b; s; e; h ] count r
            let ps, qs = filled f32 [ b; s; e ] p, filledRows f32 [ b; s; e ] count q
            let permuted = rows |> Array.collect (fun (t, _) -> Array.sub x (t * h) h)

            let combined =
                Array.init (tokens * h) (fun i ->
                    rows
                    |> Array.indexed
                    |> Array.sumBy (fun (row, (t, _)) -> if t = i / h then r[row * h + i % h] else 0.0))

            let routed = rows |> Array.map (fun (t, expert) -> p[t * e + expert])
            let unrouted = Array.zeroCreate (tokens * e)
            rows |> Array.iteri (fun row (t, expert) -> unrouted[t * e + expert] <- q[row])
            let newRows () = rowSlot dtype [ b; s; e; h ]
            let newTokens () = slot dtype [ b; s; h ]
            let unfused = apply KernelId.Permute [] [ xs; route ] (newRows ())
            Expect.equal unfused permuted "permute"
            Expect.equal (apply KernelId.PermuteFused [] [ xs; route ] (newRows ())) permuted "fused"
            let summed = apply KernelId.Unpermute [] [ rs; route ] (newTokens ())
            close "unpermute" dtype summed combined
            Expect.equal (apply KernelId.UnpermuteFused [] [ rs; route ] (newTokens ())) summed "fused, bitwise"
            Expect.equal (apply KernelId.RouteProbs [] [ ps; route ] (rowSlot f32 [ b; s; e ])) routed "probabilities"
            Expect.equal (apply KernelId.UnrouteProbs [] [ qs; route ] (slot f32 [ b; s; e ])) unrouted "and back"
            let a, c = newRows (), rowSlot f32 [ b; s; e ]
            run KernelId.PermuteWithProbs [] [ xs; ps; route ] [ a; c ]
            Expect.equal (read a, read c) (permuted, routed) "both at once"
            let a, c = newTokens (), slot f32 [ b; s; e ]
            run KernelId.UnpermuteWithProbs [] [ rs; qs; route ] [ a; c ]
            Expect.equal (read a, read c) (summed, unrouted) "both back at once"
            let left, right = dot permuted r, dot x combined
            Expect.isLessThan (abs (left - right)) 1e-9 "the reference is its own adjoint")

let private grouped =
    both "grouped matrix products" (fun dtype ->
        // the library takes rows of whole multiples of 16 bytes
        for empty, n, k, paths in [ false, 3, 6, 1; true, 3, 6, 1; false, 16, 24, 2; true, 16, 24, 2 ] do
            let paths = if dtype = DType.BFloat16 then paths else 1
            let b, s, e = 2, 4, 5
            let mask = if empty then Array.zeroCreate (b * s * e) else randomMask 7 (b * s) e 2
            let rows = rowsOf (b * s) e mask
            let count = rows.Length
            let route = routeOf b s e mask
            let x, dy = rounded dtype (random 1 (count * k)), rounded dtype (random 2 (count * n))
            let w = rounded dtype (random 3 (e * n * k))
            let xs, dys = filledRows dtype [ b; s; e; k ] count x, filledRows dtype [ b; s; e; n ] count dy
            let ws = filled dtype [ e; n; k ] w

            let y =
                Array.init (count * n) (fun i ->
                    let row, c = i / n, i % n
                    Seq.sumBy (fun f -> x[row * k + f] * w[(snd rows[row] * n + c) * k + f]) [ 0 .. k - 1 ])

            let dx =
                Array.init (count * k) (fun i ->
                    let row, f = i / k, i % k
                    Seq.sumBy (fun c -> dy[row * n + c] * w[(snd rows[row] * n + c) * k + f]) [ 0 .. n - 1 ])

            let dw =
                Array.init (e * n * k) (fun i ->
                    let expert, c, f = i / (n * k), i / k % n, i % k

                    rows
                    |> Array.indexed
                    |> Array.sumBy (fun (row, (_, at)) ->
                        if at = expert then dy[row * n + c] * x[row * k + f] else 0.0))

            /// By every path that there is.
            let check what kernel attributes inputs output expected =
                let found = pathsOf kernel inputs [ output () ]
                Expect.equal found.Length paths $"%s{what}: paths"

                for path in found do
                    close
                        $"%s{what}, %O{path}"
                        dtype
                        (apply kernel (attributes @ [ path ]) inputs (output ()))
                        expected

            check "y" KernelId.GroupedMatMul [ int 0 ] [ xs; ws; route ] (fun () -> rowSlot dtype [ b; s; e; n ]) y
            check "dx" KernelId.GroupedMatMul [ int 1 ] [ dys; ws; route ] (fun () -> rowSlot dtype [ b; s; e; k ]) dx
            check "dw" KernelId.GroupedWeightGrad [] [ dys; xs; route ] (fun () -> slot dtype [ e; n; k ]) dw)

let private vocabulary =
    both "vocabulary slices" (fun dtype ->
        let b, s, v, h, first = 2, 3, 4, 5, 10
        let idValues = [| 10L; 13L; 9L; 14L; 10L; 12L |]
        let here i = idValues[i] >= int64 first && idValues[i] < int64 (first + v)
        let local i = int32 idValues[i] - first
        let tokens = ids [ b; s ] idValues
        let slice = ids [ v ] [| for i in 0 .. v - 1 -> int64 (first + i) |]
        let w, dy = rounded dtype (random 1 (v * h)), rounded dtype (random 2 (b * s * h))

        close
            "embedding"
            dtype
            (apply KernelId.Embedding [] [ tokens; filled dtype [ v; h ] w; slice ] (slot dtype [ b; s; h ]))
            (Array.init (b * s * h) (fun i -> if here (i / h) then w[local (i / h) * h + i % h] else 0.0))

        close
            "gradient"
            dtype
            (apply KernelId.EmbeddingGrad [] [ tokens; filled dtype [ b; s; h ] dy; slice ] (slot f32 [ v; h ]))
            (Array.init (v * h) (fun at ->
                Seq.sumBy (fun i -> if here i && local i = at / h then dy[i * h + at % h] else 0.0) [ 0 .. b * s - 1 ]))

        let z, g = rounded dtype (random 3 (b * s * v)), rounded dtype (random 4 (b * s))

        close
            "pick"
            dtype
            (apply KernelId.Pick [] [ filled dtype [ b; s; v ] z; tokens; slice ] (slot dtype [ b; s ]))
            (Array.init (b * s) (fun i -> if here i then z[i * v + local i] else 0.0))

        close
            "pick gradient"
            dtype
            (apply KernelId.PickGrad [] [ filled dtype [ b; s ] g; tokens; slice ] (slot dtype [ b; s; v ]))
            (Array.init (b * s * v) (fun at -> if here (at / v) && local (at / v) = at % v then g[at / v] else 0.0)))

let private elementwise =
    testList "elementwise and movement" [
        both "a sum of many is rounded once" (fun dtype ->
            let n = 21
            let values = [ for seed in 1..5 -> rounded dtype (random seed n) ]
            let exact = Array.init n (fun i -> values |> List.sumBy (fun v -> v[i]))
            let actual = apply KernelId.Add [] (values |> List.map (filled dtype [ n ])) (slot dtype [ n ])

            Expect.equal
                actual
                (rounded dtype exact |> Array.mapi (fun i e -> if abs (actual[i] - e) < 1e-6 then actual[i] else e))
                "sum")

        testCase "the second operand is placed by dims" (fun () ->
            let a = random 1 24
            let slotA = filled f32 [ 2; 3; 4 ] a
            let b = random 2 8
            let product = apply KernelId.Mul [ ints [ 2; 0 ] ] [ slotA; filled f32 [ 4; 2 ] b ] (slot f32 [ 2; 3; 4 ])
            close "a[i j k] * b[k i]" f32 product (Array.init 24 (fun i -> a[i] * b[i % 4 * 2 + i / 12]))
            let scaled = apply KernelId.Div [ ints [] ] [ slotA; filled f32 [] [| 4.0 |] ] (slot f32 [ 2; 3; 4 ])
            close "a / scalar" f32 scaled (Array.map (fun v -> v / 4.0) a)
            let difference = apply KernelId.Sub [ ints [ 0; 1; 2 ] ] [ slotA; slotA ] (slot f32 [ 2; 3; 4 ])
            Expect.allEqual difference 0.0 "a - a")

        testCase "rows times one-wide rows" (fun () ->
            let count, h = 5, 3
            let a, b = random 1 (count * h), random 2 count
            let rows = filledRows f32 [ 1; 4; 3; h ] count a

            let actual =
                apply
                    KernelId.Mul
                    [ ints [ 0; 1; 2 ] ]
                    [ rows; filledRows f32 [ 1; 4; 3 ] count b ]
                    (rowSlot f32 [ 1; 4; 3; h ])

            close "rows" f32 actual (Array.init (count * h) (fun i -> a[i] * b[i / h])))

        testCase "reductions" (fun () ->
            let a = random 1 24
            let slotA = filled f32 [ 2; 3; 4 ] a
            let sum = apply KernelId.Sum [ ints [ 0; 2 ] ] [ slotA ] (slot f32 [ 3 ])

            close
                "sum"
                f32
                sum
                (Array.init 3 (fun j ->
                    Seq.sum [
                        for i in 0..1 do
                            for k in 0..3 -> a[(i * 3 + j) * 4 + k]
                    ]))

            let largest = apply KernelId.Max [ ints [ 1 ] ] [ slotA ] (slot f32 [ 2; 4 ])

            close
                "max"
                f32
                largest
                (Array.init 8 (fun at -> Seq.max [ for j in 0..2 -> a[(at / 4 * 3 + j) * 4 + at % 4] ]))

            let counts =
                apply
                    KernelId.Sum
                    [ ints [ 0; 1 ] ]
                    [ maskSlot 1 3 2 [| 1.0; 0.0; 1.0; 1.0; 1.0; 0.0 |] ]
                    (slot DType.Int64 [ 2 ])

            Expect.equal counts [| 3.0; 1.0 |] "integers stay integers")

        testCase "slice, pad, concat, broadcast, transpose" (fun () ->
            let a = Array.init 12 float
            let slotA = filled f32 [ 3; 4 ] a

            Expect.equal
                (apply KernelId.Slice [ int 1; int 1; int 2 ] [ slotA ] (slot f32 [ 3; 2 ]))
                [| 1.0; 2.0; 5.0; 6.0; 9.0; 10.0 |]
                "slice"

            let padded = apply KernelId.Pad [ int 0; int 1; int 5 ] [ slotA ] (slot f32 [ 5; 4 ])
            Expect.equal padded (Array.concat [ Array.zeroCreate 4; a; Array.zeroCreate 4 ]) "pad"

            Expect.equal
                (apply KernelId.Concat [ int 0 ] [ slotA; slotA ] (slot f32 [ 6; 4 ]))
                (Array.append a a)
                "concat"

            let wide = apply KernelId.Broadcast [ int 1; int 2 ] [ slotA ] (slot f32 [ 3; 2; 4 ])
            Expect.equal wide (a |> Array.chunkBySize 4 |> Array.collect (fun row -> Array.append row row)) "broadcast"
            let turned = apply KernelId.Transpose [ ints [ 1; 0 ] ] [ slotA ] (slot f32 [ 4; 3 ])
            Expect.equal turned (Array.init 12 (fun i -> float (i % 3 * 4 + i / 3))) "transpose")

        testCase "a rank's own block and indices" (fun () ->
            let axes: MeshAxis[] = [| { Name = "a"; Size = 2 }; { Name = "b"; Size = 3 } |]
            let rank = RankContext(0, 0, [| 1; 2 |], axes)
            let block = slot f32 [ 2 ]

            runAt rank KernelId.LocalSlice [ int 0; ints [ 0; 1 ] ] [ filled f32 [ 12 ] (Array.init 12 float) ] [
                block
            ]

            Expect.equal (read block) [| 10.0; 11.0 |] "block 1 + 2 * 2"
            let indices = slot DType.Int64 [ 2 ]
            runAt rank KernelId.Iota [ ints [ 1 ] ] [] [ indices ]
            Expect.equal (read indices) [| 4.0; 5.0 |] "indices")

        testCase "rows and their set are sliced by experts" (fun () ->
            onHostOnly ()
            let mask = randomMask 3 6 4 2
            let route = routeOf 1 6 4 mask
            let rows = rowsOf 6 4 mask
            let r = random 1 rows.Length
            let axes: MeshAxis[] = [| { Name = "ep"; Size = 2 } |]
            let rank = RankContext(0, 0, [| 1 |], axes)
            let part = rowSlot f32 [ 1; 6; 2 ]

            runAt rank KernelId.LocalSlice [ int 2; ints [ 0 ] ] [ filledRows f32 [ 1; 6; 4 ] rows.Length r; route ] [
                part
            ]

            close
                "rows"
                f32
                (read part)
                (rows |> Array.indexed |> Array.filter (fun (_, (_, e)) -> e >= 2) |> Array.map (fun (i, _) -> r[i]))

            let small = rowSlot DType.Bool [ 1; 6; 2 ]
            runAt rank KernelId.LocalSlice [ int 2; ints [ 0 ] ] [ route ] [ small ]
            let direct = routeOf 1 6 2 (mask |> Array.chunkBySize 4 |> Array.collect (Array.skip 2))
            Expect.equal small.Rows.TokenIndex direct.Rows.TokenIndex "tokens"
            Expect.equal small.Rows.TokenRows direct.Rows.TokenRows "rows of tokens"
            Expect.equal small.Rows.Counts direct.Rows.Counts "counts")

        testCase "rows and their set are sliced by experts, in blocks of their own, wherever they are" (fun () ->
            let tokens, experts, h = 7, 6, 8
            let mask = randomMask 5 tokens experts 3
            let rank = RankContext(0, 0, [| 1 |], [| { Name = "ep"; Size = 2 } |])
            let i32 (tensor: TorchSharp.torch.Tensor) = tensor.cpu().data<int>().ToArray()

            /// Token, expert and elements of each row.
            let rowsOf first (set: SlotValue) (values: SlotValue) = [|
                let route = set.DeviceRows
                let counts, offsets, flat, all = i32 route.Counts, i32 route.Offsets, i32 route.Flat, read values

                for e in 0 .. route.Experts - 1 do
                    for row in offsets[e] .. offsets[e] + counts[e] - 1 do
                        flat[row] / route.Experts, first + flat[row] % route.Experts, all[row * h .. (row + 1) * h - 1]
            |]

            for from, into in [ 1, 1; 1, 4; 4, 1; 4, 2 ] do
                let route = blockSlot from DType.Bool [ 1; tokens; experts ]
                run KernelId.Route [ int experts ] [ maskSlot 1 tokens experts mask ] [ route ]
                let x = filled f32 [ 1; tokens; h ] (random 2 (tokens * h))
                let rows = blockSlot from f32 [ 1; tokens; experts; h ]
                run KernelId.Permute [] [ x; route ] [ rows ]
                let set, part = blockSlot into DType.Bool [ 1; tokens; 3 ], blockSlot into f32 [ 1; tokens; 3; h ]
                runAt rank KernelId.LocalSlice [ int 2; ints [ 0 ] ] [ route ] [ set ]
                runAt rank KernelId.LocalSlice [ int 2; ints [ 0 ] ] [ rows; route ] [ part ]

                Expect.equal
                    (rowsOf 3 set part)
                    (rowsOf 0 route rows |> Array.filter (fun (_, expert, _) -> expert >= 3))
                    $"blocks of %i{from} to %i{into}"

                Expect.equal part.Tensor.shape[0] (int64 set.DeviceRows.Rows) "as many as the set says"
                // the set is good for permuting by
                let direct = blockSlot into f32 [ 1; tokens; 3; h ]
                run KernelId.Permute [] [ x; set ] [ direct ]
                Expect.equal (rowsOf 3 set direct) (rowsOf 3 set part) "permuted by the slice")
    ]

let private step =
    testList "step" [
        testCase "sum of squares, clip" (fun () ->
            let a, b = random 1 19, random 2 8
            let sum = apply KernelId.SumSquares [] [ filled f32 [ 19 ] a; filled f32 [ 8 ] b ] (slot f32 [])
            close "sum" f32 sum [| dot a a + dot b b |]
            let norm, scale = slot f32 [], slot f32 []
            run KernelId.ClipScale [ Attribute.Float 0.5 ] [ filled f32 [] [| 4.0 |] ] [ norm; scale ]
            close "norm" f32 (read norm) [| 2.0 |]
            close "scale" f32 (read scale) [| 0.25 |])

        testCase "accumulate" (fun () ->
            let into = filled f32 [ 9 ] (random 1 9)
            let before = read into
            run KernelId.Accumulate [] [ filled DType.BFloat16 [ 9 ] (Array.create 9 0.5) ] [ into ]
            close "fp32 += bf16" f32 (read into) (Array.map ((+) 0.5) before)
            let counts = ids [ 2 ] [| 1L <<< 40; 2L |]
            run KernelId.Accumulate [] [ ids [ 2 ] [| 1L; 1L |] ] [ counts ]
            Expect.equal (read counts) [| float ((1L <<< 40) + 1L); 3.0 |] "i64"
            run KernelId.Zero [] [] [ counts ]
            Expect.equal (read counts) [| 0.0; 0.0 |] "zero")

        for dtype in [ f32; DType.BFloat16 ] do
            testCase $"bf16 sums of %s{dtype.Name} gradients round once an addend, to nearest even" (fun () ->
                let n = 259
                let into = filled DType.BFloat16 [ n ] (Array.create n 1.0)
                let mutable expected = Array.create n 1.0

                for microbatch in 1..5 do
                    let addend = random microbatch n |> rounded dtype
                    run KernelId.Accumulate [] [ filled dtype [ n ] addend ] [ into ]
                    // fp64 holds the sum exactly; fp32 rounds it once, bf16 once more, as the kernel does
                    expected <- Array.map2 (+) expected addend |> rounded f32 |> rounded DType.BFloat16

                Expect.equal (read into) expected "the same bits"
                // ties: 1 + 2^-8 lies between 1 and 1 + 2^-7 and goes to the even one; 1 + 3 x 2^-8 goes up
                let tie = filled DType.BFloat16 [ 2 ] [| 1.0; 1.0 + 2.0 ** -7.0 |]
                run KernelId.Accumulate [] [ filled f32 [ 2 ] [| 2.0 ** -8.0; 2.0 ** -8.0 |] ] [ tie ]
                Expect.equal (read tie) [| 1.0; 1.0 + 2.0 ** -6.0 |] "to even")

        for first, second, main in
            [
                DType.BFloat16, DType.BFloat16, DType.BFloat16
                DType.BFloat16, f32, DType.BFloat16
                f32, DType.BFloat16, f32
                f32, f32, f32
            ] do
            testCase
                $"AdamW rounds where a float64 oracle does: m %s{first.Name}, v %s{second.Name}, gradients %s{main.Name}"
                (fun () ->
                    let n, lr, b1, b2, eps, decay = 1003, 0.01, 0.9, 0.95, 1e-8, 0.1
                    let master = filled f32 [ n ] (random 2 n)
                    let ms, vs = filled first [ n ] (Array.zeroCreate n), filled second [ n ] (Array.zeroCreate n)
                    let param = slot DType.BFloat16 [ n ]
                    let mutable off = 0

                    for step in 1..8 do
                        let g = random (step + 10) n |> rounded main
                        let p, m, v = read master, read ms, read vs

                        run KernelId.AdamW (List.map Attribute.Float [ b1; b2; eps; decay ]) [
                            filled main [ n ] g
                            filled f32 [] [| 1.0 |]
                            filled f32 [] [| lr |]
                            filled f32 [] [| float step |]
                        ] [ master; ms; vs; param ]

                        let m = Array.map2 (fun m g -> b1 * m + (1.0 - b1) * g) m g
                        let v = Array.map2 (fun v g -> b2 * v + (1.0 - b2) * g * g) v g

                        // the update takes the moments before they are rounded
                        let expected =
                            Array.init n (fun i ->
                                p[i] * (1.0 - lr * decay)
                                - lr * (m[i] / (1.0 - b1 ** float step))
                                  / (sqrt (v[i] / (1.0 - b2 ** float step)) + eps))

                        close "master" f32 (read master) expected

                        let ulps what (dtype: DType) (actual: float[]) exact =
                            if dtype = DType.BFloat16 then
                                Array.iter2
                                    (fun a e ->
                                        if a <> e then
                                            off <- off + 1
                                            // neighbours in bf16: fp32 crossed a tie, or addends cancelled
                                            Expect.isLessThan (abs (a - e)) (abs e * 2.0 ** -6.0 + 1e-7) what)
                                    actual
                                    (rounded dtype exact)
                            else
                                close what dtype actual exact

                        ulps "m" first (read ms) m
                        ulps "v" second (read vs) v
                        Expect.equal (read param) (rounded DType.BFloat16 (read master)) "param is the rounded master"

                    // operands of 8 bits come near ties of 8 bits more often than chance
                    Expect.isLessThan off 64 "moments that differ from the oracle's, of 16,048")

        for moments in [ f32; DType.BFloat16 ] do
            testCase $"AdamW with %s{moments.Name} moments" (fun () ->
                let n, lr, step, b1, b2, eps, decay, clip = 11, 0.01, 3.0, 0.9, 0.95, 1e-8, 0.1, 0.5
                let g, p = random 1 n |> rounded f32, random 2 n |> rounded f32
                let m, v = random 3 n |> rounded moments, random 4 n |> Array.map abs |> rounded moments
                let master, ms, vs = filled f32 [ n ] p, filled moments [ n ] m, filled moments [ n ] v
                let param = slot DType.BFloat16 [ n ]
                param.Fill() |> ignore

                run KernelId.AdamW (List.map Attribute.Float [ b1; b2; eps; decay ]) [
                    filled f32 [ n ] g
                    filled f32 [] [| clip |]
                    filled f32 [] [| lr |]
                    filled f32 [] [| step |]
                ] [ master; ms; vs; param ]

                let g = Array.map ((*) clip) g
                let m = Array.map2 (fun m g -> b1 * m + (1.0 - b1) * g) m g
                let v = Array.map2 (fun v g -> b2 * v + (1.0 - b2) * g * g) v g

                let expected =
                    Array.init n (fun i ->
                        p[i] * (1.0 - lr * decay)
                        - lr * (m[i] / (1.0 - b1 ** step)) / (sqrt (v[i] / (1.0 - b2 ** step)) + eps))

                close "master" f32 (read master) expected
                close "m" moments (read ms) m
                close "v" moments (read vs) v
                Expect.equal (read param) (rounded DType.BFloat16 (read master)) "param is the rounded master")
    ]

let tests = testList "Row kernels" [ permutation; grouped; vocabulary; elementwise; step; RowMoveTests.kernel ]

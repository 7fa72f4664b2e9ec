/// Rows in blocks: what fills up is zero, is read by nobody (it may be NaN), is never sent, and changes no bit of anything else.
module DeepSeekGraph.Runtime.Tests.PaddingTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Tests.Slots
open DeepSeekGraph.Runtime.Tests.CollectiveTests

let private f32 = DType.Float32

/// Is this row one of the set, or does it fill up?
let private isRow (set: RowSet) row =
    Seq.exists (fun e -> row >= set.Offsets[e] && row < set.Offsets[e] + set.Counts[e]) [ 0 .. set.Experts - 1 ]

/// The rows of a padded value that exist; those that fill up must be zero.
let private rowsOf (set: RowSet) (value: SlotValue) =
    let all = read value
    Expect.equal value.Tensor.shape[0] (int64 set.Rows) "whole blocks"
    let width = if set.Rows = 0 then 0 else all.Length / set.Rows

    Array.concat [
        for row in 0 .. set.Rows - 1 do
            let cells = Array.sub all (row * width) width

            if isRow set row then
                cells
            else
                Expect.isTrue (Array.forall ((=) 0.0) cells) $"row %i{row} fills up: %A{cells}"
    ]

/// The same rows in the blocks of `set`, with NaN in what fills up.
let private blocks padding dtype (extents: int list) (set: RowSet) (rows: float[]) =
    let value = blockSlot padding dtype extents
    let width = List.fold (*) 1 (List.skip 3 extents)
    let mutable next = -1

    let cells =
        Array.concat [
            for row in 0 .. set.Rows - 1 do
                if isRow set row then
                    next <- next + 1
                    Array.sub rows (next * width) width
                else
                    Array.create width nan
        ]

    use source = TorchSharp.torch.tensor (cells |> Array.map float32)
    use shaped = source.reshape (value.Fill(set.Rows).shape)
    value.Fill(set.Rows).copy_ shaped |> ignore
    value

let private routed padding b s e mask =
    let route = blockSlot padding DType.Bool [ b; s; e ]
    run KernelId.Route [] [ maskSlot b s e mask ] [ route ]
    route

let private kernels =
    testCase "kernels of rows in blocks give the bits of those without; products where rows are whole cache lines"
    <| fun () ->
        onHostOnly ()

        for dtype in [ f32; DType.BFloat16 ] do
            for padding in [ 4; 128 ] do
                for seed in 1..4 do
                    // the library's products round by where in a cache line an operand begins
                    let aligned = seed % 2 = 0
                    let b, s, e, h, n = 2, 5, 6, (if aligned then 32 else 8 + seed), (if aligned then 64 else 3)
                    let mask = if seed = 4 then Array.zeroCreate (b * s * e) else randomMask seed (b * s) e 2
                    let plain, padded = routed 1 b s e mask, routed padding b s e mask
                    let set = padded.Rows
                    let count = plain.Rows.Rows
                    Expect.equal set.Counts plain.Rows.Counts "counts stay true"
                    Expect.isTrue (set.Offsets |> Array.forall (fun o -> o % padding = 0)) "blocks"
                    let x = filled dtype [ b; s; h ] (random seed (b * s * h))
                    let p = filled f32 [ b; s; e ] (random (seed + 9) (b * s * e))

                    let rows, probs =
                        random (seed + 1) (count * h) |> rounded dtype, random (seed + 2) count |> rounded f32

                    let wide = filledRows dtype [ b; s; e; h ] count rows
                    let thin = filledRows f32 [ b; s; e ] count probs
                    let wide' = blocks padding dtype [ b; s; e; h ] set rows
                    let thin' = blocks padding f32 [ b; s; e ] set probs

                    /// By the same kernel, into rows with and without blocks.
                    let into what kernel attributes extents dtype plainInputs paddedInputs =
                        let a, c = rowSlot dtype extents, blockSlot padding dtype extents
                        run kernel attributes (plainInputs @ [ plain ]) [ a ]
                        run kernel attributes (paddedInputs @ [ padded ]) [ c ]

                        if aligned || kernel <> KernelId.GroupedMatMul then
                            Expect.equal (rowsOf set c) (read a) what
                        else
                            close what dtype (rowsOf set c) (read a)

                    let out what kernel attributes (extents: int list) dtype plainInputs paddedInputs =
                        let a, c = slot dtype extents, slot dtype extents
                        run kernel attributes (plainInputs @ [ plain ]) [ a ]
                        run kernel attributes (paddedInputs @ [ padded ]) [ c ]

                        if aligned || kernel <> KernelId.GroupedWeightGrad then
                            Expect.equal (read c) (read a) what
                        else
                            close what dtype (read c) (read a)

                    for kernel in [ KernelId.Permute; KernelId.PermuteFused ] do
                        into $"%O{kernel}" kernel [] [ b; s; e; h ] dtype [ x ] [ x ]

                    into "route_probs" KernelId.RouteProbs [] [ b; s; e ] f32 [ p ] [ p ]

                    for kernel in [ KernelId.Unpermute; KernelId.UnpermuteFused ] do
                        out $"%O{kernel}" kernel [] [ b; s; h ] dtype [ wide ] [ wide' ]

                    out "unroute_probs" KernelId.UnrouteProbs [] [ b; s; e ] f32 [ thin ] [ thin' ]

                    let both, both' =
                        (rowSlot dtype [ b; s; e; h ], rowSlot f32 [ b; s; e ]),
                        (blockSlot padding dtype [ b; s; e; h ], blockSlot padding f32 [ b; s; e ])

                    run KernelId.PermuteWithProbs [] [ x; p; plain ] [ fst both; snd both ]
                    run KernelId.PermuteWithProbs [] [ x; p; padded ] [ fst both'; snd both' ]
                    Expect.equal (rowsOf set (fst both')) (read (fst both)) "permute_with_probs"
                    Expect.equal (rowsOf set (snd both')) (read (snd both)) "probabilities"

                    let y, y' =
                        (slot dtype [ b; s; h ], slot f32 [ b; s; e ]), (slot dtype [ b; s; h ], slot f32 [ b; s; e ])

                    run KernelId.UnpermuteWithProbs [] [ wide; thin; plain ] [ fst y; snd y ]
                    run KernelId.UnpermuteWithProbs [] [ wide'; thin'; padded ] [ fst y'; snd y' ]
                    Expect.equal (read (fst y'), read (snd y')) (read (fst y), read (snd y)) "unpermute_with_probs"

                    let w = filled dtype [ e; n; h ] (random 5 (e * n * h))
                    into "y" KernelId.GroupedMatMul [ int 0; exact ] [ b; s; e; n ] dtype [ wide; w ] [ wide'; w ]
                    let turned = filled dtype [ e; h; n ] (random 6 (e * n * h))

                    into "dx" KernelId.GroupedMatMul [ int 1; exact ] [ b; s; e; n ] dtype [ wide; turned ] [
                        wide'
                        turned
                    ]

                    out "dw" KernelId.GroupedWeightGrad [ exact ] [ e; h; h ] f32 [ wide; wide ] [ wide'; wide' ]

let private slices =
    testCase "slices by experts begin blocks of their own"
    <| fun () ->
        onHostOnly ()
        let mask = randomMask 3 6 4 2
        let plain = routed 1 1 6 4 mask
        let rows = random 1 plain.Rows.Rows
        let axes: MeshAxis[] = [| { Name = "ep"; Size = 2 } |]

        for from, into in [ 1, 4; 4, 1; 4, 2; 2, 4 ] do
            let route = routed from 1 6 4 mask

            for block in 0..1 do
                let rank = RankContext(0, 0, [| block |], axes)
                let half = mask |> Array.chunkBySize 4 |> Array.collect (fun row -> row[2 * block .. 2 * block + 1])
                let direct = routed into 1 6 2 half
                let set, part = blockSlot into DType.Bool [ 1; 6; 2 ], blockSlot into f32 [ 1; 6; 2 ]
                runAt rank KernelId.LocalSlice [ int 2; ints [ 0 ] ] [ route ] [ set ]
                Expect.equal set.Rows.Offsets direct.Rows.Offsets "blocks"
                Expect.equal set.Rows.TokenIndex direct.Rows.TokenIndex "tokens"
                Expect.equal set.Rows.TokenRows direct.Rows.TokenRows "rows of tokens"
                let given = blocks from f32 [ 1; 6; 4 ] route.Rows rows
                runAt rank KernelId.LocalSlice [ int 2; ints [ 0 ] ] [ given; route ] [ part ]
                let offsets = plain.Rows.Offsets
                let expected = (rounded f32 rows)[offsets[2 * block] .. offsets[2 * block + 2] - 1]
                Expect.equal (rowsOf set.Rows part) expected "rows"

let private exchanges =
    testCase "exchanges fill up blocks where rows arrive, and send the rows that there are"
    <| fun () ->
        onHostOnly ()
        let b, s, e, h, peers = 1, 5, 8, 3, 4

        // what each rank got and gave back, rows without what fills up
        let moved padding garbage =
            together [ peers ] 1 (fun rank collectives ->
                let r, group = rank.Rank, axesGroup 0 [ 0 ]
                let mask = if r = 3 then Array.zeroCreate (s * e) else randomMask (r + 20) s e 3
                let route = routed 1 b s e mask
                let x, p = filled f32 [ b; s; h ] (random r (s * h)), filled f32 [ b; s; e ] (random (r + 9) (s * e))
                let own, probs = rowSlot f32 [ b; s; e; h ], rowSlot f32 [ b; s; e ]
                run KernelId.PermuteWithProbs [] [ x; p; route ] [ own; probs ]
                let there = blockSlot padding DType.Bool [ b; s * peers; e / peers ]
                perform collectives Collective.RouteToExperts group [ route ] [ there ]
                let set = there.Rows
                let wide () = blockSlot padding f32 [ b; s * peers; e / peers; h ]
                let rows = wide ()
                perform collectives Collective.RowsToExperts group [ own; route; there ] [ rows ]
                let rows', probs' = wide (), blockSlot padding f32 [ b; s * peers; e / peers ]
                perform collectives (Collective.Dispatch 2) group [ x; p; route; there ] [ rows'; probs' ]
                let arrived = [ rowsOf set rows; rowsOf set rows'; rowsOf set probs' ]

                // what fills up is NaN on the way back
                let given value (like: float[]) extents =
                    if garbage then blocks padding f32 extents set like else value

                let wide, thin = [ b; s * peers; e / peers; h ], [ b; s * peers; e / peers ]
                let back = rowSlot f32 [ b; s; e; h ]
                perform collectives Collective.RowsToTokens group [ given rows arrived[0] wide; there; route ] [ back ]
                let y, q = slot f32 [ b; s; h ], slot f32 [ b; s; e ]

                let sent = [ given rows' arrived[1] wide; given probs' arrived[2] thin; there; route ]
                perform collectives (Collective.Combine 2) group sent [ y; q ]

                // the other way by gathering: rows of all, summed back
                let joined = blockSlot padding DType.Bool [ b; s * peers; e ]
                perform collectives (Collective.AllGather 1) group [ route ] [ joined ]
                let whole = blockSlot padding f32 [ b; s * peers; e; h ]
                perform collectives (Collective.AllGather 1) group [ own; route; joined ] [ whole ]
                let all = rowsOf joined.Rows whole
                let summed = rowSlot f32 [ b; s; e; h ]
                let whole = if garbage then blocks padding f32 [ b; s * peers; e; h ] joined.Rows all else whole
                perform collectives (Collective.ReduceScatter 1) group [ whole; joined; route ] [ summed ]
                arrived, read back, read y, read q, all, read summed)
            |> values

        let plain = moved 1 false

        for padding in [ 2; 4; 16 ] do
            for garbage in [ false; true ] do
                Expect.equal (moved padding garbage) plain $"blocks of %i{padding}"

let tests = testList "Padding" [ kernels; slices; exchanges ]

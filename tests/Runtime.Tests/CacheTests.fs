/// Cached rows and attention over them against naive loops; and how the next token is drawn.
module DeepSeekGraph.Runtime.Tests.CacheTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Generation
open DeepSeekGraph.Runtime.Tests.Slots

let private both name check =
    testList name [
        for dtype in [ DType.Float32; DType.BFloat16 ] -> testCase dtype.Name (fun () -> check dtype)
    ]

let private positions (values: int list) (shape: int list) =
    filled DType.Int64 shape (values |> List.map float |> Array.ofList)

let private write =
    both "rows go to their positions, padding nowhere" (fun dtype ->
        let b, c, s, w = 2, 4, 3, 5
        let before, rows = rounded dtype (random 1 (b * c * w)), rounded dtype (random 2 (b * s * w))
        let at = [ 2; 0; -1; 3; 9; 1 ]
        let cache = filled dtype [ b; c; w ] before
        let whole = read cache
        run KernelId.CacheWrite [] [ cache; filled dtype [ b; s; w ] rows; positions at [ b; s ] ] [ cache ]

        let expected = Array.copy whole

        at
        |> List.iteri (fun t place ->
            if place >= 0 && place < c then
                Array.blit rows (t * w) expected (((t / s) * c + place) * w) w)

        Expect.equal (read cache) expected "only those rows changed")

let private attention =
    both "softmax over the rows seen" (fun dtype ->
        let b, s, n, w, v, c = 3, 2, 2, 6, 4, 5
        let q, cache = rounded dtype (random 3 (b * s * n * w)), rounded dtype (random 4 (b * c * w))
        // rows behind a position must not be looked at: they may be anything
        let at = [ 1; 2; 4; -1; -1; -1 ]

        for place in 3 .. c - 1 do
            for i in 0 .. w - 1 do
                cache[place * w + i] <- nan

        let expected = [|
            for t in 0 .. b * s - 1 do
                for head in 0 .. n - 1 do
                    let seen = at[t]
                    let row place i = cache[((t / s) * c + place) * w + i]

                    let scores = [
                        for place in 0..seen ->
                            0.5 * List.sum [ for i in 0 .. w - 1 -> q[(t * n + head) * w + i] * row place i ]
                    ]

                    let weights = scores |> List.map exp
                    let total = List.sum weights

                    for i in 0 .. v - 1 do
                        List.sum [ for place in 0..seen -> weights[place] / total * row place i ]
        |]

        let out =
            apply
                KernelId.CacheAttention
                [ Attribute.Float 0.5; int v ]
                [
                    filled dtype [ b; s; n; w ] q
                    filled dtype [ b; c; w ] cache
                    positions at [ b; s ]
                ]
                (slot dtype [ b; s; n; v ])

        close "attention" dtype out expected)

let private logits = [| 1.0f; 3.0f; 2.0f; 3.0f; -1.0f |]

let private drawn (sampling: Sampling) =
    [ for step in 0..4999 -> int32 (sampling.Next(ReadOnlySpan logits, 0, step)) ]
    |> List.countBy id
    |> Map.ofList

let private share tokens token = (tokens |> Map.tryFind token |> Option.defaultValue 0 |> float) / 5000.0

let private sampling =
    testList "sampling" [
        testCase "greedy is the lowest of the likeliest"
        <| fun () -> Expect.equal (Sampling().Next(ReadOnlySpan logits, 0, 0)) 1L ""
        testCase "draws have the probabilities of the softmax"
        <| fun () ->
            let weights = logits |> Array.map (fun z -> exp (float z / 1.5))
            let tokens = drawn (Sampling(Temperature = 1.5))

            for token in 0..4 do
                Expect.isLessThan
                    (abs (share tokens token - weights[token] / Array.sum weights))
                    0.025
                    $"token %i{token}"
        testCase "top-k and top-p leave the unlikely out"
        <| fun () ->
            let names (tokens: Map<int, int>) = tokens |> Map.keys |> List.ofSeq
            Expect.equal (names (drawn (Sampling(Temperature = 1.0, TopK = 2)))) [ 1; 3 ] "top-k 2"
            // 1 and 3 have 0.40 each, 2 has 0.15
            Expect.equal (names (drawn (Sampling(Temperature = 1.0, TopP = 0.5)))) [ 1; 3 ] "top-p 0.5"
            Expect.equal (names (drawn (Sampling(Temperature = 1.0, TopP = 0.85)))) [ 1; 2; 3 ] "top-p 0.85"
            Expect.equal (names (drawn (Sampling(Temperature = 1.0, TopP = 1e-9)))) [ 1 ] "the likeliest is always left"
        testCase "the seed, the prompt and the step decide"
        <| fun () ->
            let run seed prompt =
                let s = Sampling(Temperature = 2.0, Seed = seed)
                [ for step in 0..20 -> s.Next(ReadOnlySpan logits, prompt, step) ]

            Expect.equal (run 1UL 0) (run 1UL 0) "the same twice"
            Expect.notEqual (run 1UL 0) (run 2UL 0) "another seed"
            Expect.notEqual (run 1UL 0) (run 1UL 1) "another prompt"
        testCase "what is none is refused"
        <| fun () ->
            for wrong in
                [
                    Sampling(Temperature = -1.0)
                    Sampling(Temperature = nan)
                    Sampling(TopK = -1)
                    Sampling(TopP = 0.0)
                    Sampling(TopP = 1.5)
                ] do
                try
                    wrong.Check()
                    failtest $"%O{wrong} passed"
                with :? DiagnosticException as e ->
                    Expect.equal e.Diagnostics[0].Code Codes.SamplingIllegal $"%O{wrong}"
    ]

let tests = testList "cache" [ write; attention; sampling ]

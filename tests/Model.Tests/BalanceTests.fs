/// The sequence-wise balance loss: its value where it is known, its definition in a plain loop, its gradient.
module DeepSeekGraph.Models.Tests.BalanceTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Models
open DeepSeekGraph.Reference

let private batch, seq, experts, topK, alpha = 2, 6, 6, 2, 0.25

/// Affinities are the parameter `affinity`, or its sigmoid.
let private graph sigmoid =
    let d = Declaration()
    let m = ModelScope d

    let x = m.Weight("affinity", Init.Ones, struct ("batch", batch), struct ("seq", seq), struct ("experts", experts))

    let affinity = if sigmoid then x.Sigmoid() else x
    let mask = m.Input("mask", DType.Float32, struct ("batch", batch), struct ("seq", seq))
    let scale = m.Input("scale", DType.Float32)
    m.Output("loss", Objective.SequenceBalance(affinity, topK, alpha, mask, scale))
    d.ToGraph()

/// Valid positions of each sequence.
let private lossOf (lengths: int[]) (affinity: int -> int -> int -> float) =
    let given name =
        match name with
        | "affinity" -> Dense.init [| batch; seq; experts |] (fun i -> affinity i[0] i[1] i[2])
        | "mask" -> Dense.init [| batch; seq |] (fun i -> if i[1] < lengths[i[0]] then 1.0 else 0.0)
        | _scale -> Dense.scalar (1.0 / float (Array.sum lengths))

    (Evaluator.run (graph false) given given).Output("loss").Data[0]

let private whole = Array.create batch seq
let private near message expected found = Expect.isLessThan (abs (found - expected)) 1e-12 message

/// Eq. 17-20 one sequence at a time, then the mean over tokens.
let private definition (lengths: int[]) (affinity: int -> int -> int -> float) =
    let sequence b =
        let t = lengths[b]
        let rows = [ for s in 0 .. t - 1 -> [ for e in 0 .. experts - 1 -> affinity b s e ] ]

        let chosen (row: float list) e =
            row
            |> List.indexed
            |> List.sortByDescending snd
            |> List.truncate topK
            |> List.exists (fun (i, _) -> i = e)

        let f e =
            float experts / float (topK * t)
            * float (rows |> List.filter (fun row -> chosen row e) |> List.length)

        let p e = (rows |> List.sumBy (fun row -> row[e] / List.sum row)) / float t
        List.sum [ for e in 0 .. experts - 1 -> alpha * f e * p e ]

    let weighted = [
        for b in 0 .. batch - 1 -> if lengths[b] = 0 then 0.0 else float lengths[b] * sequence b
    ]

    List.sum weighted / float (Array.sum lengths)

let private metrics config =
    DeepSeekV3(config).Declare(1, 8).Outputs
    |> Array.filter (fun (name, _) -> name = "metric:balance_loss")
    |> Array.length

let tests =
    testList "sequence-wise balance loss" [
        testCase "equal affinities cost alpha"
        <| fun () -> near "loss" alpha (lossOf whole (fun _ _ _ -> 0.5))

        testCase "experts chosen equally often cost alpha, whatever the affinities"
        <| fun () ->
            // token s prefers experts 2s and 2s + 1 (mod 6); each expert is chosen twice in six tokens
            let affinity _ s e = if e / topK = s % 3 then 0.9 + 0.01 * float e else 0.1 + 0.01 * float (s + e)
            near "loss" alpha (lossOf whole affinity)

        testCase "all tokens on the same experts cost alpha E / K"
        <| fun () ->
            let affinity _ _ e = if e < topK then 1.0 else 0.0
            near "loss" (alpha * float experts / float topK) (lossOf whole affinity)

        testCase "padding counts nothing, not even a sequence that is nothing else"
        <| fun () ->
            let affinity b s e = 0.05 + abs (sin (float (37 * b + 11 * s + 5 * e * e + 1)))

            for lengths in [ whole; [| 4; 6 |]; [| 1; 3 |]; [| 5; 0 |] ] do
                near $"lengths %A{lengths}" (definition lengths affinity) (lossOf lengths affinity)

        testCase "its gradient is the central difference"
        <| fun () ->
            match GradientCheck.mismatches 1e-7 72 3 (graph true) with
            | Ok wrong -> Expect.isEmpty wrong ""
            | Error wrong -> failtestf "%A" wrong

        testCase "each mixture of experts has a term, the one of multi-token prediction too; weight 0 has none"
        <| fun () ->
            Expect.equal (metrics Presets.Tiny) 4 "three layers and one of MTP"
            Expect.equal (metrics (Presets.Tiny.LikeHuggingFace())) 0 "none"
    ]

/// Every op, one sample graph at a time: legal, and its gradient is the central difference.
module DeepSeekGraph.Graph.Tests.OpTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Reference
open DeepSeekGraph.Testing

/// Gradients of these cases are refused, by design.
let private withoutGradient =
    set [
        "Max"
        "GroupedWeightGrad"
        "Fp8Quantize"
        "RmsNormGradX"
        "RmsNormGradW"
        "RmsNormGradXAdd"
        "RouterGrad"
        "BalanceGrad"
        "RopeKvGrad"
        "AttentionGrad"
        "SwiGluGrad"
        "SwiGluProbsGrad"
        "EmbeddingGrad"
        "LinearLogSumExpGrad"
        "LinearCrossEntropyGrad"
        "Collective"
        "LocalSlice"
    ]

let private uses case (graph: Graph) = graph.Nodes |> Array.exists (fun n -> OpSamples.caseOf n.Op = case)

let private differentiates (graph: Graph) () =
    match GradientCheck.mismatches 1e-5 8 1 graph with
    | Error diagnostics -> failtestf "%O" diagnostics.Head
    | Ok [] -> ()
    | Ok wrong -> failtestf "%A" wrong

let private refuses (graph: Graph) () =
    match Autodiff.differentiate "loss" graph with
    | Ok _ -> failtest "has a gradient"
    | Error diagnostics ->
        for d in diagnostics do
            Expect.equal d.Code Codes.NotDifferentiable d.Message

let tests =
    testList "Ops" [
        for case, samples in OpSamples.all do
            testList case [
                testCase "has a sample that uses it" (fun () ->
                    Expect.isTrue (samples |> List.exists (fun s -> uses case s.Graph)) "no sample uses the op")
                for sample in samples do
                    testCase $"%s{sample.Name}: legal" (fun () ->
                        Expect.isEmpty (Verify.check sample.Graph) "the sample is illegal")

                    if withoutGradient.Contains case then
                        testCase $"%s{sample.Name}: refuses a gradient" (refuses sample.Graph)
                    else
                        testCase $"%s{sample.Name}: gradient = central differences" (differentiates sample.Graph)

                        testCase $"%s{sample.Name}: joint graph is legal" (fun () ->
                            match Autodiff.differentiate "loss" sample.Graph with
                            | Ok joint -> Expect.isEmpty (Verify.check joint) "the joint graph is illegal"
                            | Error diagnostics -> failtestf "%O" diagnostics.Head)
            ]
    ]

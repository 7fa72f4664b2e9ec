/// Logits, losses and every gradient against Hugging Face's, through autodiff and the float64 evaluator.
module DeepSeekGraph.Models.Tests.GoldenTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Reference
open DeepSeekGraph.Models.Tests.Golden

let private evaluate (case: Case) (graph: Graph) =
    let types = Feed.sources graph

    let dense name data = {
        Extents = types[name].Extents
        Data = data
    }

    Evaluator.run graph (fun n -> dense n (input case n)) (fun n -> dense n (parameter case n |> Array.map float))

let private close what (ours: float[]) (reference: float32[]) = Expect.isLessThan (distance ours reference) 2e-5 what

let private logits (case: Case) (values: Evaluated) (name: string) =
    let columns = int (case.Reference.Info name).Shape[1]

    let ours, reference = cut case columns (values.Output name).Data (case.Reference.ReadFloat32 name)

    close name ours reference

/// The first positions of a case: cheap, and exact because attention is causal.
let private first name observed =
    testCase $"%s{name}: first logits"
    <| fun () ->
        use case = load name 1 12
        let values = evaluate case case.Graph
        observed |> List.iter (logits case values)

let private whole name seqLength losses observed =
    testCase $"%s{name}: loss and every gradient"
    <| fun () ->
        use case = load name 2 seqLength

        match Autodiff.differentiate "loss" case.Graph with
        | Error mistakes -> failtest $"%A{mistakes}"
        | Ok joint ->
            let values = evaluate case joint

            for ours, theirs in losses do
                close theirs (values.Output ours).Data (case.Reference.ReadFloat32 theirs)

            observed |> List.iter (logits case values)

            for tensor, ours, reference in gradients case name (fun p -> (values.Output $"grad:%s{p}").Data) do
                close $"gradient of %s{tensor}" ours reference

let tests =
    testList "golden" [
        first "v3_tiny_plain" [ "logits" ]
        first "v3_tiny_yarn" [ "logits" ]
        first "v3_tiny_mtp" [ "logits"; "mtp_logits" ]
        whole "v3_tiny_plain" 96 [ "loss", "loss" ] [ "logits" ]
        whole "v3_tiny_yarn" 96 [ "loss", "loss" ] [ "logits" ]
        whole "v3_tiny_mtp" 80 [
            "loss", "total_loss"
            "metric:loss", "main_loss"
            "metric:mtp_loss", "mtp_loss"
        ] [ "logits"; "mtp_logits" ]
    ]

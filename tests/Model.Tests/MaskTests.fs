/// Tokens that are masked go to no expert, are not counted, and change nothing for the others.
module DeepSeekGraph.Models.Tests.MaskTests

open System
open System.Collections.Generic
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime.Parameters
open DeepSeekGraph.Runtime.Training

let private seqLength, private vocab = 16, 32

let private config =
    DeepSeekV3Config(
        VocabSize = vocab,
        HiddenSize = 32,
        NumHiddenLayers = 2,
        InitializerRange = 0.1,
        NumAttentionHeads = 2,
        QLoraRank = 16,
        KvLoraRank = 16,
        QkNopeHeadDim = 8,
        QkRopeHeadDim = 8,
        VHeadDim = 8,
        IntermediateSize = 32,
        FirstKDenseReplace = 1,
        MoeIntermediateSize = 32,
        NRoutedExperts = 8,
        NumExpertsPerTok = 2,
        NGroup = 4,
        TopkGroup = 2,
        // large enough to be seen
        SeqAuxLossAlpha = 0.05
    )

let private columns = seqLength + 2

let private floats (tensor: torch.Tensor) =
    use tensor = tensor
    use wide = tensor.to_type torch.ScalarType.Float32
    wide.data<float32>().ToArray()

type private Outcome = {
    Logits: float32[]
    Counted: float
    Gradients: Map<string, float32[]>
}

/// One step of all rows as one microbatch; `valid`: 1 for rows that count.
let private run masked (recipe: Recipe) (rows: int64[][]) (valid: float32[]) =
    let data = (Compilation.Mesh recipe).Data

    let plan =
        DeepSeekV3(config, Observe = true, Masked = masked)
            .Compile(recipe.WithBatch(rows.Length, rows.Length / data, seqLength))

    let perToken = valid |> Array.collect (fun v -> Array.create seqLength v)

    task {
        use! trainer = Trainer.StartAsync(plan, TrainerOptions(Executor = Executor.Interpreter))
        let mask () = torch.tensor(perToken).reshape(int64 rows.Length, int64 seqLength)

        let inputs =
            dict [
                "tokens", torch.tensor(Array.concat rows).reshape(int64 rows.Length, int64 columns)
                "loss_mask", mask ()
                "mtp_mask", mask ()
                "token_mask", mask ()
            ]
            |> Dictionary

        do! trainer.ForwardBackwardAsync [| inputs :> IReadOnlyDictionary<_, _> |]
        let last = plan.Stages.Count - 1

        let counted (slot: string) =
            let stages = [
                for r in trainer.Ranks do
                    if not (isNull (r.Find slot)) then
                        r.Rank.Stage
            ]

            Gathering.Sum(trainer.Ranks, List.toArray (List.distinct stages), slot)
            |> floats
            |> Array.sumBy float

        return {
            Logits = Gathering.Slot(trainer.Ranks, last, "observe:logits") |> floats
            Counted = counted "count:model.layers.1.mlp.gate.e_score_correction_bias"
            Gradients = Map [ for pair in trainer.GatherGradients() -> pair.Key, floats pair.Value ]
        }
    }
    |> _.GetAwaiter().GetResult()

let private tokens seed =
    let random = Random seed
    Array.init columns (fun _ -> int64 (random.Next vocab))

let private close what (a: float32[]) (b: float32[]) =
    let scale = b |> Array.fold (fun m v -> max m (abs v)) 0f
    let apart = Array.map2 (fun x y -> abs (x - y)) a b |> Array.max
    Expect.isLessThanOrEqual apart (1e-5f * scale) what

let private layouts = [
    "one rank", Recipe.Default.WithParallelism(1, 1, 1, 1)
    "unfused", Recipe.Default.WithParallelism(1, 1, 1, 1).WithFusion false
    "experts over two ranks", Recipe.Default.WithParallelism(1, 1, 2, 2)
    "by all-gather", Recipe.Default.WithParallelism(1, 1, 2, 2).WithDispatcher Dispatcher.AllGather
    "flex", Recipe.Default.WithParallelism(1, 1, 2, 2).WithDispatcher Dispatcher.Flex
    "tensor parallel, two stages", Recipe.Default.WithParallelism(2, 2, 2, 1).WithLayout "Et|tmL"
]

/// Losses of two steps of training on batches with this token mask.
let private trainedOn masked (mask: float32[] | null) =
    let plan =
        DeepSeekV3(config, Masked = masked)
            .Compile(Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(2, 1, seqLength))

    let rows = Array.append (tokens 1) (tokens 2)

    let batches = {
        new IBatchSource with
            member _.Get _ = TrainingBatch(2, columns, rows, TokenMask = mask)
    }

    task {
        use! trainer = Trainer.StartAsync(plan, TrainerOptions(Executor = Executor.Interpreter, Batches = batches))
        let run = trainer.RunAsync(2L).GetAsyncEnumerator()
        let! _ = run.MoveNextAsync()
        let first = run.Current.Loss
        let! _ = run.MoveNextAsync()
        return first, run.Current.Loss
    }
    |> _.GetAwaiter().GetResult()

let private training =
    testCase "training: a batch without a token mask has no padding, and one with a mask routes fewer tokens"
    <| fun () ->
        Expect.equal (trainedOn true null) (trainedOn false null) "none"
        Expect.equal (trainedOn true (Array.create (2 * seqLength) 1f)) (trainedOn false null) "all ones"
        let half = Array.init (2 * seqLength) (fun i -> if i % 2 = 0 then 1f else 0f)
        Expect.notEqual (trainedOn true half) (trainedOn false null) "half"

let tests =
    testList "token mask" [
        training

        for name, recipe in layouts do
            testCase name
            <| fun () ->
                let kept = [| tokens 1; tokens 2 |]
                // rows 1 and 3 are padding
                let rows a b = [| kept[0]; a; kept[1]; b |]
                let valid = [| 1f; 0f; 1f; 0f |]
                let first = run true recipe (rows (tokens 3) (tokens 4)) valid
                let other = run true recipe (rows (tokens 5) (tokens 6)) valid
                let alone = run false (Recipe.Default.WithParallelism(1, 1, 1, 1)) kept [| 1f; 1f |]

                let kept (outcome: Outcome) =
                    let row r = Array.sub outcome.Logits (r * seqLength * vocab) (seqLength * vocab)
                    Array.append (row 0) (row 2)

                Expect.equal (kept first) (kept other) "what padding holds changes no bit"
                close "logits without the padding" (kept first) alone.Logits
                Expect.equal first.Counted (float (2 * seqLength * 2)) "two experts a token that counts"
                Expect.equal first.Counted alone.Counted "counts"

                for pair in alone.Gradients do
                    Expect.equal first.Gradients[pair.Key] other.Gradients[pair.Key] $"no bit of %s{pair.Key}"
                    close pair.Key first.Gradients[pair.Key] pair.Value
    ]

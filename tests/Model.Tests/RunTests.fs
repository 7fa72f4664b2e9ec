/// The golden cases again, compiled and run: on one rank, and split over eight.
module DeepSeekGraph.Models.Tests.RunTests

open System
open System.Collections.Generic
open System.Threading
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime.Parameters
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Models.Tests.Golden

let private tensor (data: float32[]) (extents: int seq) = torch.tensor(data).reshape [| for e in extents -> int64 e |]

let private floats (whole: torch.Tensor) =
    use flat = whole.to_type(torch.ScalarType.Float32).contiguous()
    Array.map float (flat.data<float32>().ToArray())

let private inputs (case: Case) =
    let values = Dictionary<string, torch.Tensor>()

    for node in case.Graph.Nodes do
        match node.Op with
        | Op.Input(name, t) when t.Rank > 0 ->
            let x = tensor (Array.map float32 (input case name)) t.Extents

            values[name] <- if t.DType.IsFloat then x else x.to_type torch.ScalarType.Int64
        | _other -> ()

    values :> IReadOnlyDictionary<string, torch.Tensor>

/// Losses by metric, and gradients, of a plan's forward and backward pass.
let private run (case: Case) (recipe: Recipe) (check: Trainer -> unit) =
    let plan =
        case.Model.Compile(
            recipe.WithName("golden").WithBatch(case.Batch, case.Batch / Compilation.Mesh(recipe).Data, case.SeqLength)
        )

    let extents = Dictionary<string, IReadOnlyList<int>>()

    for p in plan.Parameters do
        extents[p.Name] <- p.Extents

    let weight name : torch.Tensor | null = tensor (parameter case name) extents[name]

    task {
        use! trainer = Trainer.StartAsync(plan, TrainerOptions(Weights = Func<string, torch.Tensor | null> weight))

        do! trainer.ForwardBackwardAsync([| inputs case |], null, CancellationToken.None)
        check trainer
    }
    |> _.GetAwaiter().GetResult()

let private close what (ours: float[]) (reference: float32[]) = Expect.isLessThan (distance ours reference) 2e-5 what

/// Slots of logits, and their names in the reference.
let private observed (losses: (string * string) list) = [
    "observe:logits", "logits"

    if losses.Length > 1 then
        "observe:mtp_logits", "mtp_logits"
]

let private golden name seqLength (losses: (string * string) list) how (recipe: Recipe) =
    testCase $"%s{name}, %s{how}"
    <| fun () ->
        use case = load name 2 seqLength

        run case recipe (fun trainer ->
            let last = trainer.Plan.Stages.Count - 1

            for metric, reference in losses do
                use loss = Gathering.Slot(trainer.Ranks, last, $"acc:%s{metric}")
                close reference (floats loss) (case.Reference.ReadFloat32 reference)

            for slot, reference in observed losses do
                use logits = Gathering.Slot(trainer.Ranks, last, slot)
                let expected = case.Reference.ReadFloat32 reference
                let positions = expected.Length / (case.Batch * int logits.shape[2])
                // multi-token prediction has no label for the last position
                use compared = logits.narrow (1L, 0L, int64 positions)
                close reference (floats (compared.contiguous ())) expected

            let gathered = trainer.GatherGradients()

            for tensor, ours, reference in gradients case name (fun p -> floats gathered[p]) do
                close $"gradient of %s{tensor}" ours reference)

let private plain = [ "metric:loss", "loss" ]
let private multi = [ "metric:loss", "main_loss"; "metric:mtp_loss", "mtp_loss" ]
let private one = Recipe.Default.WithParallelism(1, 1, 1, 1)

let private eight = Recipe.Default.WithParallelism(tensor = 2, pipeline = 2, expert = 2, data = 2)

/// Sequences that count on from a start of their own.
type private Counting(rows: int, columns: int, vocab: int) =
    interface IBatchSource with
        member _.Get step =
            let token i = int64 ((int step * 7 + i / columns * 5 + i % columns) % vocab)

            TrainingBatch(rows, columns, Array.init (rows * columns) token)

/// Losses of the first steps of training.
let private losses (model: Model) (vocab: int) (recipe: Recipe) =
    let plan = model.Compile recipe

    let batches = Counting(recipe.GlobalBatch, recipe.SeqLength + model.ExtraTokens, vocab)

    task {
        use! trainer = Trainer.StartAsync(plan, TrainerOptions(Batches = batches, LearningRate = LearningRate(1e-2)))

        let seen = List<float>()
        let steps = trainer.RunAsync(4L).GetAsyncEnumerator()

        try
            while! steps.MoveNextAsync() do
                seen.Add steps.Current.Loss
        finally
            steps.DisposeAsync().AsTask().Wait()

        return List.ofSeq seen
    }
    |> _.GetAwaiter().GetResult()

/// Every layout computes the same steps.
let private agrees name (model: Model) vocab (base': Recipe) (others: (string * Recipe) list) =
    testCase $"%s{name}: training is the same on any mesh"
    <| fun () ->
        let expected = losses model vocab (base'.WithParallelism(1, 1, 1, 1).WithLayout "")
        Expect.isLessThan (List.last expected) (List.head expected) "it learns"

        for how, recipe in others do
            for a, b in List.zip expected (losses model vocab recipe) do
                Expect.isLessThan (abs (a - b) / a) 1e-4 how

let private ownRecipe = Recipe.Default.WithBatch(8, 1, 16)
let private p (t, pp, e, d) (recipe: Recipe) = recipe.WithParallelism(t, pp, e, d)

let tests =
    testList "run" [
        golden "v3_tiny_plain" 96 plain "one rank" one
        golden "v3_tiny_plain" 96 plain "one rank, nothing fused" (one.WithFusion false)
        golden "v3_tiny_yarn" 96 plain "one rank" one
        golden "v3_tiny_mtp" 80 multi "one rank" one
        golden "v3_tiny_mtp" 80 multi "eight ranks" eight
        golden
            "v3_tiny_plain"
            96
            plain
            "four tensor and expert parallel ranks"
            (Recipe.Default.WithParallelism(4, 1, 4, 1))
        agrees "deepseek_v3_tiny" (DeepSeekV3 Presets.Tiny) 256 (Recipes.Tiny.Recipe.WithBatch(8, 1, 32)) [
            "eight ranks", Recipes.Tiny.Recipe.WithBatch(8, 1, 32)
        ]
        agrees "a model of one's own" (ModelTests.tinyMoe 32 8) 64 ownRecipe [
            "data", p (1, 1, 1, 2) ownRecipe
            "tensor and expert", p (2, 1, 2, 1) ownRecipe
            "tensor, expert, data", p (2, 1, 4, 2) ownRecipe
        ]
    ]

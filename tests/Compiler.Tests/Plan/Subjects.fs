/// Small real plans to damage, and one step of a plan run in this process.
module DeepSeekGraph.Compiler.Tests.Subjects

open System
open System.Threading
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime
open DeepSeekGraph.Runtime.Training

/// Every part of DeepSeek-V3, as small as it splits.
let private config layers =
    DeepSeekV3Config(
        VocabSize = 16,
        HiddenSize = 8,
        NumHiddenLayers = layers,
        InitializerRange = 0.3,
        NumAttentionHeads = 4,
        QLoraRank = 4,
        KvLoraRank = 4,
        QkNopeHeadDim = 4,
        QkRopeHeadDim = 2,
        VHeadDim = 4,
        RopeScaling = YarnScaling(Factor = 4.0, OriginalMaxPositionEmbeddings = 4),
        IntermediateSize = 8,
        FirstKDenseReplace = 1,
        MoeIntermediateSize = 4,
        NRoutedExperts = 8,
        NumExpertsPerTok = 2,
        NGroup = 4,
        TopkGroup = 2
    )

/// The graph of a microbatch.
let declare layers rows (columns: int) = (DeepSeekV3(config layers)).Declare(rows, columns)

let compile layers (recipe: Recipe) = (DeepSeekV3(config layers)).Compile recipe

let private base' = Recipe.Default.WithBatch(8, 1, 8).WithOverlapGradReduce false

/// Tensor, pipeline, expert and data parallel by two; the embedding is tied over stages.
let eight = lazy compile 2 (base'.WithParallelism(2, 2, 2, 2).WithLayout "Et|tmL")
/// Experts over tensor and data ranks, no pipeline.
let experts = lazy compile 2 (base'.WithParallelism(2, 1, 4, 2))

/// Gradients reduced beside the backward pass, in many small buckets; its weight gradients come in parts.
let reduced = lazy compile 2 (base'.WithParallelism(2, 1, 2, 2).WithOverlapGradReduce(true).WithGradBucketSize 64)

/// Experts' rows in blocks of four, moved by the fused dispatch and gathered over expert tensor ranks.
let blocks =
    lazy
        compile
            2
            (base'
                .WithParallelism(2, 1, 2, 2)
                .WithExpertTensorParallel(2)
                .WithDispatcher(Dispatcher.Flex)
                .WithPermutePadding
                4)

/// bf16 weights whose shards are updated beside remainders of 16 bits.
let remainders =
    lazy
        compile
            2
            (base'
                .WithParallelism(2, 1, 2, 2)
                .WithDType(DType.BFloat16)
                .WithStateTypes(MainParams.Remainder, DType.Float32, DType.Float32, DType.Float32))

/// Forwards that take turns with backwards: on one pipeline rank, where gradients are reduced meanwhile, and over chunks of two.
let paired =
    lazy
        compile
            2
            (base'
                .WithParallelism(2, 1, 2, 2)
                .WithOverlapGradReduce(true)
                .WithGradBucketSize(64)
                .WithOverlapMoeExpertParallelComm
                true)

let pairedChunks =
    lazy
        compile
            3
            (base'
                .WithParallelism(1, 2, 2, 2)
                .WithVirtualPipeline(2)
                .WithLayout("Et|t|t|mL")
                .WithOverlapMoeExpertParallelComm
                true)

/// Four stages, one rank each.
let four = lazy compile 3 (base'.WithParallelism(1, 4, 1, 1).WithLayout "Et|t|t|mL")
/// Four stages, all forwards first.
let gpipe = lazy compile 3 (base'.WithParallelism(1, 4, 1, 1).WithLayout("Et|t|t|mL").WithSchedule Schedule.GPipe)
/// Many stages and messages.
let deep = lazy compile 14 (base'.WithParallelism(1, 14, 1, 1).WithLayout "Et|(t|)*12tmL")

/// Sixteen stages like those of the 671B recipe, with tensor and expert parallelism, of a layer each.
let sixteen =
    lazy
        (compile
            16
            (base'
                .WithParallelism(2, 16, 4, 2)
                .WithLayout("Et|(t|)*14tmL")
                .WithBatch(32, 1, 8)
                .WithDType(DType.BFloat16)))

/// Four parts of the model on two ranks: messages go around; the embedding is tied over ranks and chunks.
let woven group = compile 3 (base'.WithParallelism(1, 2, 1, 1).WithVirtualPipeline(2, group).WithLayout "Et|t|t|mL")
let interleaved = lazy woven 2
/// Three parts on one rank: no message at all.
let folded = lazy compile 3 (base'.WithParallelism(1, 1, 1, 1).WithVirtualPipeline(3).WithLayout "Et|t|tmL")

/// DeepSeek-V3 on 1024 ranks as Megatron's H100 benchmark lays it out.
let benchmark =
    lazy
        (DeepSeekV3(Presets.V3))
            .Compile(
                Recipes.Pretrain.Recipe
                    .WithParallelism(2, 8, 64, 64)
                    .WithVirtualPipeline(4)
                    .WithLayout("Et|(tt|)*30mL")
                    .WithBatch(8192, 1, 4096)
            )

/// Other recipes whose plans must pass.
let others = [
    "one rank", lazy compile 2 (base'.WithParallelism(1, 1, 1, 1))
    "tensor parallel by four", lazy compile 2 (base'.WithParallelism(4, 1, 4, 1))
    "data parallel by four", lazy compile 2 (base'.WithParallelism(1, 1, 2, 4).WithOverlapGradReduce true)
    "interleaved, reduced chunk by chunk",
    lazy
        compile
            3
            (base'
                .WithParallelism(1, 2, 2, 2)
                .WithVirtualPipeline(2)
                .WithLayout("Et|t|t|mL")
                .WithOverlapGradReduce(true)
                .WithGradBucketSize
                64)
    "nothing fused", lazy compile 2 (base'.WithParallelism(2, 2, 2, 2).WithFusion false)
    "bf16, recomputed",
    lazy compile 2 (base'.WithParallelism(2, 2, 4, 4).WithDType(DType.BFloat16).WithRecompute "core_attn")
    "deepseek_v3_tiny", lazy Recipes.Tiny.Compile()
    "deepseek_v3_proxy", lazy Recipes.Proxy.Compile()
    "deepseek_v3_pretrain", lazy Recipes.Pretrain.Compile()
]

/// What one step leaves behind.
type Outcome = {
    Loss: float
    GradNorm: float
    /// Gradients and updated parameters by name.
    Tensors: Map<string, float32[]>
}

let private tokens (plan: PlanSet) =
    let rows = plan.Microbatches * plan.MicroBatch
    let columns = plan.Inputs |> Seq.find (fun i -> i.Name = "tokens") |> fun i -> i.Extents[1]
    let data = Array.init (rows * columns) (fun i -> int64 ((i * 7 + i / 5) % 16))

    {
        new IBatchSource with
            member _.Get _ = TrainingBatch(rows, columns, data)
    }

let private floats (whole: torch.Tensor) =
    use flat = whole.to_type(torch.ScalarType.Float32).contiguous()
    flat.data<float32>().ToArray()

/// One whole step of all ranks; none when they fail or get stuck.
let run (plan: PlanSet) : Outcome option =
    let step = task {
        use stop = new CancellationTokenSource(TimeSpan.FromSeconds 60.0)
        use! trainer = Trainer.StartAsync(plan, TrainerOptions(Batches = tokens plan), stop.Token)
        let steps = trainer.RunAsync(1L, stop.Token).GetAsyncEnumerator stop.Token
        let! _ = steps.MoveNextAsync()
        let metrics = steps.Current

        let named prefix (tensors: System.Collections.Generic.IReadOnlyDictionary<string, torch.Tensor>) = [
            for KeyValue(name, tensor) in tensors do
                use tensor = tensor
                prefix + name, floats tensor
        ]

        return {
            Loss = metrics.Loss
            GradNorm = metrics.GradNorm
            Tensors = Map(named "grad:" (trainer.GatherGradients()) @ named "" (trainer.GatherParameters()))
        }
    }

    try
        Some(step.GetAwaiter().GetResult())
    with
    | :? RuntimeException
    | :? OperationCanceledException -> None

/// The same numbers up to the rounding of another order of microbatches.
let same (a: Outcome) (b: Outcome) =
    let close (x: float) (y: float) = abs (x - y) <= 1e-5 * (abs x + abs y) + 1e-7

    let near name =
        let x, y = a.Tensors[name], b.Tensors[name]
        let norm (v: float32[]) = v |> Array.sumBy (fun e -> float e * float e) |> sqrt
        norm (Array.map2 (-) x y) <= 1e-4 * (norm x + 1e-4)

    close a.Loss b.Loss && close a.GradNorm b.GradNorm && a.Tensors.Keys |> Seq.forall near

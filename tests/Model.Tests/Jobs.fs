/// Random small models on random legal meshes, with layouts and schedules; and their shrinker.
module DeepSeekGraph.Models.Tests.Jobs

open FsCheck
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models

/// Everything that a comparison of two compilations may vary.
type Job = {
    Layers: int
    Dense: int
    Mtp: int
    DirectQ: bool
    Yarn: bool
    Tensor: int
    Data: int
    Expert: int
    Context: int
    ExpertTensor: int
    SequenceParallel: bool
    Dispatcher: Dispatcher
    Pipeline: int
    /// Chunks of each pipeline rank, and microbatches that a chunk runs in a row (0: as many as ranks).
    Virtual: int
    Group: int
    /// Lengths of the cuts of the layout string, between units.
    Cuts: int list
    GPipe: bool
    Recompute: string list
    Fuse: bool
    Bf16: bool
    Microbatches: int
    SeqLength: int
} with

    /// Sizes that split by 2 and 4.
    member this.Config =
        DeepSeekV3Config(
            VocabSize = 16,
            HiddenSize = 8,
            NumHiddenLayers = this.Layers,
            InitializerRange = 0.3,
            NumAttentionHeads = 4,
            QLoraRank = (if this.DirectQ then 0 else 4),
            KvLoraRank = 4,
            QkNopeHeadDim = 4,
            QkRopeHeadDim = 2,
            VHeadDim = 4,
            RopeScaling = (if this.Yarn then YarnScaling(Factor = 4.0, OriginalMaxPositionEmbeddings = 4) else null),
            IntermediateSize = 8,
            FirstKDenseReplace = this.Dense,
            MoeIntermediateSize = 4,
            NRoutedExperts = 8,
            NumExpertsPerTok = 2,
            NGroup = 4,
            TopkGroup = 2,
            NumNextnPredictLayers = this.Mtp,
            // large enough to be seen in sums of float32
            SeqAuxLossAlpha = 0.05
        )

    /// Letters of the units in order.
    member this.Units = "E" + String.replicate this.Layers "t" + String.replicate this.Mtp "m" + "L"

    /// Stages of the model.
    member this.Stages = this.Pipeline * this.Virtual

    /// The layout that the cuts make; empty for one stage.
    member this.Layout =
        if this.Stages = 1 then
            ""
        else
            let stages = Array.create this.Stages ""
            let ends = this.Cuts |> List.sort |> List.truncate (this.Stages - 1)

            this.Units
            |> Seq.iteri (fun i letter ->
                let stage = ends |> List.filter (fun e -> e <= i) |> List.length
                stages[stage] <- stages[stage] + string letter)

            String.concat "|" stages

    member this.Recipe =
        Recipe.Default
            .WithName("random")
            .WithParallelism(this.Tensor, this.Pipeline, this.Expert, this.Data)
            .WithContextParallel(this.Context)
            .WithExpertTensorParallel(this.ExpertTensor)
            .WithSequenceParallel(this.SequenceParallel)
            .WithDispatcher(this.Dispatcher)
            .WithRanksPerNode(2)
            .WithVirtualPipeline(this.Virtual, this.Group)
            .WithLayout(this.Layout)
            .WithSchedule(if this.GPipe then Schedule.GPipe else Schedule.OneFOneB)
            .WithFusion(this.Fuse)
            .WithDType(if this.Bf16 then DType.BFloat16 else DType.Float32)
            .WithBatch(this.Microbatches * 4, 4 / this.Data, this.SeqLength)
            .WithRecompute(Array.ofList this.Recompute)

    /// The same job on one rank.
    member this.Single = {
        this with
            Tensor = 1
            Data = 1
            Expert = 1
            Context = 1
            ExpertTensor = 1
            SequenceParallel = true
            Dispatcher = Dispatcher.AllToAll
            Pipeline = 1
            Virtual = 1
            Group = 0
            GPipe = false
            Recompute = []
    }

    /// Do stages differ in their number of layers?
    member this.Uneven =
        this.Stages > 1
        && this.Layout.Split '|'
           |> Array.map (Seq.filter ((=) 't') >> Seq.length)
           |> Array.distinct
           |> Array.length
            >
            1

/// Ranks of a stage.
let ranks (job: Job) = job.Tensor * job.Context * job.Data

/// Does the compiler take it? (Megatron's rules: MTP behind every layer, not on the first stage.)
let legal (job: Job) =
    job.Dense <= job.Layers
    && 4 % job.Data = 0
    && (job.Tensor * job.Context * job.Data) % (job.Expert * job.ExpertTensor) = 0
    && job.SeqLength % (2 * job.Context) = 0
    && job.SeqLength % (job.Context * job.Tensor) = 0
    && ranks job <= 16
    && job.Cuts |> List.distinct |> List.length >= job.Stages - 1
    && (match Mesh.create job.Recipe.Degrees with
        | Ok mesh -> (RecipeCheck.pipeline job.Recipe mesh).IsOk
        | Error _ -> false)
    && (job.Stages = 1
        || (match LayoutString.parse job.Layout with
            | Ok stages -> (LayoutString.check stages job.Layers job.Mtp job.Pipeline job.Virtual).IsEmpty
            | Error _ -> false))

let private some = Gen.elements

let private jobs (pipelines: int list) (chunks: int list) = gen {
    let! layers = some [ 2; 3; 4 ]
    let! dense = some [ 0; 1 ]
    let! mtp = some [ 0; 1 ]
    let! directQ = some [ false; false; true ]
    let! yarn = some [ true; false ]
    let! tensor = some [ 1; 2; 2; 4 ]
    let! data = some [ 1; 2; 2; 4 ]
    let! expert = some [ 1; 2; 2; 4; 8 ]
    let! context = some [ 1; 1; 2; 4 ]
    let! expertTensor = some [ 1; 1; 2; 4 ]
    let! sequenceParallel = some [ true; false ]
    let! dispatcher = some [ Dispatcher.AllToAll; Dispatcher.AllGather; Dispatcher.Flex; Dispatcher.Auto ]
    let! pipeline = some pipelines
    let! chunks = some chunks
    let! group = some [ 0; 0; 3; 4 ]
    let pipeline = min pipeline (layers + mtp)
    let chunks = max 1 (min chunks ((layers + mtp + 1) / pipeline))
    // with chunks, the loss may be a stage of its own
    let! cuts = Gen.shuffle [| 1 .. layers + mtp + min 1 (chunks - 1) |]
    let! gpipe = some [ false; true ]
    let! recomputed = Gen.subListOf Recompute.names
    let! recompute = some [ []; recomputed; [ "full" ] ]
    let! fuse = some [ true; true; false ]
    let! bf16 = some [ false; false; true ]
    let! microbatches = some [ 1; 2; 3; 5 ]
    let! seqLength = some [ 4; 8; 8; 16 ]

    return {
        Layers = layers
        Dense = dense
        Mtp = mtp
        DirectQ = directQ
        Yarn = yarn
        Tensor = tensor
        Data = data
        Expert = expert
        Context = context
        ExpertTensor = expertTensor
        SequenceParallel = sequenceParallel
        Dispatcher = dispatcher
        Pipeline = pipeline
        Virtual = chunks
        Group = if chunks = 1 then 0 else group
        Cuts = cuts |> List.ofSeq |> List.truncate (pipeline * chunks - 1)
        GPipe = gpipe && chunks = 1
        Recompute = recompute
        Fuse = fuse
        Bf16 = bf16
        Microbatches = if chunks = 1 then microbatches else max microbatches pipeline
        SeqLength = seqLength
    }
}

/// Smaller jobs that are still legal, the boldest first.
let shrink (job: Job) : Job seq =
    seq {
        if job.Virtual > 1 then
            {
                job with
                    Virtual = job.Virtual - 1
                    Group = if job.Virtual = 2 then 0 else job.Group
                    Cuts = List.truncate (job.Pipeline * (job.Virtual - 1) - 1) job.Cuts
            }

        if job.Pipeline > 1 then
            {
                job with
                    Pipeline = job.Pipeline - 1
                    Cuts = List.truncate ((job.Pipeline - 1) * job.Virtual - 1) job.Cuts
            }

        if job.Expert > 1 then
            { job with Expert = job.Expert / 2 }

        if job.ExpertTensor > 1 then
            {
                job with
                    ExpertTensor = job.ExpertTensor / 2
            }

        if job.Context > 1 then
            { job with Context = job.Context / 2 }

        if not job.SequenceParallel then
            { job with SequenceParallel = true }

        if job.Dispatcher <> Dispatcher.AllToAll then
            {
                job with
                    Dispatcher = Dispatcher.AllToAll
            }

        if job.Tensor > 1 then
            { job with Tensor = job.Tensor / 2 }

        if job.Data > 1 then
            { job with Data = job.Data / 2 }

        if job.Layers > 1 && job.Stages = 1 then
            {
                job with
                    Layers = job.Layers - 1
                    Cuts = []
            }

        if job.Mtp > 0 && job.Stages = 1 then
            { job with Mtp = 0; Cuts = [] }

        if job.Bf16 then
            { job with Bf16 = false }

        for name in job.Recompute do
            {
                job with
                    Recompute = List.except [ name ] job.Recompute
            }

        if job.Yarn then
            { job with Yarn = false }

        if job.GPipe then
            { job with GPipe = false }

        if job.Microbatches > 1 then
            { job with Microbatches = 1 }

        if job.SeqLength > 4 then
            { job with SeqLength = 4 }
    }
    |> Seq.filter legal

/// Jobs of one stage: what partition does.
type OneStage =
    static member Job() : Arbitrary<Job> = Arb.fromGenShrink (jobs [ 1 ] [ 1 ] |> Gen.where legal, shrink)

/// Jobs of any number of stages.
type AnyStages =
    static member Job() : Arbitrary<Job> =
        Arb.fromGenShrink (jobs [ 1; 2; 2; 3; 4 ] [ 1; 1; 2; 3 ] |> Gen.where legal, shrink)

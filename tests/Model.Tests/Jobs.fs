/// Random small models on random legal meshes, with layouts and schedules; and their shrinker.
module DeepSeekGraph.Models.Tests.Jobs

open FsCheck
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models

/// How tokens choose among eight experts: top-k of the groups that are kept.
type Routing = {
    TopK: int
    Groups: int
    Keep: int
    /// Experts of dropped groups score zero, as Hugging Face has it.
    ZeroMasked: bool
    /// Weights of a token's experts sum to one.
    Normalize: bool
    /// Scores are shares of all experts.
    Softmax: bool
    Method: TopkMethod
}

/// Everything that a comparison of two compilations may vary.
type Job = {
    Layers: int
    Dense: int
    Mtp: int
    DirectQ: bool
    Yarn: bool
    Routing: Routing
    Shared: int
    /// Is there a sequence-wise balance loss?
    Balance: bool
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
    Fusions: FusionChoice
    Bf16: bool
    /// Extent of fp8 blocks; 0: none.
    Fp8: int
    /// Rows of an expert stand in blocks of a multiple of so many.
    Padding: int
    /// Masters and moments split over copies; gradients and moments in bf16.
    DistributedOptimizer: bool
    NarrowStates: bool
    /// Masters of bf16 weights as remainders of 16 bits.
    Remainders: bool
    /// Gradients reduced at the end of the step instead of beside the backward pass; elements of a bucket, 0: Megatron's.
    LateReduce: bool
    Bucket: int
    /// Steps in the order of the graph.
    InOrder: bool
    /// A forward takes turns with the backward of another microbatch.
    Paired: bool
    Microbatches: int
    /// Sequences of a microbatch on one data rank.
    Batch: int
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
            NSharedExperts = this.Shared,
            NRoutedExperts = 8,
            NumExpertsPerTok = this.Routing.TopK,
            NGroup = this.Routing.Groups,
            TopkGroup = this.Routing.Keep,
            ZeroMaskedGroups = this.Routing.ZeroMasked,
            NormTopkProb = this.Routing.Normalize,
            ScoringFunc = (if this.Routing.Softmax then ScoringFunc.Softmax else ScoringFunc.Sigmoid),
            TopkMethod = this.Routing.Method,
            NumNextnPredictLayers = this.Mtp,
            // large enough to be seen in sums of float32
            SeqAuxLossAlpha = (if this.Balance then 0.05 else 0.0)
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
            .WithFusions(this.Fusions)
            .WithDType(if this.Bf16 then DType.BFloat16 else DType.Float32)
            .WithFp8(this.Fp8)
            .WithPermutePadding(this.Padding)
            .WithDistributedOptimizer(this.DistributedOptimizer)
            .WithOverlapGradReduce(not this.LateReduce)
            .WithGradBucketSize(this.Bucket)
            .WithOverlap(not this.InOrder)
            .WithOverlapMoeExpertParallelComm(this.Paired)
            .WithStateTypes(this.Masters, this.States, this.States, this.States)
            .WithBatch(this.Microbatches * this.Batch * this.Data, this.Batch, this.SeqLength)
            .WithRecompute(Array.ofList this.Recompute)

    /// Element type of gradients and moments.
    member this.States = if this.NarrowStates then DType.BFloat16 else DType.Float32

    /// How fp32 masters are kept.
    member this.Masters = if this.Remainders then MainParams.Remainder else MainParams.Float32

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
            Paired = false
            Recompute = []
            Padding = 1
            Batch = this.Batch * this.Data
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

/// Do fp8 blocks fall as on one rank: no split of experts' features, no half of a block of the zigzag cuts one?
let fp8Fits (job: Job) =
    job.Fp8 = 0
    || (4 % (job.ExpertTensor * job.Fp8) = 0
        && (job.Context = 1 || job.SeqLength % (2 * job.Context * job.Fp8) = 0))

/// Does the compiler take it? (Megatron's rules: MTP behind every layer, not on the first stage.)
let legal (job: Job) =
    job.Dense <= job.Layers
    && fp8Fits job
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

let private routing (topK, groups, keep) = {
    TopK = topK
    Groups = groups
    Keep = keep
    ZeroMasked = false
    Normalize = true
    Softmax = false
    Method = TopkMethod.NoauxTc
}

/// From one expert a token to all, of one group, two or four.
let private routings =
    List.map routing [
        1, 1, 1
        2, 4, 2
        2, 4, 2
        2, 1, 1
        1, 4, 1
        3, 4, 3
        4, 2, 1
        2, 2, 2
        8, 1, 1
    ]

let private rules = Fusion.Rules.all |> List.map _.Name

/// Rules that a choice takes.
let fused (job: Job) = rules |> List.filter job.Fusions.Takes

/// Every part of the model on one rank: two mixtures of experts, one dense layer, one depth of MTP; everything fused.
let plain: Job = {
    Layers = 3
    Dense = 1
    Mtp = 1
    DirectQ = false
    Yarn = true
    Routing = routing (2, 4, 2)
    Shared = 1
    Balance = true
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
    Cuts = []
    GPipe = false
    Recompute = []
    Fusions = FusionChoice.All
    Bf16 = false
    Fp8 = 0
    Padding = 1
    DistributedOptimizer = true
    NarrowStates = false
    Remainders = false
    LateReduce = false
    Bucket = 0
    InOrder = false
    Paired = false
    Microbatches = 2
    Batch = 1
    SeqLength = 8
}

let private jobs (pipelines: int list) (chunks: int list) = gen {
    let! layers = some [ 2; 3; 4 ]
    let! dense = some [ 0; 1 ]
    let! mtp = some [ 0; 1; 1; 2 ]
    let! directQ = some [ false; false; true ]
    let! yarn = some [ true; false ]
    let! routing = some routings
    let! zeroMasked = some [ false; false; true ]
    let! normalize = some [ true; true; false ]
    let! softmax = some [ false; false; true ]

    let! method =
        some [
            TopkMethod.NoauxTc
            TopkMethod.NoauxTc
            TopkMethod.GroupLimitedGreedy
            TopkMethod.Greedy
        ]

    let! shared = some [ 1; 1; 0; 2 ]
    let! balance = some [ true; false ]
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
    let! some' = Gen.subListOf rules

    let! fusions =
        some [
            FusionChoice.All
            FusionChoice.All
            FusionChoice.None
            FusionChoice.Only some'
            FusionChoice.AllBut some'
        ]

    let! bf16 = some [ false; false; true ]
    let! fp8 = some [ 0; 0; 2; 4 ]
    let! padding = some [ 1; 2; 4 ]
    let! distributed = some [ true; true; false ]
    let! narrow = some [ false; true ]
    let! microbatches = some [ 1; 2; 3; 5 ]
    let! batch = some [ 1; 1; 2 ]
    let! seqLength = some [ 4; 8; 8; 16 ]
    let! remainders = some [ false; true ]
    let! late = some [ false; false; true ]
    let! bucket = some [ 0; 1; 100; 1000 ]
    let! inOrder = some [ false; false; true ]
    let! paired = some [ false; false; true ]
    let paired = paired && (pipeline = 1 || chunks > 1) && microbatches > 1

    let job = {
        Layers = layers
        Dense = dense
        Mtp = mtp
        DirectQ = directQ
        Yarn = yarn
        Routing = {
            routing with
                ZeroMasked = zeroMasked
                Normalize = normalize
                Softmax = softmax
                Method = method
        }
        Shared = shared
        Balance = balance
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
        GPipe = gpipe && chunks = 1 && not paired
        Recompute = recompute
        Fusions = fusions
        Bf16 = bf16
        Fp8 = fp8
        Padding = padding
        DistributedOptimizer = distributed
        NarrowStates = narrow
        Remainders = remainders
        LateReduce = late
        Bucket = bucket
        InOrder = inOrder
        Paired = paired
        Microbatches = if chunks = 1 then microbatches else max microbatches pipeline
        Batch = batch
        SeqLength = seqLength
    }

    return if fp8Fits job then job else { job with Fp8 = 0 }
}

let private dispatchers = [ Dispatcher.AllToAll; Dispatcher.AllGather; Dispatcher.Flex; Dispatcher.Auto ]

/// What a step of the shrinker makes smaller: degrees, lengths, and one for each choice that is not the plainest.
let size (job: Job) =
    let chosen yes = if yes then 1 else 0

    List.sum [
        job.Layers + job.Dense + job.Mtp + job.Shared
        job.Tensor + job.Data + job.Expert + job.Context + job.ExpertTensor
        job.Pipeline + job.Virtual
        job.Routing.TopK + job.Routing.Groups + job.Routing.Keep
        job.Microbatches + job.Batch + job.SeqLength + job.Fp8 + job.Padding
        job.Recompute.Length + (fused job).Length
        List.findIndex ((=) job.Dispatcher) dispatchers
        chosen job.Routing.ZeroMasked
        chosen (not job.Routing.Normalize)
        chosen job.Routing.Softmax
        chosen (job.Routing.Method <> TopkMethod.NoauxTc)
        chosen (not job.SequenceParallel)
        chosen (not job.DirectQ)
        chosen job.Yarn
        chosen job.Balance
        chosen job.GPipe
        chosen job.Bf16
        chosen (not job.DistributedOptimizer)
        chosen job.NarrowStates
        chosen job.Remainders
        chosen job.LateReduce
        chosen (job.Bucket > 0)
        chosen job.InOrder
        chosen job.Paired
    ]

/// Ways to keep `n` of the cuts; the last, behind each of the first units, is legal whatever the model.
let private fewer n (cuts: int list) =
    let sorted = List.sort cuts

    List.distinct [
        List.truncate n cuts
        List.truncate n sorted
        List.skip (sorted.Length - n) sorted
        [ 1..n ]
    ]

/// Smaller jobs that are still legal, the boldest first.
let shrink (job: Job) : Job seq =
    let plainRouting = routing (1, 1, 1)

    seq {
        if job.Virtual > 1 then
            for cuts in fewer (job.Pipeline * (job.Virtual - 1) - 1) job.Cuts do
                {
                    job with
                        Virtual = job.Virtual - 1
                        Group = if job.Virtual = 2 then 0 else job.Group
                        Cuts = cuts
                }

        if job.Pipeline > 1 then
            for cuts in fewer ((job.Pipeline - 1) * job.Virtual - 1) job.Cuts do
                {
                    job with
                        Pipeline = job.Pipeline - 1
                        Cuts = cuts
                }

        // rules one by one only once none at all was tried
        match fused job with
        | [] -> ()
        | rules ->
            { job with Fusions = FusionChoice.None }

            if rules.Length > 1 then
                for rule in rules do
                    {
                        job with
                            Fusions = FusionChoice.Only(List.except [ rule ] rules)
                    }

        if job.Fp8 > 0 then
            { job with Fp8 = 0 }

        if job.Fp8 > 2 then
            { job with Fp8 = 2 }

        if job.Padding > 1 then
            { job with Padding = job.Padding / 2 }

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

        if job.Routing <> plainRouting then
            { job with Routing = plainRouting }

        if job.Routing.ZeroMasked then
            {
                job with
                    Routing = { job.Routing with ZeroMasked = false }
            }

        if not job.Routing.Normalize then
            {
                job with
                    Routing = { job.Routing with Normalize = true }
            }

        if job.Routing.Softmax then
            {
                job with
                    Routing = { job.Routing with Softmax = false }
            }

        if job.Routing.Method <> TopkMethod.NoauxTc then
            {
                job with
                    Routing = {
                        job.Routing with
                            Method = TopkMethod.NoauxTc
                    }
            }

        if job.Shared > 0 then
            { job with Shared = job.Shared - 1 }

        if job.Balance then
            { job with Balance = false }

        if job.Layers > 1 && job.Stages = 1 then
            {
                job with
                    Layers = job.Layers - 1
                    Cuts = []
            }

        if job.Mtp > 0 && job.Stages = 1 then
            {
                job with
                    Mtp = job.Mtp - 1
                    Cuts = []
            }

        if job.Dense > 0 then
            { job with Dense = job.Dense - 1 }

        if not job.DirectQ then
            { job with DirectQ = true }

        if job.Bf16 then
            { job with Bf16 = false }

        if job.NarrowStates then
            { job with NarrowStates = false }

        if job.Remainders then
            { job with Remainders = false }

        if job.LateReduce then
            { job with LateReduce = false }

        if job.Bucket > 0 then
            { job with Bucket = 0 }

        if job.InOrder then
            { job with InOrder = false }

        if job.Paired then
            { job with Paired = false }

        if not job.DistributedOptimizer then
            { job with DistributedOptimizer = true }

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

        if job.Batch > 1 then
            { job with Batch = 1 }

        if job.SeqLength > 4 then
            {
                job with
                    SeqLength = job.SeqLength / 2
            }
    }
    |> Seq.filter legal

/// Jobs of one stage: what partition does.
type OneStage =
    static member Job() : Arbitrary<Job> = Arb.fromGenShrink (jobs [ 1 ] [ 1 ] |> Gen.where legal, shrink)

/// Jobs of any number of stages.
type AnyStages =
    static member Job() : Arbitrary<Job> =
        Arb.fromGenShrink (jobs [ 1; 2; 2; 3; 4 ] [ 1; 1; 2; 3 ] |> Gen.where legal, shrink)

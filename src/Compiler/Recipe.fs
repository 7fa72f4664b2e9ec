/// The choices of a job: degrees of parallelism, layout, batch, precision, schedule, recomputation, optimizer.
namespace DeepSeekGraph.Compiler

open System
open System.Collections.Generic
open System.Runtime.InteropServices
open DeepSeekGraph

/// AdamW (arXiv 1711.05101), fp32 inside, with clipping by the global norm.
type Optimizer = {
    Beta1: float
    Beta2: float
    Eps: float
    Decay: float
    ClipNorm: float
}

/// How the fp32 master of a bf16 weight is kept. Weights of fp32 are their own.
[<RequireQualifiedAccess>]
type MainParams =
    | Float32
    /// No more precise than the weight itself.
    | BFloat16
    /// As the 16 bits that the weight lacks (Megatron's store_param_remainders): weight and remainder are the fp32 master.
    | Remainder

    /// As recipes and plans write it.
    member this.Name =
        match this with
        | Float32 -> "fp32"
        | BFloat16 -> "bf16"
        | Remainder -> "remainder"

    static member All = [| Float32; BFloat16; Remainder |]

/// Element types of what a step keeps beside the weights, as Megatron's precision-aware optimizer names them.
type StateTypes = {
    /// Master weights; compute copies have the recipe's own type.
    MainParams: MainParams
    /// Accumulated gradients.
    MainGrads: DType
    /// First and second moments.
    ExpAvg: DType
    ExpAvgSq: DType
} with

    /// fp32 throughout.
    static member Full = {
        MainParams = MainParams.Float32
        MainGrads = DType.Float32
        ExpAvg = DType.Float32
        ExpAvgSq = DType.Float32
    }

/// Which fusion rules are applied.
[<RequireQualifiedAccess>]
type FusionChoice =
    | All
    | None
    | Only of Rules: string list
    | AllBut of Rules: string list

    /// Is the rule of this name applied?
    member this.Takes(rule: string) =
        match this with
        | All -> true
        | None -> false
        | Only rules -> List.contains rule rules
        | AllBut rules -> not (List.contains rule rules)

    /// Names that are said.
    member this.Named =
        match this with
        | All
        | None -> []
        | Only rules
        | AllBut rules -> rules

    /// all, none, "permute,unpermute" (only these), "-permute,-unpermute" (all but these).
    override this.ToString() =
        match this with
        | All -> "all"
        | None -> "none"
        | Only rules -> String.Join(",", rules)
        | AllBut rules -> String.Join(",", rules |> List.map (fun r -> "-" + r))

/// How routed rows reach their experts (DESIGN: reshards of rows, chosen once per mixture-of-experts block).
[<RequireQualifiedAccess>]
type Dispatcher =
    /// Tokens are gathered over the expert axes; unpermute leaves a partial sum.
    | AllGather
    /// Rows go to the ranks of their experts and back.
    | AllToAll
    /// One fused dispatch and one fused combine; a token goes once to each node that has experts for it.
    | Flex
    /// The cheapest of the others by cost.
    | Auto

    /// As recipes and plans write it.
    member this.Name =
        match this with
        | AllGather -> "allgather"
        | AllToAll -> "alltoall"
        | Flex -> "flex"
        | Auto -> "auto"

    static member All = [| AllGather; AllToAll; Flex; Auto |]

/// Which code a GPU runs for attention.
[<RequireQualifiedAccess>]
type AttentionBackend =
    /// The library's wherever it takes the operands.
    | Auto
    /// Our own everywhere: fp32 inside, every sum in a fixed order.
    | Exact

    /// As recipes and plans write it.
    member this.Name =
        match this with
        | Auto -> "auto"
        | Exact -> "exact"

    static member All = [| Auto; Exact |]

/// What a plan is for.
[<RequireQualifiedAccess>]
type Mode =
    /// Forward, backward, update.
    | Train
    /// Forward only: what the model observes, with caches that are kept from run to run. Parameters do not change.
    | Generate

    /// As recipes and plans write it.
    member this.Name =
        match this with
        | Train -> "train"
        | Generate -> "generate"

    static member All = [| Train; Generate |]

/// An immutable job description; every With... method gives a changed copy. 0 stands for a degree not given.
type Recipe = private {
    name: string
    mode: Mode
    tensor: int
    context: int
    data: int
    pipeline: int
    expertTensor: int
    expert: int
    sequenceParallel: bool
    dispatcher: Dispatcher
    ranksPerNode: int
    permutePadding: int
    virtualPipeline: int
    microbatchGroup: int
    layout: string
    schedule: Schedule
    globalBatch: int
    microBatch: int
    seqLength: int
    dtype: DType
    fp8Block: int
    fusions: FusionChoice
    attentionBackend: AttentionBackend
    recompute: string list
    recomputeBudget: int64
    optimizer: Optimizer
    distributedOptimizer: bool
    overlapGradReduce: bool
    gradBucketSize: int
    overlap: bool
    overlapMoeExpertParallelComm: bool
    stateTypes: StateTypes
    facts: string list
} with

    /// One rank, fp32, 1F1B, fused, nothing recomputed, sequence parallel wherever tensor parallel, all-to-all.
    static member Default = {
        name = "default"
        mode = Mode.Train
        tensor = 0
        context = 0
        data = 0
        pipeline = 0
        expertTensor = 0
        expert = 0
        sequenceParallel = true
        dispatcher = Dispatcher.AllToAll
        ranksPerNode = 8
        permutePadding = 1
        virtualPipeline = 1
        microbatchGroup = 0
        layout = ""
        schedule = Schedule.OneFOneB
        globalBatch = 8
        microBatch = 1
        seqLength = 128
        dtype = DType.Float32
        fp8Block = 0
        fusions = FusionChoice.All
        attentionBackend = AttentionBackend.Auto
        recompute = []
        recomputeBudget = 0L
        optimizer = {
            Beta1 = 0.9
            Beta2 = 0.95
            Eps = 1e-8
            Decay = 0.1
            ClipNorm = 1.0
        }
        distributedOptimizer = true
        overlapGradReduce = true
        gradBucketSize = 0
        overlap = true
        overlapMoeExpertParallelComm = false
        stateTypes = StateTypes.Full
        facts = []
    }

    member this.Degrees = {
        Tensor = this.tensor
        Context = this.context
        Data = this.data
        Pipeline = this.pipeline
        ExpertTensor = this.expertTensor
        Expert = this.expert
    }

    member this.Name = this.name
    member this.Mode = this.mode
    member this.Tensor = this.tensor
    member this.Context = this.context
    member this.Data = this.data
    member this.Pipeline = this.pipeline
    member this.ExpertTensor = this.expertTensor
    member this.Expert = this.expert
    /// Is the residual stream split over tokens between tensor-parallel regions?
    member this.SequenceParallel = this.sequenceParallel
    member this.Dispatcher = this.dispatcher
    /// Consecutive ranks that share fast links (NVLink).
    member this.RanksPerNode = this.ranksPerNode
    /// Rows of each local expert are filled up with zeros to a multiple of so many, where grouped products read them; 1: not.
    member this.PermutePadding = this.permutePadding
    /// Chunks of the model on each pipeline rank; 1: no interleaving.
    member this.VirtualPipeline = this.virtualPipeline
    /// Microbatches that a chunk runs in a row before the rank's next chunk; 0: as many as there are pipeline ranks.
    member this.MicrobatchGroup = this.microbatchGroup
    /// Megatron's layout string; empty: cut by cost.
    member this.Layout = this.layout
    member this.Schedule = this.schedule
    /// Sequences of an optimizer step, over all ranks.
    member this.GlobalBatch = this.globalBatch
    /// Sequences of a microbatch on one data-parallel rank.
    member this.MicroBatch = this.microBatch
    member this.SeqLength = this.seqLength
    /// What matrices and activations are computed in; StateTypes says what masters, gradients and moments are kept in.
    member this.DType = this.dtype
    /// Extent of the blocks in which linear layers' operands are rounded to fp8; 0: they are not.
    member this.Fp8Block = this.fp8Block
    member this.Fusions = this.fusions
    /// Which code a GPU runs for attention; a processor has one.
    member this.AttentionBackend = this.attentionBackend
    /// Names of what the backward pass computes again, such as core_attn.
    member this.Recompute = this.recompute :> IReadOnlyList<string>
    /// Bytes that a rank may hold: what else is computed again is chosen so that they suffice. 0: no budget.
    member this.RecomputeBudget = this.recomputeBudget
    member this.Optimizer = this.optimizer
    /// Are master weights and moments split over the ranks that hold copies of a parameter (dp x cp; of experts, edp)?
    member this.DistributedOptimizer = this.distributedOptimizer
    /// Are gradients reduced over data axes as they become complete, beside the rest of the backward pass?
    member this.OverlapGradReduce = this.overlapGradReduce
    /// Elements of gradients that are reduced together; 0: Megatron's, 40 million, or a million a data parallel rank if that is more.
    member this.GradBucketSize = this.gradBucketSize
    /// Are a program's steps put in an order in which collectives run beside what does not need them?
    member this.Overlap = this.overlap
    /// Does a forward take turns with the backward of another microbatch, so that one's collectives run beside the other's launches?
    member this.OverlapMoeExpertParallelComm = this.overlapMoeExpertParallelComm
    member this.StateTypes = this.stateTypes
    /// What else a plan records, as `key=value`: the model's sizes. No pass reads them.
    member this.Facts = this.facts :> IReadOnlyList<string>

    member this.WithName(name: string) = { this with name = name }
    member this.WithMode(mode: Mode) = { this with mode = mode }

    /// Degrees; those not given (0) are 1, except data: the smallest that lets experts fit.
    member this.WithParallelism(tensor: int, pipeline: int, expert: int, data: int) = {
        this with
            tensor = tensor
            pipeline = pipeline
            expert = expert
            data = data
    }

    member this.WithContextParallel(degree: int) = { this with context = degree }
    member this.WithExpertTensorParallel(degree: int) = { this with expertTensor = degree }
    member this.WithSequenceParallel(on: bool) = { this with sequenceParallel = on }
    member this.WithDispatcher(dispatcher: Dispatcher) = { this with dispatcher = dispatcher }
    member this.WithRanksPerNode(ranks: int) = { this with ranksPerNode = ranks }

    /// Blocks of rows that grouped products take whole: 16 or 32 for fp8 (Megatron's moe_router_padding_for_fp8), 128 for DeepGEMM;
    /// 1: none. Padding is never sent, and no result or gradient has it.
    member this.WithPermutePadding(multiple: int) = { this with permutePadding = multiple }

    /// Cuts the model into pipeline x chunks stages; stage i is chunk i / pipeline of rank i % pipeline. More than one chunk implies
    /// the schedule Interleaved1F1B, with groups of `microbatchGroup` microbatches (0: the pipeline degree).
    member this.WithVirtualPipeline(chunks: int, [<Optional; DefaultParameterValue(0)>] microbatchGroup: int) = {
        this with
            virtualPipeline = chunks
            microbatchGroup = microbatchGroup
    }

    member this.WithLayout(layout: string) = { this with layout = layout }
    member this.WithSchedule(schedule: Schedule) = { this with schedule = schedule }

    member this.WithBatch(globalBatch: int, microBatch: int, seqLength: int) = {
        this with
            globalBatch = globalBatch
            microBatch = microBatch
            seqLength = seqLength
    }

    member this.WithDType(dtype: DType) = { this with dtype = dtype }

    /// Products of linear layers read E4M3, in tiles of 1 x block and blocks of block x block; 0: off. What is computed otherwise
    /// has the type of WithDType. On CPUs fp8 is emulated: operands are rounded to what fp8 holds, and multiplied as they are.
    member this.WithFp8(block: int) = { this with fp8Block = block }

    /// As DeepSeek-V3 was trained: blocks of 128.
    member this.WithFp8() = this.WithFp8 128

    /// All rules, or none.
    member this.WithFusion(fuse: bool) = {
        this with
            fusions = (if fuse then FusionChoice.All else FusionChoice.None)
    }

    member this.WithFusions(fusions: FusionChoice) = { this with fusions = fusions }

    /// All rules but those named.
    member this.WithoutFusions([<ParamArray>] rules: string[]) = {
        this with
            fusions = (if rules.Length = 0 then FusionChoice.All else FusionChoice.AllBut(List.ofArray rules))
    }

    /// Exact: attention on a GPU is computed in fp32 and its gradients are summed in a fixed order, in bf16 too; slower.
    member this.WithAttentionBackend(backend: AttentionBackend) = { this with attentionBackend = backend }

    /// Megatron's names: core_attn, mla_up_proj, layernorm, moe_act, shared_experts, mlp, moe; full: every layer.
    member this.WithRecompute([<ParamArray>] names: string[]) = {
        this with
            recompute = List.ofArray names
    }

    /// The cheapest recomputation with which a rank's peak, headroom for routed rows included, is at most `bytes`; stages may differ.
    /// 0: none but the names given.
    member this.WithRecomputeBudget(bytes: int64) = { this with recomputeBudget = bytes }

    member this.WithOptimizer(optimizer: Optimizer) = { this with optimizer = optimizer }

    /// Decoupled weight decay and Adam's constants, clipping by the global norm.
    member this.WithAdam(beta1: float, beta2: float, eps: float, weightDecay: float, clipNorm: float) = {
        this with
            optimizer = {
                Beta1 = beta1
                Beta2 = beta2
                Eps = eps
                Decay = weightDecay
                ClipNorm = clipNorm
            }
    }

    member this.WithDistributedOptimizer(on: bool) = { this with distributedOptimizer = on }

    member this.WithOverlapGradReduce(on: bool) = { this with overlapGradReduce = on }
    member this.WithGradBucketSize(elements: int) = { this with gradBucketSize = elements }
    member this.WithOverlap(on: bool) = { this with overlap = on }

    /// Megatron's name; all collectives of F, I and W are hidden so, not those of experts alone. Takes schedule 1F1B on one pipeline rank,
    /// or a virtual pipeline, and memory for one more microbatch of a chunk.
    member this.WithOverlapMoeExpertParallelComm(on: bool) = {
        this with
            overlapMoeExpertParallelComm = on
    }

    member this.WithStateTypes(mainParams: MainParams, mainGrads: DType, expAvg: DType, expAvgSq: DType) = {
        this with
            stateTypes = {
                MainParams = mainParams
                MainGrads = mainGrads
                ExpAvg = expAvg
                ExpAvgSq = expAvgSq
            }
    }

    member this.WithFacts(facts: string seq) = { this with facts = List.ofSeq facts }

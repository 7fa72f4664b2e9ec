/// The choices of a job: degrees of parallelism, layout, batch, precision, schedule, recomputation, optimizer.
namespace DeepSeekGraph.Compiler

open System
open System.Collections.Generic
open System.Globalization
open DeepSeekGraph

/// AdamW (arXiv 1711.05101) with fp32 master weights and clipping by the global norm.
type Optimizer = {
    Beta1: float
    Beta2: float
    Eps: float
    Decay: float
    ClipNorm: float
}

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

/// An immutable job description; every With... method gives a changed copy. 0 stands for a degree not given.
type Recipe = private {
    name: string
    tensor: int
    context: int
    data: int
    pipeline: int
    expertTensor: int
    expert: int
    sequenceParallel: bool
    dispatcher: Dispatcher
    layout: string
    schedule: Schedule
    globalBatch: int
    microBatch: int
    seqLength: int
    dtype: DType
    fuse: bool
    recompute: string list
    optimizer: Optimizer
} with

    /// One rank, fp32, 1F1B, fused, nothing recomputed, sequence parallel wherever tensor parallel, all-to-all.
    static member Default = {
        name = "default"
        tensor = 0
        context = 0
        data = 0
        pipeline = 0
        expertTensor = 0
        expert = 0
        sequenceParallel = true
        dispatcher = Dispatcher.AllToAll
        layout = ""
        schedule = Schedule.OneFOneB
        globalBatch = 8
        microBatch = 1
        seqLength = 128
        dtype = DType.Float32
        fuse = true
        recompute = []
        optimizer = {
            Beta1 = 0.9
            Beta2 = 0.95
            Eps = 1e-8
            Decay = 0.1
            ClipNorm = 1.0
        }
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
    member this.Tensor = this.tensor
    member this.Context = this.context
    member this.Data = this.data
    member this.Pipeline = this.pipeline
    member this.ExpertTensor = this.expertTensor
    member this.Expert = this.expert
    /// Is the residual stream split over tokens between tensor-parallel regions?
    member this.SequenceParallel = this.sequenceParallel
    member this.Dispatcher = this.dispatcher
    /// Megatron's layout string; empty: cut by cost.
    member this.Layout = this.layout
    member this.Schedule = this.schedule
    /// Sequences of an optimizer step, over all ranks.
    member this.GlobalBatch = this.globalBatch
    /// Sequences of a microbatch on one data-parallel rank.
    member this.MicroBatch = this.microBatch
    member this.SeqLength = this.seqLength
    /// What matrices and activations are computed in; master weights and moments are fp32.
    member this.DType = this.dtype
    member this.Fuse = this.fuse
    /// Names of what the backward pass computes again: core_attn.
    member this.Recompute = this.recompute :> IReadOnlyList<string>
    member this.Optimizer = this.optimizer

    member this.WithName(name: string) = { this with name = name }

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
    member this.WithLayout(layout: string) = { this with layout = layout }
    member this.WithSchedule(schedule: Schedule) = { this with schedule = schedule }

    member this.WithBatch(globalBatch: int, microBatch: int, seqLength: int) = {
        this with
            globalBatch = globalBatch
            microBatch = microBatch
            seqLength = seqLength
    }

    member this.WithDType(dtype: DType) = { this with dtype = dtype }
    member this.WithFusion(fuse: bool) = { this with fuse = fuse }

    member this.WithRecompute([<ParamArray>] names: string[]) = {
        this with
            recompute = List.ofArray names
    }

    member this.WithOptimizer(optimizer: Optimizer) = { this with optimizer = optimizer }

    /// `key=value` lines in a fixed order: a record of the choices, kept in the plan.
    member this.Lines: IReadOnlyList<string> =
        let number (x: float) = x.ToString("R", CultureInfo.InvariantCulture)

        [|
            $"name=%s{this.name}"
            $"tensor=%i{this.tensor}"
            $"context=%i{this.context}"
            $"data=%i{this.data}"
            $"pipeline=%i{this.pipeline}"
            $"expert_tensor=%i{this.expertTensor}"
            $"expert=%i{this.expert}"
            $"sequence_parallel=%b{this.sequenceParallel}"
            $"dispatcher=%s{this.dispatcher.Name}"
            $"layout=%s{this.layout}"
            $"schedule=%s{this.schedule.Name}"
            $"global_batch=%i{this.globalBatch}"
            $"micro_batch=%i{this.microBatch}"
            $"seq_length=%i{this.seqLength}"
            $"dtype=%s{this.dtype.Name}"
            $"fuse=%b{this.fuse}"
            $"""recompute=%s{String.Join(",", this.recompute)}"""
            $"beta1=%s{number this.optimizer.Beta1}"
            $"beta2=%s{number this.optimizer.Beta2}"
            $"eps=%s{number this.optimizer.Eps}"
            $"decay=%s{number this.optimizer.Decay}"
            $"clip_norm=%s{number this.optimizer.ClipNorm}"
        |]
        :> IReadOnlyList<string>

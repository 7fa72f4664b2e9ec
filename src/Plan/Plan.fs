/// What a rank executes: slots, steps, programs, timetables, parameters and groups, as plain data.
namespace DeepSeekGraph

open System.Collections.Generic

/// The shape of plans, as the first line of their text form states it.
[<RequireQualifiedAccess>]
module PlanSchema =
    /// Raised whenever a field is added, changed or dropped. 2: chunks of a virtual pipeline, groups with a direction.
    /// 3: S.
    /// 4: memory by more kinds and for uneven routing, with the place of every slot.
    /// 5: padding of rows.
    /// 6: caches.
    /// 7: remainders: i16, and the weight that an update reads beside one.
    /// 8: W in parts, R, lanes; which code a GPU runs for attention and grouped products.
    /// 9: F and I in parts.
    [<Literal>]
    let Version = 9

/// How a value lies along one mesh axis.
[<RequireQualifiedAccess; Struct>]
type AxisState =
    /// Every coordinate holds the whole.
    | Replicated
    /// Coordinate c holds block c of dim `Dim`; when several mesh axes split a dim, the slower one is major.
    | Split of Dim: int
    /// The value is the sum over the axis.
    | PartialSum
    /// The value is the maximum over the axis.
    | PartialMax

/// What a slot is for; decides its lifetime and its row in the memory table.
[<RequireQualifiedAccess>]
type SlotKind =
    /// Compute copy of a parameter; lives as long as the plan.
    | Parameter
    /// Master weights, or what they are beyond the parameter, and moments.
    | Optimizer
    /// Gradient accumulated over microbatches.
    | Gradient
    /// Counts and metrics accumulated over microbatches.
    | Counter
    /// A scalar set by the trainer before each step (lr, step, inv_tokens, ...).
    | Scalar
    /// What generation keeps from run to run: keys and values of the tokens seen; starts at zero.
    | Cache
    /// Fed by the data loader for each microbatch.
    | Input
    /// Written in one program of a microbatch or of the step, read in a later one.
    | Saved
    /// Lives within one program.
    | Temporary

/// One region of a rank's memory. Extents are local; `Routed`: the first three dims are (batch, seq, expert) stored as rows.
type SlotInfo = {
    Id: int
    /// Unique within the stage: parameter or input name, or `%n` of the graph value.
    Name: string
    Kind: SlotKind
    DType: DType
    Axes: IReadOnlyList<string>
    Extents: IReadOnlyList<int>
    Routed: bool
    /// Expected share of rows present; 1 when not routed.
    Density: float
    /// Rows of each local expert stand in a block of a multiple of so many; 1 when not routed. Rows that fill up are no rows:
    /// they are zero where rows are made, are never sent, and nothing is summed over them.
    Padding: int
    /// One state per mesh axis of the plan.
    Layout: IReadOnlyList<AxisState>
}

/// A collective over a group; Send and Recv name the peer stage (same coordinates there).
[<RequireQualifiedAccess>]
type Collective =
    | AllReduceSum
    | AllReduceMax
    /// Blocks of the members are joined along `Dim`. Along a row dim: route -> route of all members; rows, route, route of all -> rows of all.
    | AllGather of Dim: int
    /// Summed, then member i keeps block i of `Dim`. Along a row dim: rows of all, route of all, own route -> own rows.
    | ReduceScatter of Dim: int
    /// Dense: `SplitDim` is cut into blocks, one a member; what arrives is joined along `JoinDim`.
    | AllToAll of SplitDim: int * JoinDim: int
    /// route (by token) -> route (by expert): counts are exchanged; remembers how to go back.
    | RouteToExperts
    /// rows, route by token, route by expert -> rows by expert.
    | RowsToExperts
    /// rows, route by expert, route by token -> rows by token.
    | RowsToTokens
    /// Permute and RowsToExperts in one: x, route by token, route by expert -> rows by expert; with probabilities [batch seq expert]
    /// after x also -> their rows. A token goes once to each node of `RanksPerNode` ranks that has experts for it, and is handed on inside.
    | Dispatch of RanksPerNode: int
    /// RowsToTokens and Unpermute in one: rows by expert, route by expert, route by token -> y; with rows of probabilities after the
    /// rows also -> [batch seq expert]. A token's rows are summed on each rank, ranks' sums inside each node, and nodes' sums in node order;
    /// each sum is rounded as it is sent.
    | Combine of RanksPerNode: int
    | Send of Stage: int
    | Recv of Stage: int

    /// May one start carry several operand tuples? A message carries one value, a fused exchange values of several kinds.
    member this.TakesTuples =
        match this with
        | AllReduceSum
        | AllReduceMax
        | AllGather _
        | ReduceScatter _
        | AllToAll _
        | RouteToExperts
        | RowsToExperts
        | RowsToTokens -> true
        | Dispatch _
        | Combine _
        | Send _
        | Recv _ -> false

/// One instruction. `Path` is the module path it came from, for messages and explanations.
[<RequireQualifiedAccess>]
type Step =
    | Launch of
        Kernel: KernelId *
        Attributes: IReadOnlyList<Attribute> *
        Inputs: IReadOnlyList<int> *
        Outputs: IReadOnlyList<int> *
        Path: string
    /// Begins a collective on the lane of its group; inputs must not be written, outputs not touched, until its Wait.
    /// A bundle has several outputs, each with an operand tuple of its own: inputs of output i are those from i x (inputs / outputs) on.
    | Start of
        Token: int *
        Collective: Collective *
        Group: int *
        Inputs: IReadOnlyList<int> *
        Outputs: IReadOnlyList<int> *
        Path: string
    | Wait of Token: int
    /// The slot's memory is given back (this microbatch's instance).
    | Free of Slot: int

/// The programs of a chunk: once a step (Prologue, R, Epilogue) or once a microbatch (F, I, W, S). F, I and W may be in parts: cut where
/// another microbatch's parts come between, W also where enough gradients are complete to be reduced.
[<RequireQualifiedAccess>]
type Phase =
    | Prologue
    /// Forward.
    | F of Part: int
    /// Cotangents that leave the chunk.
    | I of Part: int
    /// Gradients of parameters.
    | W of Part: int
    /// Waits until what I and W sent has arrived, and gives its memory back; late enough to hold nobody up.
    | S
    /// Begins to reduce the gradients that a part of W completes, once its last microbatch is through; the epilogue waits for them.
    | R of Part: int
    | Epilogue

    /// Its letter or word, without its part.
    member this.Word =
        match this with
        | Prologue -> "prologue"
        | F _ -> "F"
        | I _ -> "I"
        | W _ -> "W"
        | S -> "S"
        | R _ -> "R"
        | Epilogue -> "epilogue"

    /// The part of F, I, W and R; 0 of the others, which are one piece.
    member this.Part =
        match this with
        | F part
        | I part
        | W part
        | R part -> part
        | Prologue
        | S
        | Epilogue -> 0

    /// Another part of the same; what is one piece stays as it is.
    member this.WithPart(part: int) =
        match this with
        | F _ -> F part
        | I _ -> I part
        | W _ -> W part
        | R _ -> R part
        | Prologue
        | S
        | Epilogue -> this

    /// May it be in parts?
    member this.HasParts = this.IsF || this.IsI || this.IsW || this.IsR

    /// As printed: F, or W.2 for a later part.
    member this.Name = if this.Part = 0 then this.Word else $"%s{this.Word}.%i{this.Part}"

    /// Each phase in its first part, in the order of programs.
    static member All = [| Prologue; F 0; I 0; W 0; S; R 0; Epilogue |]

    /// Does it run once a step?
    member this.IsOnce = this.IsPrologue || this.IsR || this.IsEpilogue

    /// The program of a chunk as printed: F, or F@2 of chunk 2.
    member this.OfChunk(chunk: int) = if chunk = 0 then this.Name else $"%s{this.Name}@%i{chunk}"

    /// The same without its part: all of W@1.
    member this.WholeOfChunk(chunk: int) = if chunk = 0 then this.Word else $"%s{this.Word}@%i{chunk}"

/// Straight-line code. Prologue and epilogue are of chunk 0; every chunk has F, I, W and S, and R where it has gradients to reduce.
type Program = {
    Phase: Phase
    Chunk: int
    Steps: IReadOnlyList<Step>
} with

    /// As printed: F, W@1.
    member this.Name = this.Phase.OfChunk this.Chunk

/// One entry of a rank's timetable. Chunk and microbatch are 0 for prologue and epilogue, the microbatch for R.
[<Struct>]
type Action = {
    Phase: Phase
    Chunk: int
    Microbatch: int
} with

    /// As printed: prologue, F3, F3@1 for microbatch 3 in chunk 1, W3.2@1 for the part 2 of it, R.2@1.
    member this.Name =
        if this.Phase.IsOnce then
            this.Phase.OfChunk this.Chunk
        else
            let part = if this.Phase.Part = 0 then "" else $".%i{this.Phase.Part}"
            let inChunk = if this.Chunk = 0 then "" else $"@%i{this.Chunk}"
            $"%s{this.Phase.Word}%i{this.Microbatch}%s{part}%s{inChunk}"

/// Everything one pipeline rank runs; its tp x cp x dp ranks differ in coordinates only.
/// Chunk c of pipeline rank r is part r + c * pp of the model (Megatron's order of virtual stages).
type StagePlan = {
    /// The pipeline rank.
    Stage: int
    /// Letters of the layout grammar, such as "Ett" or "tmL"; chunks are divided by '|'.
    Units: string
    Slots: IReadOnlyList<SlotInfo>
    Programs: IReadOnlyList<Program>
    Timetable: IReadOnlyList<Action>
}

/// One base mesh axis: the degrees tp, cp, dp and etp, ep, edp are products of these. Axis 0 is the fastest.
type MeshAxis = { Name: string; Size: int }

/// The grid of a job. Rank = coordinate over Axes (axis 0 fastest) + stage x product of Axes.
type MeshInfo = {
    Tensor: int
    Context: int
    Data: int
    Pipeline: int
    ExpertTensor: int
    Expert: int
    ExpertData: int
    Axes: IReadOnlyList<MeshAxis>
}

/// The order in which context parallel ranks share a sequence: blocks 0, 2R-1, 1, 2R-2, ... of 2R, so that each has as many scores.
[<RequireQualifiedAccess>]
module ZigzagOrder =
    /// Where block `i` of so many stands in natural order.
    let naturalBlock (blocks: int) (i: int) : int = if i % 2 = 0 then i / 2 else blocks - 1 - i / 2

    /// Where the token at `place` of a sequence stands in natural order.
    let natural (ranks: int) (length: int) (place: int) : int =
        if ranks = 1 then
            place
        else
            let size = length / (2 * ranks)
            naturalBlock (2 * ranks) (place / size) * size + place % size

/// Ranks that talk: all coordinates along `MeshAxes` (slowest is major in member order); `Stages`: instead the same coordinates on these
/// stages, ascending for sums, sender and receiver for messages. What a member starts in a group runs in that order.
type Group = {
    Id: int
    /// The mesh axes, and behind a '.' the lane where there are several: dp, dp.grad.
    Name: string
    MeshAxes: IReadOnlyList<int>
    Stages: IReadOnlyList<int>
} with

    /// What runs on one lane runs in order; another lane of the same ranks goes beside it. Empty where nothing is said.
    member this.Lane =
        match this.Name.IndexOf '.' with
        | at when at >= 0 && this.Stages.Count = 0 -> this.Name.Substring(at + 1)
        | _none -> ""

    /// The name without the lane.
    member this.Over =
        if this.Lane = "" then
            this.Name
        else
            this.Name.Substring(0, this.Name.Length - this.Lane.Length - 1)

/// How a parameter starts.
[<RequireQualifiedAccess>]
type Init =
    | Zeros
    | Ones
    /// Normal(0, Std), a counter-based function of (seed, name, global element index).
    | Normal of Std: float

/// How a parameter changes in a step.
[<RequireQualifiedAccess>]
type Update =
    | AdamW of Decay: bool
    /// bias += Rate * sign(mean(counts) - counts)
    | RouterBias of Rate: float
    | Frozen

/// One parameter: global shape in checkpoint order, layout, and the stages that hold a copy.
type ParameterInfo = {
    Name: string
    DType: DType
    Axes: IReadOnlyList<string>
    Extents: IReadOnlyList<int>
    Layout: IReadOnlyList<AxisState>
    Init: Init
    Update: Update
    Stages: IReadOnlyList<int>
}

/// One input: global shape of a microbatch and layout.
type InputInfo = {
    Name: string
    DType: DType
    Axes: IReadOnlyList<string>
    Extents: IReadOnlyList<int>
    Layout: IReadOnlyList<AxisState>
}

/// A part of a rank's memory for slots that live from a run of program `From` to one of `Until` ("F", "W@1");
/// "plan": all the time, "program": within one run of any program. One frame of `Stride` bytes for each microbatch in flight.
type MemoryRegion = {
    From: string
    Until: string
    /// For routed rows, whose number differs from step to step.
    Routed: bool
    /// First byte in the arena.
    Base: int64
    Stride: int64
    Count: int
}

/// One line of the memory table: bytes a rank of the stage holds at most. Where nothing else is said, routed rows count as if balanced.
type MemoryRow = {
    Stage: int
    Parameters: int64
    Optimizer: int64
    Gradients: int64
    /// Counts, metrics and scalars, and the caches of generation.
    Counters: int64
    /// Slots that come and go, but for those of `Collectives`, at the moment of the peak.
    Activations: int64
    /// Slots that a collective in flight fills, at that moment.
    Collectives: int64
    Peak: int64
    /// The peak with the memory that is kept for routed rows: twice the balanced, or all there can be.
    Headroom: int64
    /// The peak when every token of the job chooses this rank's experts.
    Worst: int64
    /// Bytes of all regions: what has to be there. The least possible is `Headroom`.
    Arena: int64
    Regions: IReadOnlyList<MemoryRegion>
    /// First byte of each slot in a frame of its region, by slot id; -1 for slots that hold nothing.
    Offsets: IReadOnlyList<int64>
}

/// A compiled job: what every rank will do, known before the first kernel starts.
type PlanSet = {
    /// PlanSchema.Version; unknown ones are refused.
    Version: int
    /// Recipe name and settings, `key=value` lines in order; a record, never executed.
    Recipe: IReadOnlyList<string>
    Mesh: MeshInfo
    /// Layout string of the model's stages, such as "Et|tmL".
    Layout: string
    /// Name of the schedule, such as "1F1B".
    Schedule: string
    /// Virtual pipeline chunks of each pipeline rank; 1 without interleaving.
    Chunks: int
    Microbatches: int
    /// Sequences of one microbatch over all dp ranks, and tokens of a sequence.
    MicroBatch: int
    SeqLength: int
    Groups: IReadOnlyList<Group>
    Parameters: IReadOnlyList<ParameterInfo>
    Inputs: IReadOnlyList<InputInfo>
    Stages: IReadOnlyList<StagePlan>
    Memory: IReadOnlyList<MemoryRow>
}

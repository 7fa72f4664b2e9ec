/// The end of a step: gradients reduced once, clipped, applied to shards, parameters gathered; router biases and metrics.
/// before: accumulators of one stage; after: steps of prologue, R and epilogue. Every partial sum is reduced once, parameters in reverse order.
module DeepSeekGraph.Compiler.Lowering.Epilogue

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Compiler.Lowering.Slots
open DeepSeekGraph.Compiler.Lowering.OptimizerShards

/// A gradient or count of one parameter on one stage.
type Accumulated = {
    Parameter: ParameterInfo
    /// Accumulator slot and the mesh axes over which it is a partial sum.
    Slot: int
}

/// A metric: its accumulator on this stage.
type Metric = { Name: string; Slot: int }

type Input = {
    Stage: int
    Stages: int
    /// Do parameters change? Then every stage takes part in the norm of the gradients.
    Trains: bool
    Optimizer: Optimizer
    StateTypes: StateTypes
    /// Are optimizer states split over data-parallel ranks?
    Distributed: bool
    Slots: SlotTable
    Groups: GroupTable
    Mesh: MeshInfo
    /// Elements of a bucket; 0: Megatron's.
    Bucket: int
    Gradients: Accumulated list
    /// Do gradients and parameters have a lane of their own, where they hold nothing up?
    Overlaps: bool
    /// Gradient slots that are reduced over data axes before the epilogue: a list for each R.
    Early: int list list
    Counts: Accumulated list
    Metrics: Metric list
}

let private scalar = TensorType.scalar DType.Float32

/// One value on its way through a collective; `Ready` writes the steps that make it.
type private Move = {
    Kind: Collective
    Group: int
    From: int
    Into: int
    Ready: unit -> unit
}

/// Elements of a bundle, as Megatron sizes its buckets where nothing is said: enough to be worth a collective of that many ranks.
let bucket (given: int) (ranks: int) : int64 =
    if given > 0 then int64 given else max 40_000_000L (1_000_000L * int64 ranks)

/// Elements of a slot on one rank.
let elements (slot: SlotInfo) : int64 = slot.Extents |> Seq.fold (fun n e -> n * int64 e) 1L

/// Moves that go together: of one kind, group and element type, in order, a bucket at a time. Small ones first: an fp32 gate of the first
/// layer must not wait for all that is bf16.
let private buckets (input: Input) (moves: Move list) : Move list list =
    let slot m = input.Slots[m.From]
    let elements m = elements (slot m)

    let cut (moves: Move list) =
        let axes = input.Groups[moves.Head.Group].MeshAxes
        let most = bucket input.Bucket (Mesh.extent input.Mesh axes)
        // the bucket a move falls into is where the sum before it ends
        let before = moves |> List.scan (fun n m -> n + elements m) 0L
        List.zip moves (List.truncate moves.Length before) |> List.groupBy (fun (_, at) -> at / most)

    moves
    |> List.groupBy (fun m -> m.Kind, m.Group, (slot m).DType)
    |> List.sortBy (snd >> List.sumBy elements)
    |> List.collect (snd >> cut)
    |> List.map (snd >> List.map fst)

/// Writes epilogue steps.
[<Sealed>]
type private Writer(input: Input) =
    let steps = List<Step>()
    let mutable token = -1
    let mutable fresh = 0

    /// The steps of one program; the next one begins.
    member _.Close() : Step list =
        let written = List.ofSeq steps
        steps.Clear()
        written

    member _.Launch(kernel, attributes: Attribute list, inputs: int list, outputs: int list, path: string) =
        steps.Add(Step.Launch(kernel, Array.ofList attributes, Array.ofList inputs, Array.ofList outputs, path))

    /// A temporary like `like`, laid out as told.
    member _.Temporary(name: string, t: TensorType, layout: Layout) =
        fresh <- fresh + 1
        input.Slots.Get($"%s{name}#%i{fresh}", SlotKind.Temporary, t, layout)

    static member private TypeOf(slot: SlotInfo) : TensorType = {
        TensorType.create slot.DType (Seq.zip slot.Axes slot.Extents) with
            Routed = slot.Routed
            Density = slot.Density
    }

    /// Bundles of moves, each begun as soon as its values are ready; the tokens to wait for.
    member _.Begin(moves: Move list, path: string) : int list =
        buckets input moves
        |> List.map (fun bundle ->
            for m in bundle do
                m.Ready()

            token <- token + 1
            let ids (pick: Move -> int) = bundle |> List.map pick |> Array.ofList
            let first = bundle.Head
            steps.Add(Step.Start(token, first.Kind, first.Group, ids _.From, ids _.Into, path))
            token)

    member _.Wait(tokens: int list) =
        for t in tokens do
            steps.Add(Step.Wait t)

    member this.Together(moves: Move list, path: string) = this.Wait(this.Begin(moves, path))

    /// The move of a slot: its kind, group and what it becomes; nothing where it stays.
    static member private Moves(moved: (int * struct (Collective * int * int) voption) list) : Move list = [
        for from, goes in moved do
            match goes with
            | ValueSome(struct (kind, group, into)) -> {
                Kind = kind
                Group = group
                From = from
                Into = into
                Ready = ignore
              }
            | ValueNone -> ()
    ]

    static member private Results(moved: (int * struct (Collective * int * int) voption) list) : int list = [
        for from, goes in moved do
            match goes with
            | ValueSome(struct (_, _, into)) -> into
            | ValueNone -> from
    ]

    /// Each slot after a collective, as `move` says.
    member this.Each(slots: int list, path: string, move: int -> struct (Collective * int * int) voption) : int list =
        let moved = slots |> List.map (fun slot -> slot, move slot)
        this.Together(Writer.Moves moved, path)
        Writer.Results moved

    /// The same begun only: each slot with what it becomes, and the tokens.
    member this.EachBegun(slots: int list, path: string, move: int -> struct (Collective * int * int) voption) =
        let moved = slots |> List.map (fun slot -> slot, move slot)
        let tokens = this.Begin(Writer.Moves moved, path)
        struct (List.zip slots (Writer.Results moved), tokens)

    /// The sum of a slot over some of the mesh axes where it is partial, whole or as its block of a dim, by the group that `along` gives.
    member this.Summed
        (slot: int, axes: int list, dim: int voption, along: int list -> int)
        : struct (Collective * int * int) voption =
        let info = input.Slots[slot]
        let layout = Array.ofSeq info.Layout
        let here = axes |> List.filter (fun m -> layout[m].IsPartialSum)

        if here.IsEmpty then
            ValueNone
        else
            let state, kind =
                match dim with
                | ValueSome d -> AxisState.Split d, Collective.ReduceScatter d
                | ValueNone -> AxisState.Replicated, Collective.AllReduceSum

            let whole = layout |> Array.mapi (fun m s -> if List.contains m here then state else s)
            let t = Writer.TypeOf info
            let size = Mesh.extent input.Mesh here

            let axesOfResult =
                t.Axes
                |> Array.mapi (fun d a -> if ValueSome d = dim then { a with Extent = a.Extent / size } else a)

            // summed in steps, a value keeps the name of what is summed
            let name = info.Name.Split('#')[0]
            let name = if name.StartsWith "reduced:" then name else $"reduced:%s{name}"
            let into = this.Temporary(name, { t with Axes = axesOfResult }, whole)
            ValueSome(struct (kind, along here, into))

    /// The sum of a slot over stages; it stays where there is only one.
    member this.OverStages(slot: int, stages: int list) : struct (Collective * int * int) voption =
        match stages with
        | []
        | [ _ ] -> ValueNone
        | many ->
            let info = input.Slots[slot]
            let into = this.Temporary($"stages:%s{info.Name}", Writer.TypeOf info, Array.ofSeq info.Layout)
            ValueSome(struct (Collective.AllReduceSum, input.Groups.Across many, into))

    /// Slots summed over all mesh axes where they are partial, then over the stages that hold a part.
    member this.Whole(slots: int list, stages: int -> int list, path: string) : int list =
        let axes slot = Layout.partials (Array.ofSeq input.Slots[slot].Layout)
        let summed = this.Each(slots, path, (fun slot -> this.Summed(slot, axes slot, ValueNone, input.Groups.Along)))
        let over = Dictionary<int, int list>()
        List.iter2 (fun from into -> over[into] <- stages from) slots summed
        this.Each(summed, path, (fun slot -> this.OverStages(slot, over[slot])))

let private allStages (input: Input) = [ 0 .. input.Stages - 1 ]

/// A complete gradient, or its shard.
type private Reduced = {
    Parameter: ParameterInfo
    Shard: Shard
    Gradient: int
}

let private shardOf (input: Input) (g: Accumulated) =
    place input.Distributed input.Mesh g.Parameter input.Slots[g.Slot].Layout

/// A gradient over the data axes, scattered where states are sharded.
let private overData (input: Input) (writer: Writer) along (g: Accumulated) =
    let shard = shardOf input g
    writer.Summed(g.Slot, shard.Data, shard.Dim, along)

let private reducePath = "optimizer.reduce"

/// The group along mesh axes for gradients and parameters.
let private along (input: Input) = if input.Overlaps then input.Groups.Beside else input.Groups.Along

/// Is a gradient summed over ranks that see other data?
let isReduced (input: Input) (g: Accumulated) : bool = not (shardOf input g).Data.IsEmpty

/// What was begun before the epilogue.
type private Begun = {
    /// Accumulator -> what it becomes.
    Into: Dictionary<int, int>
    Tokens: int list
}

/// The R programs, in the order of `Early`.
let private reduceEarly (input: Input) (writer: Writer) : struct (Step list list * Begun) =
    let into, tokens = Dictionary<int, int>(), List<int>()
    let bySlot = dict [ for g in input.Gradients -> g.Slot, g ]

    let programs = [
        for slots in input.Early do
            let struct (moved, begun) =
                writer.EachBegun(slots, reducePath, (fun slot -> overData input writer (along input) bySlot[slot]))

            for from, result in moved do
                into[from] <- result

            tokens.AddRange begun
            writer.Close()
    ]

    struct (programs,
            {
                Into = into
                Tokens = List.ofSeq tokens
            })

/// Every gradient once: over the data axes, where that was not begun before; over the other axes; over stages.
let private reduce (input: Input) (writer: Writer) (begun: Begun) : Reduced list =
    let path = reducePath
    // backward makes gradients in reverse order, so that this is the order in which they are ready
    let gradients = List.rev input.Gradients
    let shards = gradients |> List.map (shardOf input)
    writer.Wait begun.Tokens

    let about = Dictionary<int, struct (Shard * int list)>()

    let also (slots: int list) =
        for slot, shard, g in List.zip3 slots shards gradients do
            about[slot] <- struct (shard, List.ofSeq g.Parameter.Stages)

        slots

    let data =
        List.zip gradients (also (gradients |> List.map (fun g -> begun.Into.GetValueOrDefault(g.Slot, g.Slot))))
        |> fun gradients ->
            let late = dict [ for g, slot in gradients -> slot, g ]

            writer.Each(
                List.map snd gradients,
                path,
                fun slot ->
                    if late[slot].Slot = slot then
                        overData input writer (along input) late[slot]
                    else
                        ValueNone
            )

    let rest =
        also data
        |> fun slots ->
            writer.Each(
                slots,
                path,
                fun slot ->
                    let axes = Layout.partials (Array.ofSeq input.Slots[slot].Layout)
                    writer.Summed(slot, axes, ValueNone, input.Groups.Along)
            )

    let everywhere =
        also rest
        |> fun slots ->
            writer.Each(
                slots,
                path,
                fun slot ->
                    let struct (_, stages) = about[slot]
                    writer.OverStages(slot, stages)
            )

    List.zip3 gradients shards everywhere
    |> List.map (fun (g, shard, slot) -> {
        Parameter = g.Parameter
        Shard = shard
        Gradient = slot
    })

/// What gradients are multiplied by where they are not clipped (Megatron's clip_grad 0): nothing is summed, and there is no norm.
let private unclipped (input: Input) (writer: Writer) : int =
    let scale = writer.Temporary("clip_scale", scalar, Layout.replicated input.Mesh)
    writer.Launch(KernelId.Full, [ Attribute.Float 1.0 ], [], [ scale ], "optimizer.clip")
    scale

/// Norm of all gradients, each element once: a class is what is split over the same mesh axes; a tied parameter counts on its first stage.
let private clip (input: Input) (writer: Writer) (reduced: Reduced list) : int =
    let classes =
        reduced
        |> List.filter (fun g -> g.Parameter.Stages[0] = input.Stage)
        |> List.groupBy (fun g ->
            g.Shard.Layout |> Seq.indexed |> Seq.filter (fun (_, s) -> s.IsSplit) |> Seq.map fst |> List.ofSeq)

    let sums =
        classes
        |> List.map (fun (axes, members) ->
            let layout =
                Array.init input.Mesh.Axes.Count (fun m ->
                    if List.contains m axes then AxisState.PartialSum else AxisState.Replicated)

            let squares = writer.Temporary("squares", scalar, layout)
            writer.Launch(KernelId.SumSquares, [], members |> List.map _.Gradient, [ squares ], "optimizer.clip")
            squares)

    let whole = Layout.replicated input.Mesh

    let local =
        match writer.Whole(sums, (fun _ -> []), "optimizer.clip") with
        | [] ->
            let zero = writer.Temporary("squares", scalar, whole)
            writer.Launch(KernelId.Zero, [], [], [ zero ], "optimizer.clip")
            zero
        | [ one ] -> one
        | many ->
            let sum = writer.Temporary("squares", scalar, whole)
            writer.Launch(KernelId.Add, [], many, [ sum ], "optimizer.clip")
            sum

    let total = writer.Whole([ local ], (fun _ -> allStages input), "optimizer.clip") |> List.head
    let scale = writer.Temporary("clip_scale", scalar, whole)
    let norm = input.Slots.Get("metric:grad_norm", SlotKind.Counter, scalar, whole)

    writer.Launch(
        KernelId.ClipScale,
        [ Attribute.Float input.Optimizer.ClipNorm ],
        [ total ],
        [ norm; scale ],
        "optimizer.clip"
    )

    scale

/// The update of one parameter: of all of it, or of its shard, which is then gathered.
let private adamW (input: Input) (writer: Writer) (scale: int) (g: Reduced) : Move voption =
    let p = g.Parameter
    let layout = Array.ofSeq p.Layout
    let whole = TensorType.create p.DType (Seq.zip p.Axes p.Extents)
    let parameter = input.Slots.Get(p.Name, SlotKind.Parameter, Layout.local input.Mesh layout whole, layout)
    let shard = Layout.local input.Mesh g.Shard.Layout whole
    let isSharded = g.Shard.Dim.IsSome

    let state name dtype =
        input.Slots.Get($"%s{name}:%s{p.Name}", SlotKind.Optimizer, { shard with DType = dtype }, g.Shard.Layout)

    let types = input.StateTypes
    let scalarSlot name = input.Slots.Get(name, SlotKind.Scalar, scalar, Layout.replicated input.Mesh)
    let lr, step = scalarSlot "lr", scalarSlot "step"
    // fp32 parameters are their own master, unless each rank keeps only a shard of it
    let isMaster = p.DType.IsFloat32
    let isSplit = types.MainParams.IsRemainder && not isMaster

    let master =
        if isSplit then state "remainder" DType.Int16
        elif isMaster && not isSharded then parameter
        else state "master" DType.Float32

    let m, v = state "m" types.ExpAvg, state "v" types.ExpAvgSq

    let updated =
        if not isSharded then parameter
        elif isMaster then master
        else writer.Temporary($"updated:%s{p.Name}", shard, g.Shard.Layout)

    let path = $"optimizer.%s{p.Name}"

    let decay =
        match p.Update with
        | Update.AdamW true -> input.Optimizer.Decay
        | Update.AdamW false
        | Update.RouterBias _
        | Update.Frozen -> 0.0

    // what a remainder is read with: the weight before the update, of a parameter that is gathered the shard's block
    let weight () =
        match isSplit, g.Shard.Dim with
        | false, _ -> []
        | true, ValueNone -> [ parameter ]
        | true, ValueSome d ->
            let block = writer.Temporary($"weight:%s{p.Name}", shard, g.Shard.Layout)
            let off = Attribute.Ints [| for m in g.Shard.Data -> int64 m |]
            writer.Launch(KernelId.LocalSlice, [ Attribute.Int(int64 d); off ], [ parameter ], [ block ], path)
            [ block ]

    let launch () =
        let weight = weight ()

        writer.Launch(
            KernelId.AdamW,
            [
                Attribute.Float input.Optimizer.Beta1
                Attribute.Float input.Optimizer.Beta2
                Attribute.Float input.Optimizer.Eps
                Attribute.Float decay
            ],
            [ g.Gradient; scale; lr; step ] @ weight,
            [ master; m; v; updated ],
            path
        )

    match g.Shard.Dim with
    | ValueSome d ->
        ValueSome {
            Kind = Collective.AllGather d
            Group = along input g.Shard.Data
            From = updated
            Into = parameter
            Ready = launch
        }
    | ValueNone ->
        launch ()
        ValueNone

/// Prologue: accumulators start at zero.
let prologue (input: Input) : Step list = [
    let accumulators =
        (input.Gradients |> List.map _.Slot)
        @ (input.Counts |> List.map _.Slot)
        @ (input.Metrics |> List.map _.Slot)

    for slot in accumulators do
        Step.Launch(KernelId.Zero, [||], [||], [| slot |], "step")
]

let private routerBiases (input: Input) (writer: Writer) =
    let biases = [
        for c in input.Counts do
            match c.Parameter.Update, input.Slots.TryFind c.Parameter.Name with
            | Update.RouterBias rate, ValueSome bias -> c, rate, bias
            | Update.RouterBias _, ValueNone
            | Update.AdamW _, _
            | Update.Frozen, _ -> ()
    ]

    let stages = dict [ for c, _, _ in biases -> c.Slot, List.ofSeq c.Parameter.Stages ]
    let slots = [ for c, _, _ in biases -> c.Slot ]
    let counts = writer.Whole(slots, (fun slot -> stages[slot]), "optimizer.router_bias")

    for (c, rate, bias), sum in List.zip biases counts do
        writer.Launch(
            KernelId.RouterBias,
            [ Attribute.Float rate ],
            [ sum ],
            [ bias ],
            $"optimizer.%s{c.Parameter.Name}"
        )

/// Reduce, clip, update, gather.
let private update (input: Input) (writer: Writer) (begun: Begun) =
    let reduced = reduce input writer begun

    let scale =
        if input.Optimizer.ClipNorm > 0.0 then
            clip input writer reduced
        else
            unclipped input writer

    // what the next step reads first is updated and gathered first
    let gathers = reduced |> List.rev |> List.map (adamW input writer scale)
    writer.Together([ for g in gathers |> List.filter _.IsSome -> g.Value ], "optimizer.gather")

/// The R programs, and the epilogue: router biases, report, parameters; what generates has none to update. Parameters come last: what is
/// gathered then may still be under way when the next step begins.
let epilogue (input: Input) : struct (Step list list * Step list) =
    let writer = Writer input
    let struct (early, begun) = reduceEarly input writer
    routerBiases input writer
    let sums = writer.Whole(input.Metrics |> List.map _.Slot, (fun _ -> allStages input), "metrics")

    for m, sum in List.zip input.Metrics sums do
        let into = input.Slots.Get(m.Name, SlotKind.Counter, scalar, Layout.replicated input.Mesh)
        writer.Launch(KernelId.Scale, [ Attribute.Float 1.0 ], [ sum ], [ into ], m.Name)

    if input.Trains then
        update input writer begun

    struct (early, writer.Close())

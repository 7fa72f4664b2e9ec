/// The end of a step: gradients reduced, clipped, applied; router biases and metrics.
/// before: accumulators of one stage; after: prologue and epilogue steps. Every partial sum is reduced once, parameters in order.
module DeepSeekGraph.Compiler.Lowering.Epilogue

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Compiler.Lowering.Slots

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
    Optimizer: Optimizer
    Slots: SlotTable
    Groups: GroupTable
    Mesh: MeshInfo
    Gradients: Accumulated list
    Counts: Accumulated list
    Metrics: Metric list
}

let private scalar = TensorType.scalar DType.Float32

/// Writes epilogue steps: every reduction is waited for at once.
[<Sealed>]
type private Writer(input: Input) =
    let steps = List<Step>()
    let mutable token = -1
    let mutable fresh = 0
    member _.Steps = List.ofSeq steps

    member _.Launch(kernel, attributes: Attribute list, inputs: int list, outputs: int list, path: string) =
        steps.Add(Step.Launch(kernel, Array.ofList attributes, Array.ofList inputs, Array.ofList outputs, path))

    /// A temporary like `like`, laid out as told.
    member _.Temporary(name: string, t: TensorType, layout: Layout) =
        fresh <- fresh + 1
        input.Slots.Get($"%s{name}#%i{fresh}", SlotKind.Temporary, t, layout)

    member private _.AllReduce(group: int, from: int, into: int, path: string) =
        token <- token + 1
        steps.Add(Step.Start(token, Collective.AllReduceSum, group, [| from |], [| into |], path))
        steps.Add(Step.Wait token)

    static member private TypeOf(slot: SlotInfo) : TensorType = {
        TensorType.create slot.DType (Seq.zip slot.Axes slot.Extents) with
            Routed = slot.Routed
            Density = slot.Density
    }

    /// The slot summed over the mesh axes where it is partial; itself when there are none.
    member this.Whole(slot: int, path: string) : int =
        let info = input.Slots[slot]
        let layout = Array.ofSeq info.Layout

        match Layout.partials layout with
        | [] -> slot
        | axes ->
            let whole = layout |> Array.map (fun s -> if s.IsPartialSum then AxisState.Replicated else s)
            let into = this.Temporary($"reduced:%s{info.Name}", Writer.TypeOf info, whole)
            this.AllReduce(input.Groups.Along axes, slot, into, path)
            into

    /// The slot summed over stages; itself when there is only one.
    member this.OverStages(slot: int, stages: int list, path: string) : int =
        match stages with
        | []
        | [ _ ] -> slot
        | many ->
            let info = input.Slots[slot]
            let into = this.Temporary($"stages:%s{info.Name}", Writer.TypeOf info, Array.ofSeq info.Layout)
            this.AllReduce(input.Groups.Across many, slot, into, path)
            into

let private allStages (input: Input) = [ 0 .. input.Stages - 1 ]

/// Norm of all gradients; a tied parameter counts on its first stage only.
let private clip (input: Input) (writer: Writer) (reduced: (Accumulated * int) list) : int =
    let classes =
        reduced
        |> List.filter (fun (g, _) -> g.Parameter.Stages[0] = input.Stage)
        |> List.groupBy (fun (g, _) ->
            g.Parameter.Layout
            |> Seq.indexed
            |> Seq.filter (fun (_, s) -> s.IsSplit)
            |> Seq.map fst
            |> List.ofSeq)

    let sums =
        classes
        |> List.map (fun (axes, members) ->
            let layout =
                Array.init input.Mesh.Axes.Count (fun m ->
                    if List.contains m axes then AxisState.PartialSum else AxisState.Replicated)

            let squares = writer.Temporary("squares", scalar, layout)
            writer.Launch(KernelId.SumSquares, [], List.map snd members, [ squares ], "optimizer.clip")
            writer.Whole(squares, "optimizer.clip"))

    let whole = Layout.replicated input.Mesh

    let local =
        match sums with
        | [] ->
            let zero = writer.Temporary("squares", scalar, whole)
            writer.Launch(KernelId.Zero, [], [], [ zero ], "optimizer.clip")
            zero
        | [ one ] -> one
        | many ->
            let sum = writer.Temporary("squares", scalar, whole)
            writer.Launch(KernelId.Add, [], many, [ sum ], "optimizer.clip")
            sum

    let total = writer.OverStages(local, allStages input, "optimizer.clip")
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

let private adamW (input: Input) (writer: Writer) (scale: int) (g: Accumulated, gradient: int) =
    let p = g.Parameter
    let layout = Array.ofSeq p.Layout
    let local = Layout.local input.Mesh layout (TensorType.create p.DType (Seq.zip p.Axes p.Extents))
    let wide = { local with DType = DType.Float32 }
    let state name = input.Slots.Get($"%s{name}:%s{p.Name}", SlotKind.Optimizer, wide, layout)
    let parameter = input.Slots.Get(p.Name, SlotKind.Parameter, local, layout)
    let whole = Layout.replicated input.Mesh
    let lr = input.Slots.Get("lr", SlotKind.Scalar, scalar, whole)
    let step = input.Slots.Get("step", SlotKind.Scalar, scalar, whole)
    let master = if p.DType = DType.Float32 then parameter else state "master"

    let decay =
        match p.Update with
        | Update.AdamW true -> input.Optimizer.Decay
        | Update.AdamW false
        | Update.RouterBias _
        | Update.Frozen -> 0.0

    writer.Launch(
        KernelId.AdamW,
        [
            Attribute.Float input.Optimizer.Beta1
            Attribute.Float input.Optimizer.Beta2
            Attribute.Float input.Optimizer.Eps
            Attribute.Float decay
        ],
        [ gradient; scale; lr; step ],
        [ master; state "m"; state "v"; parameter ],
        $"optimizer.%s{p.Name}"
    )

/// Prologue: accumulators start at zero.
let prologue (input: Input) : Step list = [
    let accumulators =
        (input.Gradients |> List.map _.Slot)
        @ (input.Counts |> List.map _.Slot)
        @ (input.Metrics |> List.map _.Slot)

    for slot in accumulators do
        Step.Launch(KernelId.Zero, [||], [||], [| slot |], "step")
]

/// Epilogue: reduce, clip, update, report.
let epilogue (input: Input) : Step list =
    let writer = Writer input

    let reduced =
        input.Gradients
        |> List.map (fun g ->
            let path = $"optimizer.%s{g.Parameter.Name}"
            g, writer.OverStages(writer.Whole(g.Slot, path), List.ofSeq g.Parameter.Stages, path))

    let scale = clip input writer reduced

    for update in reduced do
        adamW input writer scale update

    for c in input.Counts do
        match c.Parameter.Update with
        | Update.RouterBias rate ->
            let path = $"optimizer.%s{c.Parameter.Name}"
            let counts = writer.OverStages(writer.Whole(c.Slot, path), List.ofSeq c.Parameter.Stages, path)

            match input.Slots.TryFind c.Parameter.Name with
            | ValueSome bias -> writer.Launch(KernelId.RouterBias, [ Attribute.Float rate ], [ counts ], [ bias ], path)
            | ValueNone -> ()
        | Update.AdamW _
        | Update.Frozen -> ()

    for m in input.Metrics do
        let whole = writer.Whole(m.Slot, m.Name)
        let everywhere = writer.OverStages(whole, allStages input, m.Name)
        let into = input.Slots.Get(m.Name, SlotKind.Counter, scalar, Layout.replicated input.Mesh)
        writer.Launch(KernelId.Scale, [ Attribute.Float 1.0 ], [ everywhere ], [ into ], m.Name)

    writer.Steps

/// Scheduled graph -> plan: slots, programs, timetables, groups, memory; one set of programs per pipeline rank, whatever its coordinates.
/// before: one rank's graph, a cut into stages; after: a PlanSet. Law: running it gives the graph's outputs. Cost: linear in steps.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Lowering.Lower

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Compiler.Lowering.Edges
open DeepSeekGraph.Compiler.Lowering.Slots

/// What lowering needs to know beside the graph.
type Job = {
    Recipe: Recipe
    Mesh: MeshInfo
    /// Units of each stage of the model, pipeline ranks x chunks of them.
    Stages: LayoutUnit list list
    Schedule: Schedule
    Shape: PipelineShape
}

/// Stage of each model unit; layers and MTP depths are numbered in layout order.
let stageOf (stages: LayoutUnit list list) : ModelUnit -> int =
    let where = Dictionary<ModelUnit, int>()
    let mutable layer = 0
    let mutable mtp = 0

    stages
    |> List.iteri (fun s units ->
        for u in units do
            match u with
            | LayoutUnit.Embedding -> where[ModelUnit.Embed] <- s
            | LayoutUnit.Layer ->
                where[ModelUnit.Layer layer] <- s
                layer <- layer + 1
            | LayoutUnit.Mtp ->
                where[ModelUnit.Mtp mtp] <- s
                mtp <- mtp + 1
            | LayoutUnit.Loss -> where[ModelUnit.Head] <- s)

    fun part ->
        match where.TryGetValue part with
        | true, s -> s
        | false, _ -> if part = ModelUnit.Head then stages.Length - 1 else 0

let private globalType (mesh: MeshInfo) (layout: Layout) (local: TensorType) : TensorType = {
    local with
        Axes =
            local.Axes
            |> Array.mapi (fun d a -> {
                a with
                    Extent = a.Extent * Layout.size mesh (Layout.axesOn layout d)
            })
}

/// Parameters in order of first appearance, with the stages that read them.
let private parameters (job: Job) (p: Partitioned) (work: StageWork) : ParameterInfo[] =
    p.Graph.Nodes
    |> Array.indexed
    |> Array.choose (fun (n, node) ->
        match node.Op with
        | Op.Parameter(spec, local) ->
            let layout = p.Layouts[node.Outputs[0]]
            let t = globalType job.Mesh layout local

            Some {
                Name = spec.Name
                DType = t.DType
                Axes = t.Names
                Extents = t.Extents
                Layout = layout
                Init = spec.Init
                Update = spec.Update
                Stages =
                    work.Nodes
                    |> Array.indexed
                    |> Array.filter (fun (_, nodes) -> System.Array.BinarySearch(nodes, n) >= 0)
                    // chunks of one rank share their parameters
                    |> Array.map (fun (s, _) -> s % job.Shape.Ranks)
                    |> Array.distinct
                    |> Array.sort
            }
        | _other -> None)
    |> Array.filter (fun info -> info.Stages.Count > 0)

let private inputs (job: Job) (p: Partitioned) : InputInfo[] =
    p.Graph.Nodes
    |> Array.choose (fun node ->
        match node.Op with
        | Op.Input(name, local) when local.Rank > 0 ->
            let layout = p.Layouts[node.Outputs[0]]
            let t = globalType job.Mesh layout local

            Some {
                Name = name
                DType = t.DType
                Axes = t.Names
                Extents = t.Extents
                Layout = layout
            }
        | _other -> None)

/// What becomes of a named output of the graph.
[<RequireQualifiedAccess>]
type private Role =
    | Gradient of Parameter: string
    | Count of Parameter: string
    | Metric of Name: string
    /// Kept for whoever looks: summed over microbatches like a counter.
    | Observed of Name: string
    /// Of no further use: a loss, which has its metric, and caches, which are written where they lie.
    | Nothing

let private roleOf (name: string) =
    if name.StartsWith "grad:" then Role.Gradient(name.Substring 5)
    elif name.StartsWith "count:" then Role.Count(name.Substring 6)
    elif name.StartsWith "metric:" then Role.Metric name
    elif name = "loss" || name.StartsWith "cache:" then Role.Nothing
    else Role.Observed name

/// Accumulators of one pipeline rank: value -> slot, and what the epilogue does with them. `maker`: the stage of the model behind a value.
let private accumulators
    (job: Job)
    (p: Partitioned)
    (parameters: ParameterInfo[])
    (slots: SlotTable)
    (stage: int)
    (maker: int -> int)
    =
    let graph = p.Graph
    let find name = parameters |> Array.tryFind (fun i -> i.Name = name)
    let added = List<int * int>()
    let gradients = Dictionary<string, Epilogue.Accumulated>()
    let counts = List<Epilogue.Accumulated>()
    let metrics = List<Epilogue.Metric>()

    let slot (kind: SlotKind) (name: string) (t: TensorType) layout =
        let sum = if kind.IsGradient then job.Recipe.StateTypes.MainGrads else DType.Float32
        let t = if t.DType.IsFloat then { t with DType = sum } else t
        slots.Get(name, kind, t, layout)

    for name, v in graph.Outputs do
        let here = maker v % job.Shape.Ranks = stage
        let t, layout = graph.Types[v], p.Layouts[v]

        match roleOf name with
        | Role.Gradient parameter ->
            match find parameter with
            | Some info when Seq.contains stage info.Stages ->
                // a tied parameter's gradient parts agree in layout; every holder has an accumulator
                let id = slot SlotKind.Gradient $"grad:%s{parameter}" t layout
                gradients[parameter] <- { Parameter = info; Slot = id }

                if here then
                    added.Add((v, id))
            | Some _
            | None -> ()
        | Role.Count parameter ->
            match find parameter with
            | Some info when here ->
                let id = slot SlotKind.Counter name t layout
                counts.Add { Parameter = info; Slot = id }
                added.Add((v, id))
            | Some _
            | None -> ()
        | Role.Metric name ->
            // one metric may have a part on every stage: parts agree in layout, and are summed
            let id = slot SlotKind.Counter $"acc:%s{name}" t layout

            if not (metrics.Exists(fun m -> m.Slot = id)) then
                metrics.Add { Name = name; Slot = id }

            if here then
                added.Add((v, id))
        | Role.Observed name ->
            if here then
                added.Add((v, slot SlotKind.Counter $"observe:%s{name}" t layout))
        | Role.Nothing -> ()

    let input groups : Epilogue.Input = {
        Stage = stage
        Stages = job.Shape.Ranks
        Trains = job.Recipe.Mode.IsTrain
        Optimizer = job.Recipe.Optimizer
        StateTypes = job.Recipe.StateTypes
        Distributed = job.Recipe.DistributedOptimizer
        Slots = slots
        Groups = groups
        Mesh = job.Mesh
        Bucket = job.Recipe.GradBucketSize
        Gradients = [
            for info in parameters do
                match gradients.TryGetValue info.Name with
                | true, g -> g
                | false, _ -> ()
        ]
        Overlaps = job.Recipe.OverlapGradReduce
        Early = []
        Counts = List.ofSeq counts
        Metrics = List.ofSeq metrics
    }

    let observed = [
        for name, v in graph.Outputs do
            match roleOf name with
            | Role.Observed _ when maker v % job.Shape.Ranks = stage ->
                snd (added |> Seq.find (fun (_, s) -> slots[s].Name = $"observe:%s{name}"))
            | Role.Observed _
            | Role.Gradient _
            | Role.Count _
            | Role.Metric _
            | Role.Nothing -> ()
    ]

    // an output may be another name of a value: what is added is the value
    [ for v, slot in added -> maker v, (root graph v, slot) ], input, observed

let private program phase chunk steps = {
    Phase = phase
    Chunk = chunk
    Steps = steps
}

/// One pipeline rank: its chunks' programs over one table of slots.
let private rank
    (job: Job)
    (p: Partitioned)
    work
    parameters
    groups
    home
    (r: int)
    (timetable: Action list list)
    : StagePlan =
    let graph = p.Graph
    let ranks, chunks = job.Shape.Ranks, job.Shape.Chunks

    // what no stage owns is counted on the last
    let maker v =
        let made = home v
        if made < 0 then job.Stages.Length - 1 else made

    let slots = SlotTable()
    let added, epilogue, observed = accumulators job p parameters slots r maker
    let input = epilogue groups
    let clock = Overlap.clock job.Mesh job.Recipe.RanksPerNode (Routing.first graph) (fun group -> groups[group])
    let mutable token = -1

    let next () =
        token <- token + 1
        token

    let programs =
        Array.init chunks (fun chunk ->
            let stage = chunk * ranks + r

            Programs.build {
                Stage = stage
                Pipeline = ranks
                Home = home
                Attention = job.Recipe.AttentionBackend
                NextToken = next
                Partitioned = p
                Work = work
                Phases = Edges.phases graph work stage
                Slots = slots
                Groups = groups
                Accumulators = [
                    for made, accumulator in added do
                        if made = stage then
                            accumulator
                ]
                Clock = if job.Recipe.Overlap then ValueSome clock else ValueNone
            })

    // W in parts, where gradients are to be reduced as they become complete
    let isReduced =
        let slots = HashSet<int>()

        if job.Recipe.OverlapGradReduce && input.Trains then
            for g in input.Gradients do
                if Epilogue.isReduced input g then
                    slots.Add g.Slot |> ignore

        slots.Contains

    let size slot = if isReduced slot then Epilogue.elements slots[slot] else 0L
    let bucket = Epilogue.bucket input.Bucket (Mesh.extent job.Mesh (Mesh.axesOf job.Mesh "dp"))
    let phases = Dictionary<struct (string * int), Step list list>()

    programs
    |> Array.iteri (fun chunk built ->
        for phase, steps in built do
            phases[struct (phase.Word, chunk)] <-
                match phase with
                | Phase.W _ -> Reductions.cut bucket size steps
                | Phase.F _
                | Phase.I _
                | Phase.Prologue
                | Phase.S
                | Phase.R _
                | Phase.Epilogue -> [ steps ])

    let pieces (phase: Phase) chunk = phases.GetValueOrDefault(struct (phase.Word, chunk), [ [] ])
    let struct (parts, timetable) = Weave.run (clock (slots.ToArray())) pieces timetable
    let stepsOf (a: Action) = (parts a.Phase a.Chunk)[a.Phase.Part]
    let early = Reductions.early stepsOf isReduced timetable
    let timetable = Reductions.place early timetable

    let struct (reductions, epilogue) =
        Epilogue.epilogue {
            input with
                Early = early |> List.map _.Gradients
        }

    // memory is given back in the order in which the rank runs a microbatch
    let turns = timetable |> List.filter (fun a -> a.Microbatch = 0 && not a.Phase.IsOnce)
    let freed = [| for a in turns -> stepsOf a |] |> Lifetimes.insert slots
    let find phase chunk = freed[turns |> List.findIndex (fun a -> a.Phase = phase && a.Chunk = chunk)]
    let zeros = observed |> List.map (fun slot -> Step.Launch(KernelId.Zero, [||], [||], [| slot |], "step"))
    let once = Lifetimes.insert slots [| Epilogue.prologue input @ zeros; yield! reductions; epilogue |]

    let programs = [|
        program Phase.Prologue 0 once[0]

        for chunk in 0 .. chunks - 1 do
            for phase in [ Phase.F 0; Phase.I 0; Phase.W 0; Phase.S ] do
                for part in 0 .. (parts phase chunk).Length - 1 do
                    let phase = phase.WithPart part
                    program phase chunk (find phase chunk)

            for i, e in List.indexed early |> List.sortBy (fun (_, e) -> e.Part) do
                if e.Chunk = chunk then
                    program (Phase.R e.Part) chunk once[1 + i]

        program Phase.Epilogue 0 (Array.last once)
    |]

    {
        Stage = r
        Units =
            [
                for chunk in 0 .. chunks - 1 -> LayoutString.letters job.Stages[chunk * ranks + r]
            ]
            |> String.concat "|"
        Slots = Padding.assign job.Recipe.PermutePadding (slots.ToArray()) (programs |> Seq.collect _.Steps)
        Programs = programs
        Timetable = Array.ofList timetable
    }

/// The plan of a partitioned graph.
let run (job: Job) (p: Partitioned) : PlanSet =
    let graph = p.Graph
    let homes = Edges.homes graph (stageOf job.Stages)
    let home value = homes[graph.Producer[root graph value]]
    let work = Edges.assign graph job.Stages.Length homes (job.Stages.Length - 1)
    let parameters = parameters job p work
    let groups = GroupTable job.Mesh

    let stages =
        Timetable.groups job.Schedule job.Shape
        |> List.mapi (rank job p work parameters groups home)
        |> Array.ofList

    {
        Version = PlanSchema.Version
        Recipe = RecipeSettings.lines job.Recipe
        Mesh = job.Mesh
        Layout = LayoutString.print job.Stages
        Schedule = job.Schedule.Name
        Chunks = job.Shape.Chunks
        Microbatches = job.Shape.Microbatches
        MicroBatch = job.Recipe.MicroBatch * job.Mesh.Data
        SeqLength = job.Recipe.SeqLength
        Groups = groups.ToArray()
        Parameters = parameters
        Inputs = inputs job p
        Stages = stages
        Memory = stages |> Array.map (Memory.row job.Mesh)
    }

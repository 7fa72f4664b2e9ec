/// Random plans: any data of the right types, legal to run or not.
module DeepSeekGraph.Compiler.Tests.Plans

open System
open System.Collections.Generic
open FsCheck.FSharp
open DeepSeekGraph

let private names =
    Gen.elements [
        "tp"
        "model.embed"
        "%12"
        "a b"
        "quote\"d"
        "back\\slash"
        "new\nline"
        ""
        "münze"
        "->"
        "R"
        "routed"
        "t4"
        "-3"
    ]

let private number = Gen.choose (0, 1000)

let private many n (gen: FsCheck.Gen<'a>) =
    Gen.choose (0, n)
    |> Gen.bind (fun k -> Gen.arrayOfLength k gen)
    |> Gen.map (fun a -> a :> IReadOnlyList<'a>)

let private real =
    Gen.elements [
        0.0
        -0.0
        1.0
        0.1
        1e-6
        -2.5e300
        1.0 / 3.0
        infinity
        4096.0
        Double.Epsilon
    ]

let private slotKinds = [
    SlotKind.Parameter
    SlotKind.Optimizer
    SlotKind.Gradient
    SlotKind.Counter
    SlotKind.Scalar
    SlotKind.Input
    SlotKind.Saved
    SlotKind.Temporary
]

let private dtype = Gen.elements DType.All

let private state =
    Gen.oneof [
        Gen.constant AxisState.Replicated
        Gen.map AxisState.Split (Gen.choose (0, 4))
        Gen.constant AxisState.PartialSum
        Gen.constant AxisState.PartialMax
    ]

/// Axes and extents of one rank.
let private shape = gen {
    let! rank = Gen.choose (0, 4)
    let! axes = Gen.arrayOfLength rank names
    let! extents = Gen.arrayOfLength rank number
    return axes :> IReadOnlyList<string>, extents :> IReadOnlyList<int>
}

let private attribute =
    Gen.oneof [
        Gen.map (fun (n: int) -> Attribute.Int(int64 n * 3_000_000_000L)) (Gen.choose (-9, 9))
        Gen.map Attribute.Float real
        Gen.map Attribute.Ints (many 3 (Gen.map int64 (Gen.choose (-5, 5))))
        Gen.map Attribute.Text names
    ]

let private collective =
    Gen.oneof [
        Gen.elements [
            Collective.AllReduceSum
            Collective.AllReduceMax
            Collective.RouteToExperts
            Collective.RowsToExperts
            Collective.RowsToTokens
        ]
        Gen.map Collective.AllGather (Gen.choose (0, 4))
        Gen.map Collective.ReduceScatter (Gen.choose (0, 4))
        Gen.map2 (fun a b -> Collective.AllToAll(a, b)) (Gen.choose (0, 4)) (Gen.choose (0, 4))
        Gen.map Collective.Dispatch number
        Gen.map Collective.Combine number
        Gen.map Collective.Send number
        Gen.map Collective.Recv number
    ]

let private step = gen {
    let! kernel = Gen.elements (Enum.GetValues<KernelId>())
    let! attributes = many 4 attribute
    let! inputs = many 4 number
    let! outputs = many 2 number
    let! path = names
    let! token = number
    let! group = number
    let! kind = collective

    return!
        Gen.elements [
            Step.Launch(kernel, attributes, inputs, outputs, path)
            Step.Start(token, kind, group, inputs, outputs, path)
            Step.Wait token
            Step.Free group
        ]
}

let private slot = gen {
    let! id = number
    let! name = names
    let! kind = Gen.elements slotKinds
    let! dtype = dtype
    let! axes, extents = shape
    let! routed = Gen.elements [ true; false ]
    let! density = real
    let! layout = many 3 state

    return {
        Id = id
        Name = name
        Kind = kind
        DType = dtype
        Axes = axes
        Extents = extents
        Routed = routed
        Density = density
        Padding = 1
        Layout = layout
    }
}

let private phase = gen {
    let! phase = Gen.elements Phase.All
    let! part = number

    return phase.WithPart part
}

let private stage = gen {
    let! stage = number
    let! units = names
    let! slots = many 4 slot

    let! programs =
        many
            3
            (Gen.map3
                (fun phase chunk steps -> {
                    Phase = phase
                    Chunk = chunk
                    Steps = steps
                })
                phase
                number
                (many 6 step))

    let! timetable =
        many
            6
            (Gen.map3
                (fun (phase: Phase) chunk microbatch ->
                    let once = phase.IsOnce

                    {
                        Phase = phase
                        Chunk = (if once && not phase.IsR then 0 else chunk)
                        Microbatch = (if once then 0 else microbatch)
                    })
                phase
                number
                number)

    return {
        Stage = stage
        Units = units
        Slots = slots
        Programs = programs
        Timetable = timetable
    }
}

let private parameter = gen {
    let! name = names
    let! dtype = dtype
    let! axes, extents = shape
    let! layout = many 3 state
    let! init = Gen.oneof [ Gen.elements [ Init.Zeros; Init.Ones ]; Gen.map Init.Normal real ]

    let! update =
        Gen.oneof [
            Gen.elements [ Update.AdamW true; Update.AdamW false; Update.Frozen ]
            Gen.map Update.RouterBias real
        ]

    let! stages = many 3 number

    return {
        Name = name
        DType = dtype
        Axes = axes
        Extents = extents
        Layout = layout
        Init = init
        Update = update
        Stages = stages
    }
}

let plan = gen {
    let! recipe = many 3 names
    let! degrees = Gen.arrayOfLength 7 number
    let! axes = many 3 (Gen.map2 (fun name size -> { Name = name; Size = size }: MeshAxis) names number)
    let! layout = names
    let! schedule = names
    let! counts = Gen.arrayOfLength 4 number

    let! groups =
        many
            3
            (Gen.map3
                (fun id (axes, stages) name -> {
                    Id = id
                    Name = name
                    MeshAxes = axes
                    Stages = stages
                })
                number
                (Gen.zip (many 3 number) (many 3 number))
                names)

    let! parameters = many 3 parameter

    let! inputs =
        many
            2
            (Gen.map3
                (fun name dtype ((axes, extents), layout) ->
                    {
                        Name = name
                        DType = dtype
                        Axes = axes
                        Extents = extents
                        Layout = layout
                    }
                    : InputInfo)
                names
                dtype
                (Gen.zip shape (many 3 state)))

    let! stages = many 3 stage

    let! memory =
        many
            2
            (Gen.map
                (fun (n: int) -> {
                    Stage = n
                    Parameters = int64 n * 5_000_000_000L
                    Optimizer = -1L
                    Gradients = 0L
                    Counters = 5L
                    Activations = int64 n
                    Collectives = 6L
                    Peak = 7L
                    Headroom = 8L
                    Worst = 9L
                    Arena = 10L
                    Regions = [|
                        for i in 1 .. n % 3 do
                            {
                                From = "plan"
                                Until = "W@1"
                                Routed = (i = 1)
                                Base = int64 i
                                Stride = 256L
                                Count = n
                            }
                    |]
                    Offsets = [| for i in 1 .. n % 4 -> int64 i - 2L |]
                })
                number)

    return {
        Version = PlanSchema.Version
        Recipe = recipe
        Mesh = {
            Tensor = degrees[0]
            Context = degrees[1]
            Data = degrees[2]
            Pipeline = degrees[3]
            ExpertTensor = degrees[4]
            Expert = degrees[5]
            ExpertData = degrees[6]
            Axes = axes
        }
        Layout = layout
        Schedule = schedule
        Chunks = counts[3]
        Microbatches = counts[0]
        MicroBatch = counts[1]
        SeqLength = counts[2]
        Groups = groups
        Parameters = parameters
        Inputs = inputs
        Stages = stages
        Memory = memory
    }
}

let private without (list: IReadOnlyList<'a>) : IReadOnlyList<'a> seq = seq {
    for i in 0 .. list.Count - 1 ->
        list |> Seq.indexed |> Seq.filter (fun (k, _) -> k <> i) |> Seq.map snd |> Array.ofSeq :> IReadOnlyList<'a>
}

/// Smaller plans: one item of one list left out.
let shrink (p: PlanSet) : PlanSet seq = seq {
    for x in without p.Stages do
        yield { p with Stages = x }

    for x in without p.Parameters do
        yield { p with Parameters = x }

    for x in without p.Inputs do
        yield { p with Inputs = x }

    for x in without p.Groups do
        yield { p with Groups = x }

    for x in without p.Recipe do
        yield { p with Recipe = x }

    for x in without p.Memory do
        yield { p with Memory = x }

    if p.Stages.Count = 1 then
        let s = p.Stages[0]

        for s in
            Seq.concat [
                without s.Slots |> Seq.map (fun x -> { s with Slots = x })
                without s.Programs |> Seq.map (fun x -> { s with Programs = x })
                without s.Timetable |> Seq.map (fun x -> { s with Timetable = x })
            ] do
            yield { p with Stages = [| s |] }
}

/// Generators for properties.
type Arbitraries =
    static member PlanSet() = Arb.fromGenShrink (plan, shrink)

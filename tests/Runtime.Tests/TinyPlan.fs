/// A plan written by hand: an embedding on stage 0, a matrix on stage 1, loss = sum((x W^T)^2) / tokens.
module DeepSeekGraph.Runtime.Tests.TinyPlan

open DeepSeekGraph
open DeepSeekGraph.Runtime.Tests.CollectiveTests

let vocab, hidden, seq = 6, 4, 3

let private f32 = DType.Float32

/// Slots by name; ids in order of first use.
type private Slots(data: int) =
    let slots = System.Collections.Generic.List<SlotInfo>()

    member _.All = slots.ToArray()

    member _.Add(name, kind, dtype, extents: int list, layout: AxisState) =
        slots.Add {
            Id = 100 + slots.Count
            Name = name
            Kind = kind
            DType = dtype
            Axes = [| for i in 0 .. extents.Length - 1 -> $"d%i{i}" |]
            Extents = Array.ofList extents
            Routed = false
            Density = 1.0
            Padding = 1
            Layout = if data > 1 then [| layout |] else [||]
        }

    member _.Item
        with get (name: string) = (slots |> Seq.find (fun s -> s.Name = name)).Id

let private whole, rows, partial = AxisState.Replicated, AxisState.Split 0, AxisState.PartialSum

let action phase microbatch : Action = {
    Phase = phase
    Chunk = 0
    Microbatch = microbatch
}

/// data ranks a stage (batch split over them), microbatches of `batch` rows each.
let plan data microbatches batch : PlanSet =
    let local = batch / data

    let parameterSlots (slots: Slots) name extents =
        slots.Add(name, SlotKind.Parameter, f32, extents, whole)
        slots.Add("m:" + name, SlotKind.Optimizer, f32, extents, whole)
        slots.Add("v:" + name, SlotKind.Optimizer, f32, extents, whole)
        slots.Add("grad:" + name, SlotKind.Gradient, f32, extents, partial)

        for scalar in [ "lr"; "step"; "inv_tokens" ] do
            slots.Add(scalar, SlotKind.Scalar, f32, [], whole)

        slots.Add("metric:loss", SlotKind.Counter, f32, [], partial)
        slots.Add("metric:grad_norm", SlotKind.Counter, f32, [], whole)
        slots.Add("sumsq", SlotKind.Temporary, f32, [], whole)
        slots.Add("total", SlotKind.Temporary, f32, [], whole)
        slots.Add("scale", SlotKind.Temporary, f32, [], whole)

    let launch (slots: Slots) kernel attributes inputs outputs path =
        Step.Launch(
            kernel,
            Array.ofList attributes,
            inputs |> List.map (fun (n: string) -> slots[n]) |> Array.ofList,
            outputs |> List.map (fun (n: string) -> slots[n]) |> Array.ofList,
            path
        )

    let move (slots: Slots) token kind group inputs outputs = [
        Step.Start(
            token,
            kind,
            group,
            inputs |> List.map (fun (n: string) -> slots[n]) |> Array.ofList,
            outputs |> List.map (fun (n: string) -> slots[n]) |> Array.ofList,
            "tiny"
        )
        Step.Wait token
    ]

    let free (slots: Slots) names = [ for n: string in names -> Step.Free slots[n] ]

    let epilogue (slots: Slots) name =
        let data =
            if data > 1 then
                move slots 1 Collective.AllReduceSum 0 [ "grad:" + name; "metric:loss" ] [
                    "grad:" + name
                    "metric:loss"
                ]
            else
                []

        [
            yield! data
            launch slots KernelId.SumSquares [] [ "grad:" + name ] [ "sumsq" ] "clip"
            yield! move slots 2 Collective.AllReduceSum 1 [ "sumsq" ] [ "total" ]
            launch slots KernelId.ClipScale [ Attribute.Float 1.0 ] [ "total" ] [ "metric:grad_norm"; "scale" ] "clip"
            launch
                slots
                KernelId.AdamW
                (List.map Attribute.Float [ 0.9; 0.95; 1e-8; 0.1 ])
                [ "grad:" + name; "scale"; "lr"; "step" ]
                [ name; "m:" + name; "v:" + name; name ]
                name
            yield! free slots [ "sumsq"; "total"; "scale" ]
        ]

    let prologue (slots: Slots) name = [
        launch slots KernelId.Zero [] [] [ "grad:" + name ] name
        launch slots KernelId.Zero [] [] [ "metric:loss" ] "loss"
    ]

    let first =
        let slots = Slots data
        parameterSlots slots "embed" [ vocab; hidden ]
        slots.Add("tokens", SlotKind.Input, DType.Int64, [ local; seq + 1 ], rows)
        slots.Add("ids", SlotKind.Saved, DType.Int64, [ local; seq ], rows)
        slots.Add("range", SlotKind.Saved, DType.Int64, [ vocab ], whole)
        slots.Add("x", SlotKind.Temporary, f32, [ local; seq; hidden ], rows)
        slots.Add("dx", SlotKind.Saved, f32, [ local; seq; hidden ], rows)
        slots.Add("dE", SlotKind.Temporary, f32, [ vocab; hidden ], partial)
        let launch = launch slots

        slots.All,
        [
            Phase.Prologue, prologue slots "embed"
            Phase.F 0,
            [
                launch
                    KernelId.Slice
                    [ Attribute.Int 1L; Attribute.Int 0L; Attribute.Int(int64 seq) ]
                    [ "tokens" ]
                    [ "ids" ]
                    "embed"
                yield! free slots [ "tokens" ]
                launch KernelId.Iota [ Attribute.Ints [||] ] [] [ "range" ] "embed"
                launch KernelId.Embedding [] [ "ids"; "embed"; "range" ] [ "x" ] "embed"
                yield! move slots 1 (Collective.Send 1) 1 [ "x" ] []
                yield! free slots [ "x" ]
            ]
            Phase.I 0, move slots 1 (Collective.Recv 1) 2 [] [ "dx" ]
            Phase.W 0,
            [
                launch KernelId.EmbeddingGrad [] [ "ids"; "dx"; "range" ] [ "dE" ] "embed"
                launch KernelId.Accumulate [] [ "dE" ] [ "grad:embed" ] "embed"
                yield! free slots [ "ids"; "dx"; "dE"; "range" ]
            ]
            Phase.Epilogue, epilogue slots "embed"
        ]

    let second =
        let slots = Slots data
        parameterSlots slots "head" [ hidden; hidden ]

        for name, kind in
            [
                "x", SlotKind.Saved
                "z", SlotKind.Saved
                "q", SlotKind.Temporary
                "dz", SlotKind.Temporary
                "g", SlotKind.Saved
                "dx", SlotKind.Temporary
            ] do
            slots.Add(name, kind, f32, [ local; seq; hidden ], rows)

        slots.Add("l", SlotKind.Temporary, f32, [], partial)
        slots.Add("l1", SlotKind.Temporary, f32, [], partial)
        slots.Add("dW", SlotKind.Temporary, f32, [ hidden; hidden ], partial)
        let launch = launch slots
        let text s = [ Attribute.Text s ]

        slots.All,
        [
            Phase.Prologue, prologue slots "head"
            Phase.F 0,
            [
                yield! move slots 1 (Collective.Recv 0) 1 [] [ "x" ]
                launch KernelId.Contract (text "b s k+, n k+ -> b s n") [ "x"; "head" ] [ "z" ] "head"
                launch KernelId.Mul [ Attribute.Ints [| 0L; 1L; 2L |] ] [ "z"; "z" ] [ "q" ] "loss"
                launch KernelId.Sum [ Attribute.Ints [| 0L; 1L; 2L |] ] [ "q" ] [ "l" ] "loss"
                launch KernelId.Mul [ Attribute.Ints [||] ] [ "l"; "inv_tokens" ] [ "l1" ] "loss"
                launch KernelId.Accumulate [] [ "l1" ] [ "metric:loss" ] "loss"
                yield! free slots [ "q"; "l"; "l1" ]
            ]
            Phase.I 0,
            [
                launch KernelId.Scale [ Attribute.Float 2.0 ] [ "z" ] [ "dz" ] "loss"
                launch KernelId.Mul [ Attribute.Ints [||] ] [ "dz"; "inv_tokens" ] [ "g" ] "loss"
                launch KernelId.Contract (text "b s n+, n+ k -> b s k") [ "g"; "head" ] [ "dx" ] "head"
                yield! move slots 1 (Collective.Send 0) 2 [ "dx" ] []
                yield! free slots [ "z"; "dz"; "dx" ]
            ]
            Phase.W 0,
            [
                launch KernelId.Contract (text "b+ s+ n, b+ s+ k -> n k") [ "g"; "x" ] [ "dW" ] "head"
                launch KernelId.Accumulate [] [ "dW" ] [ "grad:head" ] "head"
                yield! free slots [ "x"; "g"; "dW" ]
            ]
            Phase.Epilogue, epilogue slots "head"
        ]

    let stage number (slots: SlotInfo[], programs: (Phase * Step list) list) : StagePlan = {
        Stage = number
        Units = "x"
        Slots = slots
        Programs = [|
            for phase, steps in programs ->
                {
                    Phase = phase
                    Chunk = 0
                    Steps = Array.ofList steps
                }
        |]
        Timetable = [|
            action Phase.Prologue 0
            for m in 0 .. microbatches - 1 do
                action (Phase.F 0) m
            for m in 0 .. microbatches - 1 do
                action (Phase.I 0) m
                action (Phase.W 0) m
                action Phase.S m
            action Phase.Epilogue 0
        |]
    }

    let layout state = if data > 1 then [| state |] else [||]

    let parameter name extents stage : ParameterInfo = {
        Name = name
        DType = f32
        Axes = [| "out"; "in" |]
        Extents = Array.ofList extents
        Layout = layout whole
        Init = Init.Normal 0.5
        Update = Update.AdamW true
        Stages = [| stage |]
    }

    {
        Version = PlanSchema.Version
        Recipe = [||]
        Mesh = {
            mesh (if data > 1 then [ data ] else []) with
                Data = data
                Pipeline = 2
        }
        Layout = "x|x"
        Schedule = "GPipe"
        Chunks = 1
        Microbatches = microbatches
        MicroBatch = batch
        SeqLength = seq
        Groups = [| axesGroup 0 [ 0 ]; stageGroup 1 [ 0; 1 ]; stageGroup 2 [ 1; 0 ] |]
        Parameters = [|
            parameter "embed" [ vocab; hidden ] 0
            parameter "head" [ hidden; hidden ] 1
        |]
        Inputs = [|
            {
                Name = "tokens"
                DType = DType.Int64
                Axes = [| "batch"; "seq" |]
                Extents = [| batch; seq + 1 |]
                Layout = layout rows
            }
        |]
        Stages = [| stage 0 first; stage 1 second |]
        Memory = [||]
    }

/// The end of a step: every gradient reduced once, states sharded, parameters gathered, and the same numbers as without shards.
module DeepSeekGraph.Compiler.Tests.OptimizerTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Lowering

let private base' = Recipe.Default.WithBatch(12, 1, 8)

/// Clipping far away: the norm's sum of squares is taken shard by shard, so that only its last bits may differ.
let private unclipped (recipe: Recipe) = recipe.WithAdam(0.9, 0.95, 1e-8, 0.1, 1e9)

let private layouts = [
    "tp 2, pp 2, ep 2, dp 2", base'.WithParallelism(2, 2, 2, 2).WithLayout "Et|tmL"
    "dp 4, experts on two", base'.WithParallelism(1, 1, 2, 4)
    "tp 2, dp 2, experts copied", base'.WithParallelism(2, 1, 1, 2)
    // 3 divides hardly an extent: most parameters stay whole
    "dp 3", base'.WithParallelism(1, 1, 1, 3)
]

let private plan (recipe: Recipe) = Subjects.compile 2 recipe

/// Steps of the epilogue of a stage.
let private epilogue (plan: PlanSet) stage = plan.Stages[stage].Programs |> Seq.find _.Phase.IsEpilogue |> _.Steps

/// The same in bf16, with remainders for masters.
let private remainders (recipe: Recipe) =
    let b16 = DType.BFloat16
    recipe.WithDType(b16).WithStateTypes(MainParams.Remainder, b16, b16, b16)

let private equalBits name (recipe: Recipe) =
    testCase $"%s{name}: sharded states change no bit of loss, gradients and parameters"
    <| fun () ->
        let run on = (Subjects.run (plan ((unclipped recipe).WithDistributedOptimizer on))).Value
        let sharded, whole = run true, run false
        Expect.equal sharded.Loss whole.Loss "loss"
        Expect.floatClose { absolute = 0.0; relative = 1e-6 } sharded.GradNorm whole.GradNorm "gradient norm"

        for KeyValue(name, values) in whole.Tensors do
            Expect.equal sharded.Tensors[name] values name

/// Elements of a slot on one rank.
let private elements (slot: SlotInfo) = slot.Extents |> Seq.fold (fun n e -> n * int64 e) 1L

let private states name (recipe: Recipe) =
    testCase $"%s{name}: states lie where a rule written by hand says"
    <| fun () ->
        let plan = plan recipe
        let mesh = plan.Mesh

        for p in plan.Parameters |> Seq.filter _.Update.IsAdamW do
            let copies = if Seq.contains "experts" p.Axes then mesh.ExpertData else mesh.Data * mesh.Context
            let shards = p.Extents |> Seq.fold (fun n e -> n * int64 e) 1L

            let split =
                p.Layout
                |> Seq.indexed
                |> Seq.filter (fun (_, s) -> s.IsSplit)
                |> Seq.fold (fun n (m, _) -> n * int64 mesh.Axes[m].Size) 1L

            for stage in p.Stages do
                for state in [ "m:"; "v:" ] do
                    let slot = plan.Stages[stage].Slots |> Seq.find (fun s -> s.Name = state + p.Name)
                    let divides = p.Extents |> Seq.exists (fun e -> e % copies = 0)
                    let expected = shards / split / (if divides then int64 copies else 1L)
                    Expect.equal (elements slot) expected slot.Name

/// Values that the data axes reduce, by the phase in which they are: parameters in R and the epilogue, nothing else.
let private dataReductions (plan: PlanSet) = [
    for stage in plan.Stages do
        for program in stage.Programs do
            for step in program.Steps do
                match step with
                | Step.Start(_, kind, group, inputs, _, path) when
                    kind.IsReduceScatter || kind.IsAllReduceSum || kind.IsAllGather
                    ->
                    let names = [ for m in plan.Groups[group].MeshAxes -> plan.Mesh.Axes[m].Name ]

                    if List.contains "dp" names then
                        for slot in inputs -> program.Phase.Word, string kind, stage.Slots[slot].Name, path
                | Step.Start _
                | Step.Launch _
                | Step.Wait _
                | Step.Free _ -> ()
]

let private counts =
    testList "counts" [
        testCase "data parallel: one reduction a gradient and step, one gather a parameter, nothing per microbatch"
        <| fun () ->
            let plan = plan (base'.WithParallelism(1, 1, 1, 2))
            let moved = dataReductions plan
            let trained = plan.Parameters |> Seq.filter _.Update.IsAdamW |> Seq.map _.Name |> Seq.sort |> List.ofSeq
            let inMicrobatches = moved |> List.filter (fun (phase, _, _, _) -> phase <> "epilogue" && phase <> "R")
            Expect.isEmpty inMicrobatches "gradients stay partial over data axes"

            let at path = [
                for _, _, name, p in moved do
                    if p = path then
                        name
            ]

            let reduced = at "optimizer.reduce" |> List.map (fun n -> n.Substring 5) |> List.sort
            Expect.equal reduced trained "each gradient once"
            let gathered = at "optimizer.gather" |> List.map (fun n -> n.Split(':')[1]) |> List.sort
            Expect.equal gathered trained "each parameter once"

        testCase "bundles: a start per kind and group, not per parameter"
        <| fun () ->
            let plan = plan (base'.WithParallelism(2, 1, 2, 2).WithOverlapGradReduce false)

            let starts path =
                epilogue plan 0
                |> Seq.choose (fun step ->
                    match step with
                    | Step.Start(_, kind, group, inputs, _, p) when p = path ->
                        Some(string kind, plan.Groups[group].Name, inputs.Count)
                    | Step.Start _
                    | Step.Launch _
                    | Step.Wait _
                    | Step.Free _ -> None)
                |> List.ofSeq

            let names = starts "optimizer.reduce" |> List.map (fun (kind, group, _) -> kind, group)
            Expect.equal names (List.distinct names) "one of each"
            let tuples = starts "optimizer.reduce" |> List.sumBy (fun (_, group, n) -> if group = "dp" then n else 0)
            Expect.equal tuples (plan.Parameters |> Seq.filter _.Update.IsAdamW |> Seq.length) "all parameters"
            // replicated weights see their rank's tokens only: their shards are summed over tp too
            let overTensor = starts "optimizer.reduce" |> List.filter (fun (_, group, _) -> group = "tp")
            Expect.equal (overTensor |> List.map (fun (kind, _, _) -> kind)) [ "AllReduceSum" ] "tp"

        testCase "each gradient is reduced behind the part of W that completes it, in that order"
        <| fun () ->
            let plan = plan (base'.WithParallelism(1, 1, 1, 2).WithGradBucketSize 64)
            let stage = plan.Stages[0]

            let slots (phase: Phase) pick = [
                for program in stage.Programs do
                    if program.Phase = phase then
                        for step in program.Steps do
                            yield! pick step
            ]

            let parts = stage.Programs |> Seq.filter _.Phase.IsW |> Seq.length
            Expect.isGreaterThan parts 8 "parts"

            let added part =
                slots (Phase.W part) (fun step ->
                    match step with
                    | Step.Launch(KernelId.Accumulate, _, _, outputs, _) ->
                        outputs |> Seq.filter (fun s -> stage.Slots[s].Kind.IsGradient) |> List.ofSeq
                    | Step.Launch _
                    | Step.Start _
                    | Step.Wait _
                    | Step.Free _ -> [])

            for part in 0 .. parts - 1 do
                // the embedding has a part from MTP and one from below all layers
                let completed = added part |> List.except (List.collect added [ part + 1 .. parts - 1 ])

                let begun =
                    slots (Phase.R part) (fun step ->
                        match step with
                        | Step.Start(_, _, _, inputs, _, _) -> List.ofSeq inputs
                        | Step.Launch _
                        | Step.Wait _
                        | Step.Free _ -> [])

                // a bundle is of one kind: what is not scattered goes by itself
                Expect.equal (List.sort begun) (List.sort completed) $"part %i{part}"

            let m = plan.Microbatches - 1

            let last =
                stage.Timetable |> Seq.map _.Name |> Seq.skipWhile ((<>) $"S%i{m - 1}") |> Seq.skip 1 |> List.ofSeq

            let expected = [
                $"F%i{m}"
                $"I%i{m}"
                $"W%i{m}"
                "R"

                for part in 1 .. parts - 1 do
                    $"W%i{m}.%i{part}"
                    $"R.%i{part}"

                $"S%i{m}"
                "epilogue"
            ]

            Expect.equal last expected "R behind the parts of the last microbatch"

        testCase "reverse order of definition"
        <| fun () ->
            let plan = plan (base'.WithParallelism(1, 1, 1, 2).WithOverlapGradReduce false)

            let order = [
                for _, kind, name, path in dataReductions plan do
                    if path = "optimizer.reduce" && kind.Contains "ReduceScatter 0" then
                        name.Substring 5
            ]

            let defined = plan.Parameters |> Seq.map _.Name |> Seq.filter (fun n -> List.contains n order) |> List.ofSeq
            Expect.equal order (List.rev defined) "parameters"
    ]

let private stateTypes =
    testList "state types" [
        testCase "slots have the types the recipe names, and the step runs"
        <| fun () ->
            let b16 = DType.BFloat16

            let recipe =
                base'.WithParallelism(2, 1, 2, 2).WithDType(b16).WithStateTypes(MainParams.Float32, b16, b16, b16)

            let plan = plan recipe

            for slot in plan.Stages[0].Slots do
                match slot.Name.Split(':')[0] with
                | "master" -> Expect.equal slot.DType DType.Float32 slot.Name
                | "m"
                | "v"
                | "grad" -> Expect.equal slot.DType b16 slot.Name
                | _other -> ()

            Expect.isSome (Subjects.run plan) "it runs"

            let wide =
                Subjects.compile
                    2
                    (recipe.WithStateTypes(MainParams.Float32, DType.Float32, DType.Float32, DType.Float32))

            let bytes (p: PlanSet) = p.Memory[0].Gradients, p.Memory[0].Optimizer
            let g, o = bytes wide
            // gradients 4 -> 2 bytes; states 4 + 4 + 4 -> 4 + 2 + 2
            Expect.equal (bytes plan) (g / 2L, o * 8L / 12L) "bytes"

        testCase "remainders: 16 bits beside each bf16 weight, an fp32 one its own master, 10 bytes a parameter"
        <| fun () ->
            let plan = plan (remainders (base'.WithParallelism(1, 1, 1, 1)))
            let stage = plan.Stages[0]
            let slot name = stage.Slots |> Seq.tryFind (fun s -> s.Name = name)
            let trained = plan.Parameters |> Seq.filter _.Update.IsAdamW |> List.ofSeq
            Expect.isTrue (trained |> List.exists _.DType.IsFloat32) "gates are of fp32"

            for p in trained do
                Expect.isNone (slot $"master:%s{p.Name}") "no master"

                match slot $"remainder:%s{p.Name}" with
                | None -> Expect.equal p.DType DType.Float32 p.Name
                | Some remainder ->
                    Expect.equal p.DType DType.BFloat16 p.Name
                    Expect.equal remainder.DType DType.Int16 p.Name
                    Expect.equal (List.ofSeq remainder.Extents) (List.ofSeq p.Extents) p.Name

            let row = plan.Memory[0]
            let numbers = trained |> List.sumBy (fun p -> p.Extents |> Seq.fold (fun n e -> n * int64 e) 1L)
            let biases = plan.Parameters |> Seq.filter _.Update.IsRouterBias |> Seq.sumBy (fun p -> int64 p.Extents[0])
            Expect.equal (row.Parameters + row.Gradients + row.Optimizer) (10L * numbers + 4L * biases) "bytes"

        testCase "remainders of shards: the weight's block is cut out of the parameter, once, right before its update"
        <| fun () ->
            let plan = plan (remainders (base'.WithParallelism(2, 1, 2, 2)))
            let slots = plan.Stages[0].Slots
            let work = epilogue plan 0 |> Seq.filter _.IsLaunch |> Array.ofSeq
            let mutable cut = 0

            work
            |> Array.iteri (fun i step ->
                match step with
                | Step.Launch(KernelId.AdamW, _, inputs, outputs, _) when inputs.Count = 5 ->
                    let parameter = slots[outputs[0]].Name.Substring "remainder:".Length

                    if slots[outputs[3]].Kind.IsTemporary then
                        cut <- cut + 1

                        match work[i - 1] with
                        | Step.Launch(KernelId.LocalSlice, _, from, into, _) ->
                            Expect.equal slots[from[0]].Name parameter "of the parameter"
                            Expect.equal into[0] inputs[4] "for the update"
                        | other -> failtestf "%A comes before the update of %s" other parameter
                    else
                        Expect.equal inputs[4] outputs[3] "a whole parameter is updated in place"
                | Step.Launch _
                | Step.Start _
                | Step.Wait _
                | Step.Free _ -> ())

            Expect.isGreaterThan cut 10 "shards"

        testCase "remainders say nothing of an fp32 model: the plan is that of fp32 masters"
        <| fun () ->
            let recipe = base'.WithParallelism(2, 1, 2, 2)
            let f32 = DType.Float32
            let plan' = plan (recipe.WithStateTypes(MainParams.Remainder, f32, f32, f32))
            let text (p: PlanSet) = PlanText.print { p with Recipe = [||] }
            Expect.equal (text plan') (text (plan recipe)) "the same but for its recipe line"

        testCase "a bf16 master is refused"
        <| fun () ->
            let b16 = DType.BFloat16

            match Pipeline.run (base'.WithStateTypes(MainParams.BFloat16, b16, b16, b16)) (Subjects.declare 2 1 8) with
            | Ok _ -> failtest "compiled"
            | Error wrong -> Expect.exists wrong (fun d -> d.Code = Codes.NotCompiledYet) "code"
    ]

let tests =
    testSequenced
    <| testList "Optimizer" [
        for name, recipe in layouts do
            equalBits name recipe

        for name, recipe in layouts do
            equalBits $"%s{name}, remainders" (remainders recipe)

        for name, recipe in layouts do
            states name recipe

        counts
        stateTypes
    ]

/// A forward that takes turns with the backward of another microbatch: each runs the steps it had, and a rank stands still for less.
module DeepSeekGraph.Compiler.Tests.WeaveTests

open System.Collections.Generic
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Lowering
open DeepSeekGraph.Models

let private clock launch collective : Overlap.Clock = {
    Launch = fun _ _ _ _ -> launch
    Collective = fun _ _ _ _ -> collective
    Reaction = fun _ -> 0L
}

/// How long a rank stands still before waits in a step, and how long it computes, in ns.
let private still (clock: Overlap.Clock) (stage: StagePlan) : struct (int64 * int64) =
    let timeline = Overlap.Timeline clock
    let programs = dict [ for p in stage.Programs -> struct (p.Phase, p.Chunk), p ]
    let frames = Dictionary<int, Dictionary<int, int64>>()
    let mutable still = 0L

    for a in stage.Timetable do
        if not a.Phase.IsOnce then
            if not (frames.ContainsKey a.Microbatch) then
                frames[a.Microbatch] <- Dictionary()

            let ends = frames[a.Microbatch]

            for step in programs[struct (a.Phase, a.Chunk)].Steps do
                match step with
                | Step.Wait token -> still <- still + timeline.Stands(ends, token)
                | Step.Launch _
                | Step.Start _
                | Step.Free _ -> ()

                timeline.Run(ends, step)

    struct (still, timeline.Now - still)

let private launch slot = Step.Launch(KernelId.Add, [||], [| slot |], [| slot + 1 |], "")
let private start token slot = Step.Start(token, Collective.AllReduceSum, 0, [| slot |], [| slot + 1 |], "")

/// Launch, collective, launch on what it fills; so many times.
let private layers first count = [
    for i in 0 .. count - 1 do
        let slot = first + 10 * i
        launch slot
        start (first + i) (slot + 1)
        Step.Wait(first + i)
        launch (slot + 2)
]

let private action phase microbatch = {
    Phase = phase
    Chunk = 0
    Microbatch = microbatch
}

let private table = [
    [ action Phase.Prologue 0 ]
    [ action (Phase.F 0) 0 ]
    [ action (Phase.F 0) 1; action (Phase.I 0) 0; action (Phase.W 0) 0 ]
    [ action (Phase.I 0) 1 ]
    [ action (Phase.W 0) 1 ]
    [ action Phase.Epilogue 0 ]
]

let private alone = table |> List.concat |> List.map List.singleton

let private names (table: Action list) = table |> List.map _.Name |> String.concat " "

let private pieces (forward: Step list) (backward: Step list) (phase: Phase) (_: int) =
    match phase with
    | Phase.F _ -> [ forward ]
    | Phase.W _ -> [ backward ]
    | Phase.Prologue
    | Phase.I _
    | Phase.S
    | Phase.R _
    | Phase.Epilogue -> [ [] ]

let private small =
    testList "by hand" [
        testCase "a strand is left at each wait and taken up again when the other waits"
        <| fun () ->
            let pieces = pieces (layers 0 2) (layers 1000 2)
            let struct (parts, woven) = Weave.run (clock 40_000L 40_000L) pieces table

            Expect.equal
                (names woven)
                "prologue F0 F0.1 F0.2 F1 I0 W0 F1.1 W0.1 F1.2 W0.2 I1 W1 W1.1 W1.2 epilogue"
                "turns"

            Expect.equal (parts (Phase.F 0) 0 |> List.map List.length) [ 2; 4; 2 ] "cut before the waits"

        testCase "where nothing would stand still, nothing is cut"
        <| fun () ->
            let pieces = pieces [ launch 0; launch 2 ] [ launch 1000; launch 1002 ]
            let struct (parts, woven) = Weave.run (clock 50_000L 40_000L) pieces table
            Expect.equal (names woven) (names (List.concat table)) "turns"
            Expect.equal (parts (Phase.W 0) 0) (pieces (Phase.W 0) 0) "one part"

        testCase "a strand that has run for long makes room for one that is behind"
        <| fun () ->
            let long = [ for i in 0..19 -> launch (2000 + 2 * i) ]
            let struct (_, woven) = Weave.run (clock 50_000L 80_000L) (pieces (layers 0 3) long) table
            Expect.equal (woven |> List.filter (fun a -> a.Phase.IsF && a.Microbatch = 1) |> List.length) 4 "forward"
            Expect.isGreaterThan (woven |> List.filter (fun a -> a.Phase.IsW) |> List.length) 4 "backward, in parts"
            Expect.isTrue ((List.item (woven.Length - 2) woven).Phase.IsW) "the longer one ends last"

        testCase "without turns a timetable has each piece in its place"
        <| fun () ->
            let pieces (phase: Phase) (_: int) = if phase.IsW then [ layers 0 1; layers 50 1 ] else [ [] ]
            let struct (parts, spread) = Weave.run (clock 1L 1L) pieces alone
            Expect.equal (names spread) "prologue F0 F1 I0 W0 W0.1 I1 W1 W1.1 epilogue" "parts"
            Expect.equal (parts (Phase.W 0) 0) (pieces (Phase.W 0) 0) "pieces"
    ]

let private base' = Recipe.Default.WithBatch(8, 1, 8).WithOverlapGradReduce false

let private layouts = [
    "tp 2, ep 4, dp 2", base'.WithParallelism(2, 1, 4, 2)
    "ep 2", base'.WithParallelism(1, 1, 2, 2)
    "flex, recomputed", base'.WithParallelism(2, 1, 4, 2).WithDispatcher(Dispatcher.Flex).WithRecompute "core_attn"
    "chunks", base'.WithParallelism(1, 2, 2, 2).WithVirtualPipeline(2).WithLayout "Et|t||mL"
    "in the order of the graph", base'.WithParallelism(1, 1, 2, 2).WithOverlap false
]

/// Steps of each program, parts joined, but for what is freed, which follows from their order.
let private programs (plan: PlanSet) = [
    for stage in plan.Stages do
        for (word, chunk), programs in stage.Programs |> Seq.groupBy (fun p -> p.Phase.Word, p.Chunk) do
            (stage.Stage, word, chunk),
            [
                for program in programs do
                    yield! program.Steps |> Seq.filter (fun s -> not s.IsFree)
            ]
]

let private sameSteps name (recipe: Recipe) =
    testCase $"%s{name}: every microbatch runs the same steps in the same order"
    <| fun () ->
        let paired, plain = Subjects.compile 2 (recipe.WithOverlapMoeExpertParallelComm true), Subjects.compile 2 recipe

        Expect.equal (programs paired) (programs plain) "steps"

        let turns =
            paired.Stages
            |> Seq.collect (fun stage -> Seq.pairwise stage.Timetable)
            |> Seq.filter (fun (a, b) -> a.Microbatch <> b.Microbatch && b.Phase.Part > 0)
            |> Seq.length

        Expect.isGreaterThan turns 0 "turns"

/// What a forward waits for and what the backward beside it waits for may come from the same neighbour: the proof against deadlocks says
/// whether they come in time.
let private pipelines =
    testCase "chunks on 2 to 4 pipeline ranks, from few microbatches to many: all plans pass"
    <| fun () ->
        let mutable turns = 0

        for p, v, g in [ 2, 2, 2; 2, 2, 3; 2, 3, 2; 3, 2, 3; 3, 2, 4; 4, 2, 4 ] do
            for m in [ p; g + p; 2 * g; 3 * g + p ] do
                let layers = p * v - 1
                let layout = "Et" + String.replicate (p * v - 2) "|t" + "|mL"

                let recipe =
                    base'
                        .WithParallelism(1, p, 1, 1)
                        .WithVirtualPipeline(v, g)
                        .WithLayout(layout)
                        .WithBatch(m, 1, 8)
                        .WithOverlapMoeExpertParallelComm
                        true

                // refused if it were stuck
                let plan = Subjects.compile layers recipe

                let groups =
                    Timetable.groups Schedule.Interleaved {
                        Ranks = p
                        Chunks = v
                        Microbatches = m
                        Group = g
                        Pairs = true
                    }

                turns <- turns + (groups |> List.sumBy (List.filter (fun g -> g.Length > 1) >> List.length))
                Expect.equal plan.Stages.Count p "stages"

        Expect.isGreaterThan turns 100 "pairs"

/// DeepSeek-V3's proxy with experts over two ranks, as measured on two GPUs.
let private proxy dispatcher paired =
    DeepSeekV3(Presets.Proxy)
        .Compile(
            Recipes.Proxy.Recipe
                .WithParallelism(1, 1, 2, 2)
                .WithDispatcher(dispatcher)
                .WithBatch(8, 1, 4096)
                .WithOverlapMoeExpertParallelComm
                paired
        )

let private hides (dispatcher: Dispatcher) =
    testCase
        $"%s{dispatcher.Name}: by the compiler's clock the proxy stands still in the first of four forwards and the last backward only"
    <| fun () ->
        let config = Presets.Proxy

        let router = {
            Path = ""
            Experts = config.NRoutedExperts
            TopK = config.NumExpertsPerTok
            Groups = config.NGroup
            KeepGroups = config.TopkGroup
        }

        let measure (plan: PlanSet) =
            let stage = plan.Stages[0]
            still (Overlap.clock plan.Mesh 8 (Some router) (fun group -> plan.Groups[group]) stage.Slots) stage

        let struct (alone, ran) = measure (proxy dispatcher false)
        let struct (paired, ran') = measure (proxy dispatcher true)

        printfn
            $"%s{dispatcher.Name}: stands still for %i{alone / 1000L} and %i{paired / 1000L} us of %i{ran / 1000L} us"

        Expect.equal ran ran' "the same launches"
        Expect.isGreaterThan alone 5_000_000L "there is something to hide"
        Expect.isLessThanOrEqual paired (alone / 4L) "stands still"

let tests =
    testList "Weave" [
        small

        for name, recipe in layouts do
            sameSteps name recipe

        pipelines
        hides Dispatcher.AllToAll
        hides Dispatcher.Flex
    ]

/// Steps in an order that hides collectives: none is lost, starts keep their order, and what does not need a collective runs beside it.
module DeepSeekGraph.Compiler.Tests.OverlapTests

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

let private launch inputs output path = Step.Launch(KernelId.Add, [||], Array.ofList inputs, [| output |], path)

let private start token input output = Step.Start(token, Collective.AllReduceSum, 0, [| input |], [| output |], "")

/// A layer's end: a weight gradient that nobody waits for (9), what is sent (1), and what reads the answer (3).
let private layer = [
    launch [ 0 ] 9 "beside"
    launch [ 0 ] 1 "sent"
    start 0 1 2
    Step.Wait 0
    launch [ 2 ] 3 "behind"
]

let private small =
    testList "by hand" [
        testCase "what a collective needs comes first, then the collective, then what it hides behind"
        <| fun () ->
            let expected = [ layer[1]; layer[2]; layer[0]; layer[3]; layer[4] ]
            Expect.equal (Overlap.run (clock 10L 10L) layer) expected "order"

        testCase "a sum into a slot keeps its order, and a slot that is read is not written before"
        <| fun () ->
            let add from = Step.Launch(KernelId.Accumulate, [||], [| from |], [| 20 |], "")

            let steps = [
                add 5
                add 6
                launch [ 20 ] 1 "sent"
                start 0 1 2
                launch [ 7 ] 20 "write"
                Step.Wait 0
            ]

            let ordered = Overlap.run (clock 10L 10L) steps
            let at step = List.findIndex ((=) step) ordered
            Expect.isLessThan (at steps[0]) (at steps[1]) "sums"
            Expect.isLessThan (at steps[2]) (at steps[4]) "read before it is written"

        testCase "what a collective fills is read behind its wait, however long that takes"
        <| fun () ->
            let ordered = Overlap.run (clock 10L 1_000_000L) layer
            let at step = List.findIndex ((=) step) ordered
            Expect.isLessThan (at layer[3]) (at layer[4]) "wait before read"

        testCase "a program without collectives stays as it is"
        <| fun () ->
            let steps = [ launch [ 0 ] 9 ""; launch [ 0 ] 1 ""; launch [ 1; 9 ] 3 "" ]
            Expect.equal (Overlap.run (clock 10L 10L) steps) steps "order"
    ]

let private base' = Recipe.Default.WithBatch(8, 1, 8).WithOverlapGradReduce false

let private layouts = [
    "tp 2, pp 2, ep 2, dp 2", base'.WithParallelism(2, 2, 2, 2).WithLayout "Et|tmL"
    "ep 4", base'.WithParallelism(1, 1, 4, 4)
    "flex, recomputed", base'.WithParallelism(2, 1, 4, 2).WithDispatcher(Dispatcher.Flex).WithRecompute "core_attn"
    "interleaved", base'.WithParallelism(1, 2, 2, 2).WithVirtualPipeline(2).WithLayout "Et|t||mL"
]

/// Steps of each program, but for what is freed, which follows from their order.
let private programs (plan: PlanSet) = [
    for stage in plan.Stages do
        for program in stage.Programs do
            program.Phase, program.Chunk, program.Steps |> Seq.filter (fun s -> not s.IsFree) |> List.ofSeq
]

let private sameSteps name (recipe: Recipe) =
    testCase $"%s{name}: the same steps as in the order of the graph, starts and messages in the same order"
    <| fun () ->
        let ordered, plain =
            programs (Subjects.compile 2 recipe), programs (Subjects.compile 2 (recipe.WithOverlap false))

        let mutable moved = 0

        for (phase, chunk, a), (_, _, b) in List.zip ordered plain do
            let text (steps: Step list) = steps |> List.map (sprintf "%A") |> List.sort
            Expect.equal (text a) (text b) $"%s{phase.OfChunk chunk}"
            let starts = List.filter (fun (s: Step) -> s.IsStart)
            Expect.equal (starts a) (starts b) $"starts of %s{phase.OfChunk chunk}"

            if a <> b then
                moved <- moved + 1

        Expect.isGreaterThan moved 0 "some programs change"

/// Launches between the start and the wait of collectives of a kind, in a phase.
let private beside
    (plan: PlanSet)
    (isPhase: Phase -> bool)
    (isKind: Collective -> bool)
    (isMeant: KernelId -> string -> bool)
    =
    let mutable flying, found = Set.empty<int>, 0

    for program in plan.Stages[0].Programs do
        if isPhase program.Phase then
            for step in program.Steps do
                match step with
                | Step.Start(token, kind, _, _, _, _) when isKind kind -> flying <- flying.Add token
                | Step.Wait token -> flying <- flying.Remove token
                | Step.Launch(kernel, _, _, _, path) when not flying.IsEmpty && isMeant kernel path ->
                    found <- found + 1
                | Step.Launch _
                | Step.Start _
                | Step.Free _ -> ()

    found

let private hidden =
    testCase "experts' weight gradients run while the gradient of their rows goes back"
    <| fun () ->
        let compile (overlap: bool) =
            DeepSeekV3(Presets.Proxy)
                .Compile(Recipes.Proxy.Recipe.WithParallelism(1, 1, 2, 2).WithBatch(2, 1, 4096).WithOverlap overlap)

        let count overlap =
            beside (compile overlap) _.IsW _.IsRowsToTokens (fun kernel _ -> kernel = KernelId.GroupedWeightGrad)

        // the graph happens to have those of gate and up there; of down, those that are needed to fill the time
        Expect.equal (count false) 3 "in the order of the graph"
        Expect.isGreaterThan (count true) 3 "ordered"

/// The host reads the counts and begins the exchange, which takes it about half a millisecond.
let private counted (dispatcher: Dispatcher) =
    testCase $"%s{dispatcher.Name}: the shared expert computes while counts of rows come to the host"
    <| fun () ->
        let plan =
            DeepSeekV3(Presets.Proxy)
                .Compile(
                    Recipes.Proxy.Recipe.WithParallelism(1, 1, 2, 2).WithDispatcher(dispatcher).WithBatch(2, 1, 4096)
                )

        let products =
            beside plan _.IsF _.IsRouteToExperts (fun kernel path ->
                kernel = KernelId.Contract && path.Contains ".shared_experts")

        // of three layers; what is not needed to fill the time runs beside the exchange
        Expect.isGreaterThanOrEqual products 3 "products of shared experts"

let tests =
    testList "Overlap" [
        small

        for name, recipe in layouts do
            sameSteps name recipe

        hidden
        counted Dispatcher.AllToAll
        counted Dispatcher.Flex
    ]

/// Bytes of routed rows between nodes: as explained, as counted here from a routing token by token, and as a run sends them.
module DeepSeekGraph.Models.Tests.TrafficTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime.Collectives
open DeepSeekGraph.Runtime.Execution
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Models.Tests.ParallelTests

let private experts, groups, keep, topK, hidden = 16, 4, 2, 4, 8
let private tensor, data, perNode, seqLength = 2, 4, 2, 8

let private configOf hidden =
    DeepSeekV3Config(
        VocabSize = 16,
        HiddenSize = hidden,
        NumHiddenLayers = 2,
        FirstKDenseReplace = 1,
        NumNextnPredictLayers = 1,
        NumAttentionHeads = 4,
        QLoraRank = 4,
        KvLoraRank = 4,
        QkNopeHeadDim = 4,
        QkRopeHeadDim = 2,
        VHeadDim = 4,
        RopeScaling = null,
        IntermediateSize = 8,
        MoeIntermediateSize = 4,
        NRoutedExperts = experts,
        NumExpertsPerTok = topK,
        NGroup = groups,
        TopkGroup = keep
    )

let private config = configOf hidden

/// Eight ranks in four nodes of two; a group of experts lies on one node.
let private compile (dispatcher: Dispatcher) microbatches =
    let recipe =
        Recipe.Default
            .WithParallelism(tensor, 1, tensor * data, data)
            .WithBatch(microbatches * data, 1, seqLength)
            .WithRanksPerNode(perNode)
            .WithDispatcher
            dispatcher

    DeepSeekV3(config).Compile recipe

/// Places of the n largest scores.
let private largest n (scores: (int * float) seq) = scores |> Seq.sortByDescending snd |> Seq.truncate n |> Seq.map fst

/// DeepSeek-V3's choice (arXiv 2412.19437, section 2.1.2): the groups whose two best scores sum to most, then the best of theirs.
let private deepSeek (experts, groups, keep, topK) (random: Random) : int list =
    let size = experts / groups
    let scores = Array.init experts (fun _ -> random.NextDouble())

    let kept =
        Array.chunkBySize size scores
        |> Seq.indexed
        |> Seq.map (fun (g, own) -> g, own |> Array.sortDescending |> Seq.truncate 2 |> Seq.sum)
        |> largest keep
        |> Set

    Seq.indexed scores
    |> Seq.filter (fun (e, _) -> kept.Contains(e / size))
    |> largest topK
    |> Seq.sort
    |> List.ofSeq

/// Any groups, and any experts of theirs.
let private uniform (experts, groups, keep, topK) (random: Random) : int list =
    let size = experts / groups
    let any n = Seq.init n (fun i -> i, random.NextDouble())
    let kept = any groups |> largest keep |> Set

    any experts
    |> Seq.filter (fun (e, _) -> kept.Contains(e / size))
    |> largest topK
    |> Seq.sort
    |> List.ofSeq

let private routers (plan: PlanSet) =
    plan.Stages
    |> Seq.collect _.Programs
    |> Seq.collect _.Steps
    |> Seq.choose (fun step ->
        match step with
        | Step.Launch(KernelId.Router, _, _, _, path) -> Some path
        | Step.Launch _
        | Step.Start _
        | Step.Wait _
        | Step.Free _ -> None)
    |> Seq.distinct
    |> List.ofSeq

/// A drawn routing of step 1: of a router, a sequence of the global batch and a position.
let private drawn (plan: PlanSet) =
    let random = Random 11

    [
        for path in routers plan do
            for row in 0 .. plan.Microbatches * plan.MicroBatch - 1 do
                for position in 0 .. seqLength - 1 ->
                    (path, row, position), deepSeek (experts, groups, keep, topK) random
    ]

let private traceOf (routing: ((string * int * int) * int list) list) =
    let trace = RoutingTrace(Replay = true)

    for (path, row), tokens in routing |> List.groupBy (fun ((path, row, _), _) -> path, row) do
        let mask = Array.zeroCreate<byte>(seqLength * experts)

        for (_, _, position), chosen in tokens do
            for e in chosen do
                mask[position * experts + e] <- 1uy

        trace.Set(1L, path, row, experts, ReadOnlySpan mask)

    trace

/// What rows cost between nodes, counted token by token: (a sequence lies on dp, a half of it on tp; ranks hold two experts each).
/// First: once for each expert; second: once for each node.
let private away routing =
    let counts =
        routing
        |> List.map (fun ((_, row, position), chosen) ->
            let source = position / (seqLength / tensor) + tensor * (row % data)
            let nodes = chosen |> List.map (fun e -> e / (experts / (tensor * data)) / perNode)
            let others = nodes |> List.filter (fun n -> n <> source / perNode)
            int64 others.Length, int64 (List.distinct others).Length)

    List.sumBy fst counts, List.sumBy snd counts

let private isExchange (c: CollectiveLine) =
    List.contains c.Kind [ "rows_to_experts"; "rows_to_tokens"; "dispatch"; "combine" ]

let private explained routing plan =
    PlanExplanation(plan, perNode, routing).Collectives |> Seq.filter isExchange |> List.ofSeq

/// One step of the plan in which tokens choose as the trace says; as on GPUs: by NCCL's calls.
let private runAs asOnGpus (plan: PlanSet) (trace: RoutingTrace) =
    let traffic = Traffic perNode
    use world = new LoopbackWorld(Traffic = traffic, AsOnGpus = asOnGpus)
    // with those that the last positions predict
    let columns = plan.Inputs |> Seq.find (fun i -> i.Name = "tokens") |> fun i -> i.Extents[1]

    let options =
        TrainerOptions(
            Batches = RandomTokens(plan.Microbatches * plan.MicroBatch, columns, config.VocabSize),
            Executor = Executor.Interpreter,
            Trace = trace,
            World = world
        )

    task {
        let! trainer = Trainer.StartAsync(plan, options)
        let steps = trainer.RunAsync(1L).GetAsyncEnumerator()
        let! _ = steps.MoveNextAsync()
        do! trainer.DisposeAsync()
        return traffic
    }
    |> _.GetAwaiter().GetResult()

let private run plan trace = runAs false plan trace

/// Bytes of a row's values, of its probability and of its place; forward and backward send rows twice each, probabilities once.
let private rowBytes, private probBytes, private placeBytes = int64 hidden * 4L, 4L, 4L

let private counted =
    testCase "from a routing: alltoall and flex, forward and backward, as counted here and as a run sends"
    <| fun () ->
        let between =
            [ Dispatcher.AllToAll; Dispatcher.Flex ]
            |> List.map (fun dispatcher ->
                let plan = compile dispatcher 2
                let routing = drawn plan
                let trace = traceOf routing
                let lines = explained (TracedRouting(trace, plan, 1L)) plan
                let rows, nodes = away routing
                let travels = if dispatcher.IsFlex then nodes else rows
                let values = travels * rowBytes
                let places = if dispatcher.IsFlex then rows * placeBytes else 0L

                // one stage: what goes back goes in W
                for program, kind, expected in
                    [
                        "F",
                        (if dispatcher.IsFlex then "dispatch" else "rows_to_experts"),
                        values + rows * probBytes + places
                        "F", (if dispatcher.IsFlex then "combine" else "rows_to_tokens"), values
                        "W", (if dispatcher.IsFlex then "dispatch" else "rows_to_experts"), values
                        "W", (if dispatcher.IsFlex then "combine" else "rows_to_tokens"), values + rows * probBytes
                    ] do
                    let same = lines |> List.filter (fun c -> c.Program = program && c.Kind = kind)

                    Expect.equal
                        same.Length
                        (routers plan).Length
                        $"%O{dispatcher}: one %s{kind} a layer in %s{program}"

                    Expect.equal
                        (same |> List.sumBy _.StepInterNode)
                        expected
                        $"%O{dispatcher}: %s{kind} in %s{program}"

                let all = lines |> List.sumBy _.StepSent
                let between = lines |> List.sumBy _.StepInterNode
                Expect.equal lines.Length (4 * (routers plan).Length) $"%O{dispatcher}: nothing else is exchanged"
                let traffic = run plan trace
                Expect.equal traffic.Between between $"%O{dispatcher}: between nodes, as a run sends"
                Expect.equal traffic.Inside (all - between) $"%O{dispatcher}: inside nodes, as a run sends"
                Expect.equal (trace.Tokens, trace.Differing > 0L) (int64 routing.Length, true) "the run was told to"
                between)

        Expect.isLessThan between[1] between[0] "flex sends less between nodes"
        printfn $"between nodes of a step: alltoall %i{between[0]}, flex %i{between[1]} bytes"

let private flexOn expert =
    Recipe.Default.WithParallelism(2, 1, expert, 4).WithBatch(8, 1, seqLength).WithRanksPerNode(perNode).WithDispatcher
        Dispatcher.Flex

/// Layouts that place tokens and experts otherwise.
let private layouts =
    let job dispatcher (tensor: int) pipeline expert data =
        Recipe.Default
            .WithParallelism(tensor, pipeline, expert, data)
            .WithBatch(2 * data, 1, seqLength)
            .WithRanksPerNode(perNode)
            .WithDispatcher
            dispatcher

    let flex, plain = job Dispatcher.Flex, job Dispatcher.AllToAll

    [
        "tokens whole over tp", (plain 2 1 8 4).WithSequenceParallel false
        "context parallel", (flex 1 1 4 2).WithContextParallel 2
        "expert tensor parallel", (plain 2 1 4 4).WithExpertTensorParallel 2
        "experts over a part of the data", flex 1 1 4 8
        "two stages, recomputed", (flex 1 2 4 4).WithLayout("Et|tmL").WithRecompute "full"
    ]

let private recorded =
    testCase "from a run that recorded its routing, of other layouts"
    <| fun () ->
        for name, recipe in layouts do
            let plan = DeepSeekV3(config).Compile recipe
            let trace = RoutingTrace()
            let traffic = run plan trace
            let lines = explained (TracedRouting(trace, plan, 1L)) plan
            Expect.isGreaterThan traffic.Between 0L name
            Expect.equal (lines |> List.sumBy _.StepInterNode) traffic.Between $"%s{name}: between nodes"

            Expect.equal
                (lines |> List.sumBy (fun c -> c.StepSent - c.StepInterNode))
                traffic.Inside
                $"%s{name}: inside nodes"

/// Over NCCL a token goes straight to each rank that has experts for it: to a plan whose nodes have one rank each, that is the same.
let private straight =
    testCase "what NCCL is asked to send is what is predicted: flex once to each rank, also of other nodes"
    <| fun () ->
        let jobs = [
            yield! layouts
            "alltoall", Recipe.Default.WithParallelism(2, 1, 8, 4).WithBatch(8, 1, seqLength)
            "flex", flexOn 8
            "flex, recomputed", (flexOn 8).WithRecompute "full"
        ]

        for name, recipe in jobs do
            let mesh = Compilation.Mesh recipe

            // messages between stages, and rows gathered over etp, are sends too
            if mesh.Pipeline = 1 && mesh.ExpertTensor = 1 then
                let plan = DeepSeekV3(config).Compile recipe
                let trace = RoutingTrace()
                let traffic = runAs true plan trace
                let direct = DeepSeekV3(config).Compile(recipe.WithRanksPerNode 1)
                let lines = explained (TracedRouting(trace, plan, 1L)) direct

                Expect.isFalse
                    (PlanExplanation(plan, perNode).Collectives |> Seq.exists (fun c -> c.Kind = "all_to_all"))
                    $"%s{name}: nothing else goes from rank to rank"

                let between = lines |> List.sumBy _.StepInterNode
                Expect.isGreaterThan between 0L name
                Expect.equal traffic.Between between $"%s{name}: between nodes"
                Expect.equal traffic.Inside ((lines |> List.sumBy _.StepSent) - between) $"%s{name}: inside nodes"

/// What a plan's collectives cost by link, in a step.
let private cost gpusPerNode (plan: PlanSet) =
    PlanExplanation(plan, gpusPerNode).Collectives
    |> Seq.sumBy (fun c -> Partition.Links.time c.StepSent c.StepInterNode)

let private cheapest =
    testCase "auto is the cheapest dispatcher of all, by what the three plans send"
    <| fun () ->
        let job (tensor, context, expert, expertTensor, data) =
            Recipe.Default
                .WithParallelism(tensor, 1, expert, data)
                .WithContextParallel(context)
                .WithExpertTensorParallel(expertTensor)
                .WithBatch(data, 1, seqLength)

        let degrees = [
            1, 1, 1, 1, 2
            1, 1, 2, 1, 2
            1, 1, 4, 1, 4
            1, 1, 8, 1, 8
            2, 1, 8, 1, 4
            2, 1, 4, 2, 4
            2, 1, 2, 2, 2
            1, 2, 4, 1, 2
            1, 1, 4, 1, 8
        ]

        let won = Collections.Generic.HashSet<Dispatcher>()

        for sizes in degrees do
            for perNode in [ 2; 8 ] do
                for model, sequenceParallel in [ config, true; configOf 64, false ] do
                    let recipe = (job sizes).WithRanksPerNode(perNode).WithSequenceParallel sequenceParallel

                    let priced dispatcher = cost perNode (DeepSeekV3(model).Compile(recipe.WithDispatcher dispatcher))

                    let each = [
                        for d in [ Dispatcher.AllToAll; Dispatcher.AllGather; Dispatcher.Flex ] -> d, priced d
                    ]

                    let best, least = List.minBy snd each
                    won.Add best |> ignore
                    Expect.equal (priced Dispatcher.Auto) least $"%A{sizes}, nodes of %i{perNode}: %A{each}"

        Expect.equal won.Count 3 "each is the cheapest somewhere"

/// Ranges of experts of a rank or node, in groups or across them.
let private parts = [
    (256, 8, 4, 8), [ 0..31 ]
    (256, 8, 4, 8), [ 0..3 ]
    (256, 8, 4, 8), [ 0..127 ]
    (16, 4, 2, 4), [ 4..7 ]
    (24, 4, 3, 5), [ 4..14 ]
    (16, 1, 1, 3), [ 0..5 ]
]

let private share (experts, groups, keep, topK) (owned: int list) =
    let choice = {
        Path = ""
        Experts = experts
        TopK = topK
        Groups = groups
        KeepGroups = keep
    }

    owned
    |> List.countBy (fun e -> e / (experts / groups))
    |> List.map snd
    |> fun held -> Routing.reached choice (Array.append (Array.ofList held) (Array.zeroCreate (groups - held.Length)))

let private measured choose owned n =
    let random = Random 3
    let set = Set.ofList owned
    let hits = Seq.init n (fun _ -> choose random |> List.exists set.Contains) |> Seq.filter id |> Seq.length
    float hits / float n

let private closed =
    testCase "the share of tokens that reach some experts, against draws"
    <| fun () ->
        for router, owned in parts do
            let n = 2000
            let expected, found = share router owned, measured (uniform router) owned n
            // five standard deviations of the mean of n draws, and one draw
            let band = 5.0 * sqrt (expected * (1.0 - expected) / float n) + 1.0 / float n

            Expect.isLessThan
                (abs (found - expected))
                band
                $"%A{router}, %i{owned.Length} experts: %f{expected}, drawn %f{found}"

        let router, owned = parts[0]
        let real = measured (deepSeek router) owned 2000

        printfn
            $"a node of 32 experts: reached by %.4f{share router owned} of tokens when any choice is as likely, by %.4f{real} when groups are kept for their two best of random scores"

/// Draws anew for every token, the same for the same one.
let private drawing choose = {
    new IRouting with
        member _.Chosen(path, microbatch, sequence, position) =
            let seed = (path.Length * 31 + microbatch) * 1009 + sequence * 101 + position
            choose (Random seed) |> Array.ofList :> Collections.Generic.IReadOnlyList<int>
}

let private assumed =
    testCase "what explain says without a routing is the mean over draws, and it names the limit of groups"
    <| fun () ->
        let microbatches = 64
        let plan = compile Dispatcher.Flex microbatches
        let told = PlanExplanation(plan, perNode)
        Expect.equal told.Assumption "any choice is as likely: 4 of 16 experts in 2 of 4 groups" "assumption"
        let limited = uniform (experts, groups, keep, topK)
        let tokens = float (microbatches * data * seqLength)
        let values = tokens * float rowBytes

        /// Other nodes that a token of the line reaches, on average.
        let nodes lines =
            lines
            |> List.filter (fun (c: CollectiveLine) -> c.Program = "F" && c.Kind = "combine")
            |> List.map (fun c -> float c.StepInterNode / values)

        let expected = nodes (explained null plan)
        let drawn = nodes (explained (drawing limited) plan)
        // a token reaches one or two nodes, at most two of them others: a standard deviation of at most 1
        let band = 5.0 / sqrt tokens
        List.iter2 (fun a b -> Expect.isLessThan (abs (a - b)) band $"%f{a} nodes, drawn %f{b}") expected drawn
        let free = share (experts, 1, 1, topK) [ 0..3 ] * 3.0
        Expect.isGreaterThan (free - expected.Head) (4.0 * band) "without the limit, tokens would reach more"

        Expect.equal
            (PlanExplanation(plan, perNode, drawing limited).Assumption)
            "counted from the routing given"
            "with a routing"

let tests = testSequenced <| testList "traffic" [ counted; recorded; straight; cheapest; closed; assumed ]

/// What the backward pass computes again changes no bit, sends nothing that is not listed, and keeps less.
module DeepSeekGraph.Models.Tests.RecomputeTests

open System
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Testing
open DeepSeekGraph.Models.Tests.Jobs

let private compiled (config: DeepSeekV3Config) (recipe: Recipe) : Compiled =
    let mesh = Compilation.Mesh recipe
    let graph = DeepSeekV3(config).Declare(recipe.MicroBatch * mesh.Data, recipe.SeqLength)

    match Pipeline.run recipe graph with
    | Ok c -> c
    | Error wrong -> failtestf "%A" wrong

type private Tokens(rows: int, columns: int, vocab: int) =
    interface IBatchSource with
        member _.Get step =
            let random = Random(int step + 5)
            TrainingBatch(rows, columns, Array.init (rows * columns) (fun _ -> int64 (random.Next vocab)))

/// Bits of all numbers of a tensor.
let private bits (tensor: torch.Tensor) =
    use flat = tensor.to_type(torch.ScalarType.Float32).contiguous().reshape(-1L)
    flat.data<float32>().ToArray() |> Array.map BitConverter.SingleToUInt32Bits

/// Losses and norms of some steps, and every gradient and parameter behind them, as bits.
let private trainFor (steps: int64) (config: DeepSeekV3Config) (recipe: Recipe) =
    let plan = DeepSeekV3(config).Compile recipe
    let tokens = plan.Inputs |> Seq.find (fun i -> i.Name = "tokens")

    let options =
        TrainerOptions(
            // compiled plans give the same bits (ExecutorTests), and take longer to make than to run
            Executor = Executor.Interpreter,
            Batches = Tokens(plan.Microbatches * plan.MicroBatch, tokens.Extents[1], config.VocabSize),
            LearningRate = LearningRate(1e-2, 1e-3, 0L, 0L)
        )

    task {
        use! trainer = Trainer.StartAsync(plan, options)
        let run = trainer.RunAsync(steps).GetAsyncEnumerator()
        let results = Collections.Generic.List<_>()
        let! first = run.MoveNextAsync()
        let mutable more = first

        while more do
            let m = run.Current
            results.Add((m.Loss, m.MtpLoss.GetValueOrDefault(), m.GradNorm))
            let! next = run.MoveNextAsync()
            more <- next

        let all prefix (tensors: Collections.Generic.IReadOnlyDictionary<string, torch.Tensor>) = [
            for KeyValue(name, tensor) in tensors do
                use tensor = tensor
                prefix + name, bits tensor
        ]

        return List.ofSeq results, Map(all "grad:" (trainer.GatherGradients()) @ all "" (trainer.GatherParameters()))
    }
    |> _.GetAwaiter().GetResult()

let train config recipe = trainFor 2L config recipe
let private step config recipe = trainFor 1L config recipe

let private unchanged (job: Job) =
    let plain = { job with Recompute = [] }
    let losses, tensors = train plain.Config plain.Recipe
    let losses', tensors' = train job.Config job.Recipe
    Expect.equal losses' losses "losses and norms"
    Expect.equal (tensors' |> Map.toList |> List.map fst) (tensors |> Map.toList |> List.map fst) "names"

    for KeyValue(name, expected) in tensors do
        if tensors'[name] <> expected then
            failtestf "%s differs with %A recomputed: %A" name job.Recompute job

/// One job for each name and for mixes of names, over random layouts, by a fixed seed.
let private drawn =
    let jobs = FsCheck.FSharp.Gen.sampleWithSeed (FsCheck.Rnd(77UL, 1UL)) 10 24 (AnyStages.Job().Generator)

    let wanted = [
        for name in Recompute.names do
            [ name ]
        [ "core_attn"; "mla_up_proj" ]
        [ "layernorm"; "moe_act"; "mlp" ]
        [ "mla_up_proj"; "layernorm"; "shared_experts"; "moe_act" ]
        List.except [ "full" ] Recompute.names
    ]

    List.zip
        wanted
        (jobs
         |> Array.filter (fun j -> j.Mtp = 1 || j.Pipeline > 1)
         |> Array.truncate wanted.Length
         |> List.ofArray)
    |> List.map (fun (names, job) -> { job with Recompute = names })

/// Everything that moves values of a layer otherwise.
let private layouts =
    let two = { plain with Layers = 2 }

    [
        "fused dispatch",
        {
            two with
                Tensor = 2
                Data = 2
                Expert = 4
                Dispatcher = Dispatcher.Flex
        }
        "fused dispatch and expert tensor parallel",
        {
            two with
                Tensor = 2
                Data = 2
                Expert = 2
                ExpertTensor = 2
                Dispatcher = Dispatcher.Flex
        }
        "expert tensor parallel by all-gather",
        {
            two with
                Tensor = 2
                Data = 2
                Expert = 2
                ExpertTensor = 2
                Dispatcher = Dispatcher.AllGather
        }
        "context and tensor parallel",
        {
            two with
                Tensor = 2
                Context = 2
                Expert = 2
        }
        "no sequence parallel, nothing fused",
        {
            two with
                Tensor = 2
                Expert = 2
                SequenceParallel = false
                Fusions = FusionChoice.None
        }
        "two stages of two chunks",
        {
            plain with
                Pipeline = 2
                Virtual = 2
                Cuts = [ 2; 3; 4 ]
                Data = 2
                Expert = 2
        }
        "fp8 and blocks of rows",
        {
            two with
                Data = 2
                Expert = 2
                Fp8 = 2
                Padding = 4
        }
    ]

/// Each name, mixes of them, all at once.
let private policies = [
    for name in Recompute.names do
        [ name ]
    [ "core_attn"; "mla_up_proj" ]
    [ "layernorm"; "moe_act"; "mlp" ]
    [ "mla_up_proj"; "moe" ]
    List.except [ "full" ] Recompute.names
]

/// Nodes that compute again.
let private repeats (c: Compiled) =
    c.Local.Graph.Nodes |> Array.filter (fun n -> n.Origin.Pass.IsRecompute) |> Array.length

/// Every policy and a budget, against the same job with nothing recomputed.
let private everyPolicy (name: string, job: Job) =
    testCase $"%s{name}: no name, mix of names or budget changes a bit of losses, norms, gradients and parameters"
    <| fun () ->
        Expect.isTrue (legal job) "legal"
        let losses, tensors = step job.Config job.Recipe
        // fp8 rounds again what it kept wide
        let before = repeats (compiled job.Config job.Recipe)

        let check (what: string) (recipe: Recipe) =
            let c = compiled job.Config recipe
            Expect.isGreaterThan (repeats c) before $"%s{what} computes something again"
            let losses', tensors' = step job.Config recipe
            Expect.equal losses' losses $"%s{what}: losses and norms"
            Expect.equal (List.ofSeq tensors'.Keys) (List.ofSeq tensors.Keys) "names"

            for KeyValue(name, expected) in tensors do
                if tensors'[name] <> expected then
                    failtestf "%s: %s differs" what name

        for policy in policies do
            check (String.concat "," policy) (job.Recipe.WithRecompute(Array.ofList policy))

        let peak recipe = (compiled job.Config recipe).Plan.Memory |> Seq.map _.Headroom |> Seq.max
        let least, most = peak (job.Recipe.WithRecompute "full"), peak job.Recipe
        check "a budget" (job.Recipe.WithRecomputeBudget(least + (most - least) / 2L))

let private tiny = Recipe.Default.WithBatch(8, 1, 32)
let private eight = tiny.WithParallelism(2, 1, 2, 2)

/// Collectives of one unit's recomputation, as "kind axis-names last-axis", sorted.
let private again (names: string list) (part: ModelUnit) =
    let c = compiled Presets.Tiny (eight.WithRecompute(Array.ofList names))
    let graph = c.Local.Graph

    List.sort [
        for node in graph.Nodes do
            match node.Op with
            | Op.Collective(kind, axes, _) when node.Origin.Unit = part && node.Origin.Pass.IsRecompute ->
                let names = axes |> List.map (fun m -> c.Plan.Mesh.Axes[m].Name) |> String.concat "+"
                let what = Array.last graph.Types[node.Inputs[0]].Names
                $"%s{Ops.Collective.name kind} %s{names} %s{what}"
            | _other -> ()
    ]

let private collectives (names: string list) =
    let c = compiled Presets.Tiny (eight.WithRecompute(Array.ofList names))
    c.Local.Graph.Nodes |> Array.filter (fun n -> n.Op.IsCollective) |> Array.length

/// What a MoE layer's recomputation moves, and how many collectives a step has more than without: five layers, one dense.
/// Latents and shared expert's input are gathered for weight gradients anyway; rotated keys, rows and sums only for recomputation.
let private golden = [
    "core_attn", [], 0
    "mla_up_proj", [ "all_gather tp kv_lora"; "all_gather tp q_lora"; "all_gather tp rope" ], 5
    "layernorm", [], 0
    "moe_act", [], 0
    "shared_experts", [ "all_gather tp hidden" ], 0
    "mlp", [], 0
    "moe",
    [
        "all_gather tp hidden"
        "rows_to_experts tp experts"
        "rows_to_experts tp hidden"
    ],
    2 * 4
    "full",
    [
        "all_gather tp hidden"
        "all_gather tp kv_lora"
        "all_gather tp q_lora"
        "all_gather tp rope"
        "reduce_scatter tp hidden"
        "rows_to_experts tp experts"
        "rows_to_experts tp hidden"
    ],
    // rope key of 5 layers, rows and probabilities of 4, attention output of 5, the last layer's experts for the final norms
    23
]

/// Two stages: the first holds two microbatches.
let private staged = tiny.WithParallelism(1, 2, 1, 1).WithLayout "Ettt|tmL"

let private activations (recipe: Recipe) = (compiled Presets.Tiny recipe).Plan.Memory[0].Activations

/// Steps that choose experts, count, or add to an accumulator: what a second forward must not repeat.
let private effects (recipe: Recipe) = [
    for stage in (compiled Presets.Tiny recipe).Plan.Stages do
        for program in stage.Programs do
            for step in program.Steps do
                match step with
                | Step.Launch((KernelId.GroupTopK | KernelId.Route | KernelId.Accumulate) as kernel, _, _, _, path) ->
                    $"%O{kernel} %s{path}"
                | Step.Start(_, Collective.RouteToExperts, _, _, _, path) -> $"route %s{path}"
                | _other -> ()
]

let private peaks (plan: PlanSet) = plan.Memory |> Seq.map _.Headroom |> List.ofSeq

let private planOf (recipe: Recipe) = (compiled Presets.Tiny recipe).Plan

let private chosen (c: Compiled) =
    match c.Recomputed with
    | Some outcome -> outcome.Choices
    | None -> failtest "a budget leaves no record"

/// Budgets on two stages of tiny, between what full recomputation and none come to.
let private budgets =
    testList "budget" [
        let plain = lazy peaks (planOf staged)
        let full = lazy peaks (planOf (staged.WithRecompute "full"))

        let between share =
            full.Value |> List.map2 (fun p f -> f + int64 (share * float (p - f))) plain.Value |> List.max

        for share in [ 0.9; 0.6; 0.3; 0.1 ] do
            testCase $"what is chosen fits a budget at %.1f{share} of the way from full to none"
            <| fun () ->
                let budget = max (between share) (List.max full.Value)
                let c = compiled Presets.Tiny (staged.WithRecomputeBudget budget)

                for peak in peaks c.Plan do
                    Expect.isLessThanOrEqual peak budget "peak"

                // what is expected of a choice is about what it does
                let saved =
                    chosen c |> List.filter (fun x -> x.Stage = 0) |> List.sumBy (fun x -> x.Saved * int64 x.InFlight)

                Expect.isGreaterThanOrEqual (float saved) (0.5 * float (plain.Value[0] - budget)) "stage 0"

        testCase "a budget that suffices chooses nothing"
        <| fun () ->
            let c = compiled Presets.Tiny (staged.WithRecomputeBudget(List.max plain.Value))
            Expect.isEmpty (chosen c) "choices"
            Expect.equal (peaks c.Plan) plain.Value "peaks"

        testCase "stages differ: only the one that is over its budget recomputes, and a smaller budget never works less"
        <| fun () ->
            let c = compiled Presets.Tiny (staged.WithRecomputeBudget(max plain.Value[1] (plain.Value[0] - 1L)))
            Expect.isNonEmpty (chosen c) "choices"
            Expect.equal (chosen c |> List.map _.Stage |> List.distinct) [ 0 ] "stages"

            let work share =
                chosen (compiled Presets.Tiny (staged.WithRecomputeBudget(between share))) |> List.sumBy _.Work

            Expect.isLessThanOrEqual (work 0.9) (work 0.2) "work"

        testCase "the recipe's names hold beside the budget, and the plan records both with the reason"
        <| fun () ->
            let recipe = staged.WithRecompute("core_attn").WithRecomputeBudget(between 0.5)
            let c = compiled Presets.Tiny recipe
            Expect.isFalse (chosen c |> List.exists (fun x -> x.Name = "core_attn")) "chosen twice"
            let lines = List.ofSeq c.Plan.Recipe
            Expect.contains lines $"recompute=core_attn,budget=%i{between 0.5}" "the recipe"

            for choice in chosen c do
                let line = lines |> List.find _.StartsWith($"recompute.stage%i{choice.Stage}=")
                Expect.stringContains line choice.Name "name"
                Expect.stringContains line (string choice.Unit) "unit"

        testCase "a budget that nothing fits is refused with the stage and the least it needs"
        <| fun () ->
            let graph = DeepSeekV3(Presets.Tiny).Declare(1, 32)

            match Pipeline.run (staged.WithRecomputeBudget 1000L) graph with
            | Ok _ -> failtest "1000 bytes"
            | Error wrong ->
                Expect.equal (wrong |> List.map _.Code |> List.distinct) [ Codes.RecomputeBudget ] "code"
                Expect.equal wrong.Length 2 "both stages"
                Expect.stringContains wrong[0].Message "stage 0 needs" "stage"
                let least = (wrong[0].Message.Split ' ')[3] |> int64
                Expect.isLessThanOrEqual least full.Value[0] "no more than full recomputation"
                let fits = compiled Presets.Tiny (staged.WithRecomputeBudget(List.max full.Value))
                Expect.isTrue (peaks fits.Plan |> List.forall (fun p -> p <= List.max full.Value)) "what was named fits"

        testCase "a budget changes no bit"
        <| fun () ->
            let budget = between 0.4
            Expect.equal (train Presets.Tiny (staged.WithRecomputeBudget budget)) (train Presets.Tiny staged) "bits"

        testCase "amounts are read as they are written"
        <| fun () ->
            let read (text: string) = ByteSize.tryParse text
            Expect.equal (read "40GiB") (ValueSome(40L <<< 30)) "GiB"
            Expect.equal (read "1.5 GiB") (ValueSome(3L <<< 29)) "a fraction"
            Expect.equal (read "512MB") (ValueSome 512_000_000L) "MB"
            Expect.equal (read "17") (ValueSome 17L) "bytes"

            for wrong in [ ""; "GiB"; "-1"; "0"; "1e9"; "12 apples"; "9999999999TiB" ] do
                Expect.equal (read wrong) ValueNone wrong

            let settings text =
                RecipeSettings.withRecomputation Recipe.Default text
                |> Option.map (fun r -> List.ofSeq r.Recompute, r.RecomputeBudget)

            Expect.equal (settings "none") (Some([], 0L)) "none"
            Expect.equal (settings "mlp,budget=1GiB") (Some([ "mlp" ], 1L <<< 30)) "both"
            Expect.equal (settings "budget=1GiB,budget=2GiB") None "two budgets"
            Expect.equal (settings "budget=much") None "no amount"
    ]

let tests =
    testSequenced
    <| testList "recompute" [
        budgets
        for layout in layouts do
            everyPolicy layout
        for job in drawn do
            let what = String.concat "," job.Recompute
            let degrees = $"tp %i{job.Tensor} pp %i{job.Pipeline} ep %i{job.Expert} dp %i{job.Data} mtp %i{job.Mtp}"

            testCase $"%s{what} changes no bit of losses and gradients (%s{degrees})" <| fun () -> unchanged job

        for name, moved, more in golden do
            testCase $"%s{name} sends what is listed and no more"
            <| fun () ->
                Expect.equal (again [ name ] (ModelUnit.Layer 1)) moved "a MoE layer"
                Expect.equal (collectives [ name ] - collectives []) more "more than without"

        testCase "every name is in the list of what is sent"
        <| fun () -> Expect.equal (golden |> List.map (fun (name, _, _) -> name)) Recompute.names ""

        for name in Recompute.names do
            testCase $"%s{name} keeps less"
            <| fun () -> Expect.isLessThan (activations (staged.WithRecompute name)) (activations staged) "activations"

        testCase "the names together keep less than each alone, and full least"
        <| fun () ->
            let all = activations (staged.WithRecompute(Array.ofList (List.except [ "full" ] Recompute.names)))

            for name in List.except [ "full" ] Recompute.names do
                Expect.isLessThan all (activations (staged.WithRecompute name)) name

            Expect.isLessThan (activations (staged.WithRecompute "full")) all "full"

        testCase "experts are chosen, counted and summed once, whatever is recomputed"
        <| fun () ->
            for name in Recompute.names do
                Expect.equal (effects (staged.WithRecompute name)) (effects staged) name

        testCase "no widening cast is kept"
        <| fun () ->
            let c = compiled Presets.Tiny (staged.WithDType DType.BFloat16)
            let graph = c.Joint

            for node in graph.Nodes do
                if node.Origin.Pass.IsBackward then
                    for v in node.Inputs do
                        let maker = graph.NodeOf v

                        match maker.Op with
                        | Op.Cast wide when maker.Origin.Pass.IsForward && maker.Origin.Unit = node.Origin.Unit ->
                            if wide.Bytes > graph.Types[maker.Inputs[0]].DType.Bytes then
                                failtestf "%s keeps %O" maker.Origin.Path graph.Types[v]
                        | _other -> ()
    ]

/// Generation with a cache says what the whole forward pass would: in float64 for the graphs, and for compiled plans on every grid.
module DeepSeekGraph.Models.Tests.GenerationTests

open System
open System.Collections.Generic
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Reference
open DeepSeekGraph.Runtime.Generation
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Testing
open DeepSeekGraph.Models.Tests.Golden
open DeepSeekGraph.Models.Tests.Jobs

let private dense (extents: int[]) (data: float[]) = { Extents = extents; Data = data }

/// Without the objectives of training, as plans that generate are compiled.
let private withoutMtp (model: DeepSeekV3) = DeepSeekV3(model.Config.WithoutMtp())

/// Runs a pass in float64; the logits, and the caches that it leaves.
let private pass (weights: string -> DenseTensor) (caches: Map<string, DenseTensor>) (graph: Graph) ids positions last =
    let types = Feed.sources graph

    let given name =
        match name with
        | "tokens" -> dense types[name].Extents ids
        | "positions" -> dense types[name].Extents positions
        | "last" -> dense types[name].Extents last
        | cache -> caches |> Map.tryFind cache |> Option.defaultWith (fun () -> Dense.zeros types[cache].Extents)

    let values = Evaluator.run graph given weights

    let kept =
        values.OutputNames
        |> Array.filter _.StartsWith("cache:")
        |> Array.map (fun name -> name.Substring 6, values.Output name)

    values.Output "logits", Map.ofArray kept

/// Logits of the last token of `ids`, by the ordinary forward pass over all of them.
let private whole (case: Case) (weights: string -> DenseTensor) (ids: float[]) =
    let graph = (withoutMtp case.Model |> fun m -> DeepSeekV3(m.Config, Observe = true)).Declare(1, ids.Length)
    let types = Feed.sources graph

    let given name =
        match name with
        | "tokens" -> dense types[name].Extents (Array.append ids [| 0.0 |])
        | other -> Dense.full types[other].Extents 1.0

    let logits = (Evaluator.run graph given weights).Output "logits"
    let vocab = logits.Extents[2]
    Array.sub logits.Data ((ids.Length - 1) * vocab) vocab

let private cachedIsWhole case =
    testCase $"%s{case}: prompts of unequal length, token by token, in float64"
    <| fun () ->
        use case = load case 1 8
        let model = withoutMtp case.Model
        let shapes = Feed.sources (model.DeclareGeneration(1, 1, 1, true))
        let weights name = dense shapes[name].Extents (parameter case name |> Array.map float)
        let ids n = case.Ids[n .. n + 7] |> Array.map float
        let prompts = [| (ids 0)[..2]; (ids 20)[..4] |]
        let follow = [| (ids 0)[3..4]; (ids 20)[5..6] |]
        let columns, places = 6, 8

        let spread (f: int -> int -> float) = Array.init (2 * columns) (fun i -> f (i / columns) (i % columns))

        let first, caches =
            pass
                weights
                Map.empty
                (model.DeclareGeneration(2, columns, places, false))
                (spread (fun b s -> if s < prompts[b].Length then prompts[b][s] else 7.0))
                (spread (fun b s -> if s < prompts[b].Length then float s else -1.0))
                (spread (fun b s -> if s = prompts[b].Length - 1 then 1.0 else 0.0))

        let vocab = first.Extents[1]

        let compare what (logits: DenseTensor) seen =
            for b in 0..1 do
                let expected = whole case weights (Array.append prompts[b] (Array.truncate seen follow[b]))
                let ours = Array.sub logits.Data (b * vocab) vocab
                Expect.isLessThan (distance ours (Array.map float32 expected)) 1e-6 $"%s{what}, prompt %i{b}"

        compare "prefill" first 0
        let decode = model.DeclareGeneration(2, 1, places, true)

        let step caches seen =
            pass weights caches decode [| for f in follow -> f[seen] |] [|
                for p in prompts -> float (p.Length + seen)
            |] [| 1.0; 1.0 |]

        let second, caches = step caches 0
        compare "the first token after it" second 1
        let third, _ = step caches 1
        compare "the second" third 2

/// Tokens that compiled plans generate from prompts.
let private generate (case: Case) (recipe: Recipe) (executor: Executor) (prompts: int64[][]) most (sampling: Sampling) =
    let longest = prompts |> Array.map _.Length |> Array.max
    let plans = GenerationPlans.Compile(case.Model, recipe, prompts.Length, longest, longest + most)
    let shapes = dict [ for p in plans.Prefill.Parameters -> p.Name, p.Extents ]

    let weight (name: string) : torch.Tensor | null =
        torch.tensor(parameter case name).reshape([| for e in shapes[name] -> int64 e |])

    task {
        let options = GeneratorOptions(Weights = Func<_, _> weight, Executor = executor)
        let! generator = Generator.StartAsync(plans.Prefill, plans.Decode, options)
        let tokens = Array.init prompts.Length (fun _ -> List<int64>())
        let rows = [| for p in prompts -> p :> IReadOnlyList<int64> |]
        let run = generator.RunAsync(rows, most, sampling, null).GetAsyncEnumerator()
        let mutable more = true

        while more do
            let! next = run.MoveNextAsync()
            more <- next

            if more then
                tokens[run.Current.Prompt].Add run.Current.Token

        do! generator.DisposeAsync()
        return tokens |> Array.map _.ToArray()
    }
    |> _.GetAwaiter().GetResult()

let private greedy = Sampling()

let private grid (tensor, pipeline, expert) = Recipe.Default.WithParallelism(tensor, pipeline, expert, 0)

let private golden case degrees executor =
    testCase $"%s{case}: greedy tokens on tp, pp, ep %A{degrees}, %O{executor}"
    <| fun () ->
        use case = load case 1 8
        let prompt = case.Reference.ReadInt64 "prompt_ids"
        let expected = case.Reference.ReadInt64 "generated_ids"
        let most = expected.Length - prompt.Length
        // a second, shorter prompt beside it changes nothing
        let prompts = [| prompt; prompt[..4] |]
        let tokens = generate case (grid degrees) executor prompts most greedy
        Expect.equal tokens[0] expected[prompt.Length ..] "the tokens after the prompt"

        let alone = generate case (grid (1, 1, 1)) executor [| prompt[..4] |] most greedy
        Expect.equal tokens[1] alone[0] "the shorter prompt's"

/// What generates need not do: nothing goes back, and a sequence is whole on its ranks.
let private generating (job: Job) = {
    job with
        Mtp = 0
        Context = 1
        Recompute = []
        Bf16 = false
        Fp8 = 0
        Pipeline = min job.Pipeline job.Layers
        Virtual = 1
        Group = 0
        GPipe = false
        Cuts = job.Cuts |> List.filter (fun c -> c <= job.Layers)
}

/// Greedy tokens of three prompts, with weights drawn by the plans themselves.
let private drawn (job: Job) =
    let plans = GenerationPlans.Compile(DeepSeekV3(job.Config), job.Recipe, 3, 5, 9)

    let rows =
        [| [| 1L; 5L; 3L; 2L; 9L |]; [| 7L |]; [| 4L; 4L; 15L |] |]
        |> Array.map (fun p -> p :> IReadOnlyList<int64>)

    task {
        let! generator =
            Generator.StartAsync(plans.Prefill, plans.Decode, GeneratorOptions(Executor = Executor.Interpreter))

        let tokens = List<struct (int * int64)>()
        let run = generator.RunAsync(rows, 5, greedy, null).GetAsyncEnumerator()
        let mutable more = true

        while more do
            let! next = run.MoveNextAsync()
            more <- next

            if more then
                tokens.Add(struct (run.Current.Prompt, run.Current.Token))

        do! generator.DisposeAsync()
        return List.ofSeq tokens
    }
    |> _.GetAwaiter().GetResult()

let private anyGrid =
    testPropertyWithConfig
        {
            Properties.config [ typeof<AnyStages> ] with
                maxTest = 40
        }
        "random models on random grids: the tokens of one rank"
        (fun (job: Job) ->
            let job = generating job

            if legal job then
                Expect.equal (drawn job) (drawn { job.Single with Batch = 1 }) $"%A{job}")

/// A stage's F program with its first cache write behind everything else.
let private late (plan: PlanSet) =
    let isWrite (step: Step) =
        match step with
        | Step.Launch(KernelId.CacheWrite, _, _, _, _) -> true
        | Step.Launch _
        | Step.Start _
        | Step.Wait _
        | Step.Free _ -> false

    let move (program: Program) =
        match Seq.tryFindIndex isWrite program.Steps with
        | None -> program
        | Some at ->
            let steps = List.ofSeq program.Steps

            {
                program with
                    Steps = Array.ofList (List.removeAt at steps @ [ steps[at] ])
            }

    {
        plan with
            Stages = [|
                for s in plan.Stages ->
                    {
                        s with
                            Programs = [| for p in s.Programs -> move p |]
                    }
            |]
    }

let private readBeforeWrite =
    testCase "a plan that reads a cache before it is written is refused"
    <| fun () ->
        let job = { plain with Mtp = 0 }
        let plans = GenerationPlans.Compile(DeepSeekV3(job.Config), job.Recipe, 1, 3, 4)
        Expect.isEmpty (Check.run plans.Decode) "as compiled"

        let found = [
            for d in Check.run (late plans.Decode) do
                if d.Code = Codes.PlanLifetime && d.Message.Contains "is read before it is written" then
                    d.Message
        ]

        Expect.isTrue (found |> List.exists _.Contains("kv_cache")) $"%A{found}"

let private refusals =
    testCase "prompts that do not fit are refused"
    <| fun () ->
        let job = { plain with Mtp = 0 }
        let plans = GenerationPlans.Compile(DeepSeekV3(job.Config), job.Recipe, 1, 3, 4)

        task {
            let! generator =
                Generator.StartAsync(plans.Prefill, plans.Decode, GeneratorOptions(Executor = Executor.Interpreter))

            for prompts, most in
                [
                    [ [ 1L ]; [ 2L ] ], 1
                    [ [] ], 1
                    [ [ 1L; 2L; 3L; 4L ] ], 1
                    [ [ 1L; 2L; 3L ] ], 3
                ] do
                let rows = [| for p in prompts -> Array.ofList p :> IReadOnlyList<int64> |]

                try
                    let run = generator.RunAsync(rows, most, greedy, null).GetAsyncEnumerator()
                    let! _ = run.MoveNextAsync()
                    failtest $"%A{prompts} passed"
                with :? DiagnosticException as e ->
                    Expect.equal e.Diagnostics[0].Code Codes.PromptIllegal $"%A{prompts}"

            do! generator.DisposeAsync()
        }
        |> _.GetAwaiter().GetResult()

let tests =
    testList "generation" [
        anyGrid
        readBeforeWrite
        refusals
        cachedIsWhole "v3_tiny_plain"
        cachedIsWhole "v3_tiny_yarn"

        for case in [ "v3_tiny_plain"; "v3_tiny_yarn" ] do
            for degrees in [ 1, 1, 1; 2, 1, 2; 1, 2, 4; 2, 2, 2 ] do
                golden case degrees Executor.Interpreter

        golden "v3_tiny_plain" (2, 2, 2) Executor.Compiled
    ]

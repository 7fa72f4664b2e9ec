/// Initial values, shards, and whole steps of a small plan on one and on several ranks.
module DeepSeekGraph.Runtime.Tests.RunnerTests

open System
open System.Collections.Generic
open System.Diagnostics
open System.Threading
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime
open DeepSeekGraph.Runtime.Execution
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Parameters
open DeepSeekGraph.Runtime.Telemetry
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Runtime.Tests.CollectiveTests
open DeepSeekGraph.Runtime.Tests.Slots
open DeepSeekGraph.Testing

/// Rows of a fixed pattern.
type Pattern(rows: int, delay: int) =
    interface IBatchSource with
        member _.Get step =
            Thread.Sleep delay
            let columns = TinyPlan.seq + 1
            let source = Random(int32 step)
            TrainingBatch(rows, columns, Array.init (rows * columns) (fun _ -> int64 (source.Next TinyPlan.vocab)))

let private options executor rows =
    TrainerOptions(
        Batches = Pattern(rows, 0),
        LearningRate = LearningRate(0.05, 0.01, 2L, 20L),
        Seed = 7UL,
        Executor = executor
    )

let private collect (source: IAsyncEnumerable<StepMetrics>) = task {
    let items = List<StepMetrics>()
    let enumerator = source.GetAsyncEnumerator()

    try
        while! enumerator.MoveNextAsync() do
            items.Add enumerator.Current
    finally
        enumerator.DisposeAsync().AsTask().Wait()

    return items.ToArray()
}

let private train plan (options: TrainerOptions) (steps: int) =
    task {
        use! trainer = Trainer.StartAsync(plan, options)
        let! metrics = collect (trainer.RunAsync(int64 steps, CancellationToken.None))
        let parameters = trainer.GatherParameters()

        let values =
            Map [
                for KeyValue(name, tensor) in parameters -> name, tensor.data<float32>().ToArray()
            ]

        return metrics, values, trainer.PeakBytes |> Array.ofSeq
    }
    |> _.GetAwaiter().GetResult()

let private floats (tensor: torch.Tensor) = tensor.data<float32>().ToArray() |> Array.map float

let private layouts =
    testList "initial values" [
        testCase "shards of every layout tile the same global values, bitwise" (fun () ->
            LibTorch.Load()
            let extents = [| 4; 6; 10 |]
            let mesh = mesh [ 2; 3; 2 ]

            let whole = Array.init 240 (fun i -> ParameterInit.Normal("layers.0.w", 11UL, 0.02, int64 i))

            for layout in
                [
                    [| AxisState.Replicated; AxisState.Replicated; AxisState.Replicated |]
                    [| AxisState.Split 0; AxisState.Split 1; AxisState.Split 2 |]
                    [| AxisState.Split 2; AxisState.Replicated; AxisState.Split 0 |]
                    [| AxisState.Split 0; AxisState.Split 1; AxisState.Split 0 |]
                ] do
                let seen = Array.create 240 nan

                for place in 0 .. RankContext.RanksPerStage mesh - 1 do
                    let shard = Shard.Of(extents, layout, RankContext.At(mesh, 0, place))
                    use local = torch.zeros [| for e in shard.Extents -> int64 e |]
                    ParameterInit.Fill(local, shard, Init.Normal 0.02, "layers.0.w", 11UL)
                    let values = local.data<float32>().ToArray()

                    shard.ForEachRun(fun g l n ->
                        for i in 0L .. n - 1L do
                            seen[int32 (g + i)] <- float values[int32 (l + i)])

                Expect.equal seen (Array.map float whole) "tiled")

        testCase "values are normal" (fun () ->
            let values = Array.init 20000 (fun i -> float (ParameterInit.Normal("w", 1UL, 2.0, int64 i)))
            let mean = Array.average values
            let deviation = sqrt (values |> Array.averageBy (fun v -> (v - mean) ** 2.0))
            Expect.isLessThan (abs mean) 0.05 "mean"
            Expect.isLessThan (abs (deviation - 2.0)) 0.05 "deviation"
            let other = Array.init 20000 (fun i -> float (ParameterInit.Normal("v", 1UL, 2.0, int64 i)))
            Expect.isLessThan (abs (dot values other) / 20000.0) 0.1 "another name is independent")
    ]

/// loss and gradients of the tiny plan by hand
let private byHand (tokens: int64[][]) (embed: float[]) (head: float[]) =
    let h, seq = TinyPlan.hidden, TinyPlan.seq
    let dEmbed, dHead = Array.zeroCreate embed.Length, Array.zeroCreate head.Length
    let scale = 1.0 / float (tokens.Length * seq)
    let mutable loss = 0.0

    for row in tokens do
        for p in 0 .. seq - 1 do
            let x = Array.sub embed (int32 row[p] * h) h
            let z = Array.init h (fun n -> Seq.sumBy (fun k -> head[n * h + k] * x[k]) [ 0 .. h - 1 ])
            loss <- loss + scale * dot z z

            for n in 0 .. h - 1 do
                for k in 0 .. h - 1 do
                    let g = 2.0 * scale * z[n]
                    dHead[n * h + k] <- dHead[n * h + k] + g * x[k]
                    dEmbed[int32 row[p] * h + k] <- dEmbed[int32 row[p] * h + k] + g * head[n * h + k]

    loss, dEmbed, dHead

let private steps (executor: Executor) =
    testList $"steps, %O{executor}" [
        for data in [ 1; 2 ] do
            testCase $"loss and gradients are those computed by hand, %i{data} data ranks" (fun () ->
                task {
                    use! trainer = Trainer.StartAsync(TinyPlan.plan data 2 4, options executor 8)
                    let source = Random 5

                    let rows =
                        Array.init 8 (fun _ ->
                            Array.init (TinyPlan.seq + 1) (fun _ -> int64 (source.Next TinyPlan.vocab)))

                    let microbatches = [|
                        for m in 0..1 ->
                            let flat = rows[m * 4 .. m * 4 + 3] |> Array.concat
                            let tokens = torch.tensor(flat).reshape(4L, int64 (TinyPlan.seq + 1))
                            let mask = torch.ones (4L, int64 TinyPlan.seq)

                            dict [ "tokens", tokens; "loss_mask", mask ] |> Dictionary
                            :> IReadOnlyDictionary<string, torch.Tensor>
                    |]

                    let seen = List<string>()

                    do!
                        trainer.ForwardBackwardAsync(
                            microbatches,
                            (fun runner value microbatch ->
                                if value.Info.Name = "z" then
                                    lock seen (fun () -> seen.Add $"%i{runner.Rank.Rank} %i{microbatch}")),
                            CancellationToken.None
                        )

                    let parameters, gradients = trainer.GatherParameters(), trainer.GatherGradients()
                    let loss, dEmbed, dHead = byHand rows (floats parameters["embed"]) (floats parameters["head"])
                    close "embed" DType.Float32 (floats gradients["embed"]) dEmbed
                    close "head" DType.Float32 (floats gradients["head"]) dHead
                    use total = Gathering.Slot(trainer.Ranks, 1, "metric:loss")
                    close "loss" DType.Float32 (floats total) [| loss |]
                    Expect.equal seen.Count (2 * data) "observed once a microbatch and rank"
                }
                |> _.GetAwaiter().GetResult())

        testCase "training lowers the loss, and data parallel ranks agree with one" (fun () ->
            let one, _, _ = train (TinyPlan.plan 1 2 4) (options executor 8) 12
            let two, _, peaks = train (TinyPlan.plan 2 2 4) (options executor 8) 12
            Expect.isLessThan one[11].Loss (one[0].Loss * 0.8) "loss falls"

            for a, b in Array.zip one two do
                Expect.isLessThan (abs (a.Loss - b.Loss) / a.Loss) 1e-4 $"step %i{a.Step}"
                Expect.isLessThan (abs (a.GradNorm - b.GradNorm) / a.GradNorm) 1e-4 "norm"

            Expect.equal one[0].Tokens 24L "tokens"
            Expect.floatClose Accuracy.medium one[0].Lr 0.025 "warm-up"
            let embed = int64 (TinyPlan.vocab * TinyPlan.hidden * 4)

            Expect.equal
                (peaks[0].Parameters, peaks[0].Optimizer, peaks[0].Gradients)
                (embed, 2L * embed, embed)
                "bytes"

            Expect.isGreaterThan peaks[0].Activations 0L "activations")

        testCase "the same plan and seed give the same bits" (fun () ->
            let metrics, a, _ = train (TinyPlan.plan 2 2 4) (options executor 8) 5
            let again, b, _ = train (TinyPlan.plan 2 2 4) (options executor 8) 5
            Expect.equal a b "parameters"
            Expect.equal (metrics |> Array.map _.Loss) (again |> Array.map _.Loss) "losses")

        testCase "workers compute without gradients on one thread, and keep no tensor" (fun () ->
            task {
                use! trainer = Trainer.StartAsync(TinyPlan.plan 2 2 4, options executor 8)
                let! _ = collect (trainer.RunAsync(2L, CancellationToken.None))

                do!
                    trainer.OnAllAsync(fun _ ->
                        if torch.is_grad_enabled () || torch.get_num_threads () <> 1 then
                            failtest "worker")

                let live () = trainer.Ranks |> Seq.map _.Memory.Live |> Array.ofSeq
                let before = live ()
                let! _ = collect (trainer.RunAsync(3L, CancellationToken.None))
                Expect.equal (live ()) before "bytes held between steps"
            }
            |> _.GetAwaiter().GetResult())

        testCase "given weights are taken, and a wrong shape is told" (fun () ->
            LibTorch.Load()
            use ones = torch.ones (int64 TinyPlan.vocab, int64 TinyPlan.hidden)
            let given: torch.Tensor | null = ones
            let weights = Func<string, torch.Tensor | null>(fun name -> if name = "embed" then given else null)

            let _, values, _ =
                train (TinyPlan.plan 2 1 4) (TrainerOptions(Weights = weights, Batches = Pattern(4, 0))) 0

            Expect.allEqual values["embed"] 1.0f "embed"
            use wrong = torch.ones (2L, 2L)

            let start () =
                train
                    (TinyPlan.plan 2 1 4)
                    (TrainerOptions(Weights = Func<string, torch.Tensor | null>(fun _ -> wrong)))
                    0
                |> ignore

            let e = Expect.throwsC start id
            Expect.stringContains (string e.Message) Codes.WeightMismatch "code")
    ]

/// The plan with one program of one stage changed.
let private changed stage (phase: Phase) (change: Step list -> Step list) (plan: PlanSet) =
    let program (p: Program) =
        if p.Phase = phase then
            {
                p with
                    Steps = Array.ofList (change (List.ofSeq p.Steps))
            }
        else
            p

    let stageOf (s: StagePlan) =
        if s.Stage = stage then
            {
                s with
                    Programs = [| for p in s.Programs -> program p |]
            }
        else
            s

    {
        plan with
            Stages = [| for s in plan.Stages -> stageOf s |]
    }

let private faults (executor: Executor) =
    testList $"faults, %O{executor}" [
        testCase "a failing kernel names code, rank, step, instruction and path" (fun () ->
            let broken =
                TinyPlan.plan 2 2 4
                |> changed
                    1
                    (Phase.F 0)
                    (List.map (function
                        | Step.Launch(KernelId.Contract, _, inputs, outputs, path) ->
                            Step.Launch(
                                KernelId.Contract,
                                [| Attribute.Text "b s k+, k+ n -> b n s" |],
                                [| inputs[0]; inputs[0] |],
                                outputs,
                                path
                            )
                        | step -> step))

            let watch = Stopwatch.StartNew()
            let e = Expect.throwsC (fun () -> train broken (options executor 8) 1 |> ignore) id
            // compiling included
            Expect.isLessThan watch.Elapsed.TotalSeconds 20.0 "time"

            match e with
            | :? RuntimeException as fault ->
                Expect.equal (fault.Code, fault.Step, fault.Path) (Codes.KernelFailed, 1L, "head") "fault"
                Expect.isTrue (fault.Rank >= 2) "rank"
                Expect.stringContains fault.Instruction "Contract(x, x) -> z" "instruction"
                Expect.equal (fault.ToDiagnostic().Diagnostics[0].Code) Codes.KernelFailed "diagnostic"
            | other -> failtest $"%O{other}")

        testCase "a collective whose value does not fit names its instruction" (fun () ->
            let broken =
                TinyPlan.plan 1 1 4
                |> changed 1 (Phase.F 0) (fun steps ->
                    let spare =
                        steps
                        |> List.pick (function
                            | Step.Launch(KernelId.Accumulate, _, _, outputs, _) -> Some outputs
                            | _other -> None)

                    steps
                    |> List.map (function
                        | Step.Start(token, kind, group, inputs, _, path) ->
                            Step.Start(token, kind, group, inputs, spare, path)
                        | step -> step))

            match Expect.throwsC (fun () -> train broken (options executor 4) 1 |> ignore) id with
            | :? RuntimeException as fault ->
                Expect.equal (fault.Code, fault.Rank) (Codes.CollectiveFailed, 1) "code"
                Expect.stringContains fault.Instruction "wait 1" "instruction"
            | other -> failtest $"%O{other}")

        testCase "what a step leaves over is a bug" (fun () ->
            let leaking = TinyPlan.plan 1 1 4 |> changed 0 (Phase.W 0) (List.filter (fun step -> not step.IsFree))

            match Expect.throwsC (fun () -> train leaking (options executor 4) 1 |> ignore) id with
            | :? RuntimeException as fault -> Expect.equal fault.Code Codes.StepIncomplete "code"
            | other -> failtest $"%O{other}")

        testCase "cancelling stops within two seconds, even where ranks wait for ever" (fun () ->
            // stage 0 waits for a gradient that nobody sends
            let stuck =
                TinyPlan.plan 2 2 4
                |> changed 1 (Phase.I 0) (List.filter (fun step -> not step.IsStart && not step.IsWait))

            task {
                use! trainer = Trainer.StartAsync(stuck, options executor 8)
                use source = new CancellationTokenSource(300)
                let watch = Stopwatch.StartNew()

                try
                    let! _ = collect (trainer.RunAsync(5L, source.Token))
                    failtest "went on"
                with :? OperationCanceledException ->
                    ()

                Expect.isLessThan watch.Elapsed.TotalSeconds 2.3 "time"
            }
            |> _.GetAwaiter().GetResult())

        testCase "dtype probe is quick and the same twice" (fun () ->
            let watch = Stopwatch.StartNew()
            let first = DTypeProbe.Faster
            Expect.isTrue first.IsFloat "a float"
            Expect.isLessThan watch.Elapsed.TotalSeconds 3.0 "time"
            Expect.equal DTypeProbe.Faster first "cached")
    ]

/// One rank that chooses 2 of 4 experts for each of 3 tokens.
let private chooser: PlanSet =
    let slot id name kind dtype : SlotInfo = {
        info name kind dtype false [ 1; 3; 4 ] with
            Id = id
    }

    {
        TinyPlan.plan 1 1 1 with
            Groups = [||]
            Parameters = [||]
            Inputs = [|
                {
                    Name = "scores"
                    DType = DType.Float32
                    Axes = [| "b"; "s"; "e" |]
                    Extents = [| 1; 3; 4 |]
                    Layout = [||]
                }
            |]
            Stages = [|
                {
                    Stage = 0
                    Units = "L"
                    Slots = [|
                        slot 0 "scores" SlotKind.Input DType.Float32
                        slot 1 "mask" SlotKind.Temporary DType.Bool
                    |]
                    Programs = [|
                        {
                            Phase = Phase.F 0
                            Chunk = 0
                            Steps = [|
                                Step.Launch(
                                    KernelId.GroupTopK,
                                    [| int 2; int 1; int 1; int 0; int 0 |],
                                    [| 0 |],
                                    [| 1 |],
                                    "moe"
                                )
                                Step.Free 0
                                Step.Free 1
                            |]
                        }
                    |]
                    Timetable = [| TinyPlan.action (Phase.F 0) 0 |]
                }
            |]
    }

let private traces (executor: Executor) =
    testCase $"expert choices are recorded, replayed and compared, %O{executor}" (fun () ->
        LibTorch.Load()

        let choose (trace: RoutingTrace) (scores: float list) =
            task {
                use! trainer = Trainer.StartAsync(chooser, TrainerOptions(Trace = trace, Executor = executor))
                let tensor = torch.tensor(scores |> List.map float32 |> Array.ofList).reshape(1L, 3L, 4L)
                let inputs = dict [ "scores", tensor ] |> Dictionary :> IReadOnlyDictionary<string, torch.Tensor>
                let seen = List<float[]>()

                do!
                    trainer.ForwardBackwardAsync(
                        [| inputs |],
                        (fun _ value _ -> seen.Add(read value)),
                        CancellationToken.None
                    )

                return seen |> Seq.exactlyOne
            }
            |> _.GetAwaiter().GetResult()

        let trace = RoutingTrace()
        let first = choose trace [ 4.0; 3.0; 2.0; 1.0; 1.0; 2.0; 3.0; 4.0; 1.0; 4.0; 1.0; 4.0 ]
        Expect.equal first [| 1.0; 1.0; 0.0; 0.0; 0.0; 0.0; 1.0; 1.0; 0.0; 1.0; 0.0; 1.0 |] "recorded"
        trace.Replay <- true
        // the second token would choose otherwise
        let again = choose trace [ 4.0; 3.0; 2.0; 1.0; 4.0; 2.0; 3.0; 1.0; 1.0; 4.0; 1.0; 4.0 ]
        Expect.equal again first "replayed"
        Expect.equal (trace.Tokens, trace.Differing) (3L, 1L) "one token differs")

let tests =
    testList "Runner" [
        layouts
        for executor in [ Executor.Interpreter; Executor.Compiled ] do
            steps executor
            faults executor
            traces executor
    ]

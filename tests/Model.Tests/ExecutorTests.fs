/// The law of the two executors: compiled and interpreted plans leave the same bits in every slot of every rank.
module DeepSeekGraph.Models.Tests.ExecutorTests

open System.Collections.Generic
open Expecto
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Models.Tests.Jobs
open DeepSeekGraph.Models.Tests.ParallelTests

/// Metrics of two steps; then parameters, optimizer states, gradients and counters of each rank as bytes; then peaks.
let private outcome (config: DeepSeekV3Config) (plan: PlanSet) executor =
    let tokens = plan.Inputs |> Seq.find (fun i -> i.Name = "tokens")

    let options =
        TrainerOptions(
            Batches = RandomTokens(plan.Microbatches * plan.MicroBatch, tokens.Extents[1], config.VocabSize),
            LearningRate = LearningRate(1e-2, 1e-3, 0L, 0L),
            Executor = executor
        )

    task {
        use! trainer = Trainer.StartAsync(plan, options)
        let run = trainer.RunAsync(2L).GetAsyncEnumerator()
        let metrics = List<_>()

        while! run.MoveNextAsync() do
            metrics.Add(run.Current.Loss, run.Current.MtpLoss, run.Current.GradNorm)

        let states = [
            for runner in trainer.Ranks do
                for value in runner.Persistent do
                    runner.Rank.Rank, value.Info.Name, value.Tensor.bytes.ToArray()
        ]

        let peaks = [ for runner in trainer.Ranks -> runner.Memory.Peak ]
        return List.ofSeq metrics, states, peaks, List.ofSeq trainer.Remarks
    }
    |> _.GetAwaiter().GetResult()

let private agree config recipe =
    let plan = DeepSeekV3(config).Compile recipe
    let metrics, states, peaks, remarks = outcome config plan Executor.Compiled
    let metrics', states', peaks', _ = outcome config plan Executor.Interpreter
    Expect.equal remarks [] "compiled, not interpreted"
    Expect.equal metrics metrics' "metrics"

    for (rank, name, bytes), (_, _, bytes') in List.zip states states' do
        if bytes <> bytes' then
            failtest $"%s{name} of rank %i{rank} differs"

    Expect.equal peaks peaks' "peaks"

/// Settings drawn once, by a fixed seed.
let private drawn = Gen.sampleWithSeed (FsCheck.Rnd(77UL, 3UL)) 10 12 (AnyStages.Job().Generator)

let tests =
    testSequenced
    <| testList "executors" [
        for i, job in Array.indexed drawn do
            let degrees = $"tp %i{job.Tensor} pp %i{job.Pipeline} ep %i{job.Expert} dp %i{job.Data}"

            testCase $"setting %i{i}, %s{degrees}, layout '%s{job.Layout}': compiled = interpreted, bitwise"
            <| fun () -> agree job.Config job.Recipe

        for dtype in [ DType.Float32; DType.BFloat16 ] do
            testCase $"the tiny model on 8 ranks, %s{dtype.Name}: compiled = interpreted, bitwise"
            <| fun () ->
                agree Presets.Tiny (Recipe.Default.WithParallelism(2, 2, 2, 2).WithBatch(8, 1, 16).WithDType dtype)
    ]

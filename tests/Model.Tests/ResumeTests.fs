/// Laws of checkpoints: resumed = uninterrupted, any plan -> any other plan and back, background = at once; all bitwise.
module DeepSeekGraph.Models.Tests.ResumeTests

open System
open System.IO
open Expecto
open FsCheck.FSharp
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime.Checkpoints
open DeepSeekGraph.Runtime.Parameters
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Models.Tests.Jobs
open DeepSeekGraph.Models.Tests.ParallelTests

/// A new folder that is gone afterwards.
let inFolder (test: string -> 'a) : 'a =
    let folder = Directory.CreateTempSubdirectory "dsg-checkpoint-"

    try
        test folder.FullName
    finally
        folder.Delete true

let private isState (slot: SlotInfo) = slot.Kind.IsParameter || slot.Kind.IsOptimizer

/// Parameters and optimizer states of every rank, as bytes.
let private states (trainer: Trainer) = [
    for runner in trainer.Ranks do
        for value in runner.Persistent do
            if isState value.Info then
                (runner.Rank.Rank, value.Info.Name), value.Tensor.bytes.ToArray()
]

/// Whole states by name, for plans whose shards differ.
let private gathered (trainer: Trainer) =
    dict [
        for stage in trainer.Plan.Stages do
            for slot in stage.Slots do
                if isState slot then
                    use whole = Gathering.Slot(trainer.Ranks, stage.Stage, slot.Name)
                    slot.Name, whole.bytes.ToArray()
    ]

let private equal what (a: ((int * string) * byte[]) list) (b: ((int * string) * byte[]) list) =
    Expect.equal (List.map fst a) (List.map fst b) $"%s{what}: slots"

    for ((rank, name), left), (_, right) in List.zip a b do
        if left <> right then
            failtest $"%s{what}: %s{name} of rank %i{rank} differs"

/// A started trainer on random tokens; from a checkpoint where one is given.
let start (config: DeepSeekV3Config) (plan: PlanSet) (from: string) = task {
    let tokens = plan.Inputs |> Seq.find (fun i -> i.Name = "tokens")
    use checkpoint = if from = "" then null else CheckpointReader.Open from

    let options =
        TrainerOptions(
            Batches = RandomTokens(plan.Microbatches * plan.MicroBatch, tokens.Extents[1], config.VocabSize),
            LearningRate = LearningRate(1e-2, 1e-3, 2L, 6L),
            Executor = Executor.Interpreter,
            Checkpoint = checkpoint
        )

    return! Trainer.StartAsync(plan, options)
}

/// The losses of so many steps; `between` runs behind each.
let train (trainer: Trainer) (steps: int64) (between: int64 -> Threading.Tasks.Task) = task {
    let run = trainer.RunAsync(steps).GetAsyncEnumerator()
    let losses = ResizeArray<float>()

    while! run.MoveNextAsync() do
        losses.Add run.Current.Loss
        do! between run.Current.Step

    return List.ofSeq losses
}

let nothing (_: int64) = Threading.Tasks.Task.CompletedTask

let save (trainer: Trainer) (root: string) background = task {
    let options = CheckpointOptions(Root = root, Background = background, Training = [| "lr=0.01" |])
    use saver = new CheckpointSaver(trainer, options)
    do! saver.SaveAsync()
    do! saver.FinishAsync()
}

let private wait (task: Threading.Tasks.Task<'a>) = task.GetAwaiter().GetResult()

/// Two runs of one plan, the second cut in the middle.
let resumes (config: DeepSeekV3Config) (recipe: Recipe) =
    inFolder (fun root ->
        let plan = DeepSeekV3(config).Compile recipe

        task {
            let! whole = start config plan ""
            let! expected = train whole 4L nothing
            let final = states whole
            do! whole.DisposeAsync()

            let! first = start config plan ""
            let! _ = train first 2L nothing
            do! save first root false
            do! first.DisposeAsync()

            let! second = start config plan root

            Expect.equal
                (second.Step, second.Sequences)
                (2L, 2L * int64 recipe.GlobalBatch)
                "step and place in the data"

            let! losses = train second 2L nothing
            Expect.equal losses (List.skip 2 expected) "losses of later steps"
            equal "resumed" (states second) final
            do! second.DisposeAsync()
        }
        |> wait)

/// The model of one job on the mesh of another.
let private remeshed (model: Job) (mesh: Job) = {
    mesh with
        Layers = model.Layers
        Dense = model.Dense
        Mtp = model.Mtp
        DirectQ = model.DirectQ
        Yarn = model.Yarn
        Routing = model.Routing
        Shared = model.Shared
        Balance = model.Balance
        Bf16 = model.Bf16
        NarrowStates = model.NarrowStates
        Remainders = model.Remainders
}

let private small (job: Job) = ranks job * job.Pipeline <= 16

/// Pairs of a job and another mesh for its model; every second one in bf16 with remainders.
let private pairs =
    let drawn = Gen.sampleWithSeed (FsCheck.Rnd(5UL, 7UL)) 10 400 (AnyStages.Job().Generator)

    [
        for a, b in Array.pairwise drawn do
            let b = remeshed a b

            if small a && small b && legal b then
                a, b
    ]
    |> List.truncate 6
    |> List.mapi (fun i (a, b) ->
        let kept job =
            if i % 2 = 0 then
                job
            else
                {
                    job with
                        Bf16 = true
                        Remainders = true
                }

        kept a, kept b)

let private reshards (a: Job) (b: Job) =
    inFolder (fun folder ->
        let plans = [ for job in [ a; b ] -> DeepSeekV3(job.Config).Compile job.Recipe ]
        let there, back = Path.Combine(folder, "there"), Path.Combine(folder, "back")

        task {
            let! first = start a.Config plans[0] ""
            let! _ = train first 2L nothing
            let expected, whole = states first, gathered first
            do! save first there false
            do! first.DisposeAsync()

            let! other = start a.Config plans[1] there
            let moved = gathered other

            for name in moved.Keys do
                let parameter = if name.StartsWith "master:" then name[7..] else name
                let source = if whole.ContainsKey name then name else parameter
                Expect.isTrue (moved[name] = whole[source]) $"%s{name} on the other mesh"

            Expect.equal other.Step 2L "step"
            do! save other back true
            do! other.DisposeAsync()

            let! again = start a.Config plans[0] back
            equal "there and back" (states again) expected
            do! again.DisposeAsync()
        }
        |> wait)

let private describe (job: Job) =
    $"tp %i{job.Tensor} cp %i{job.Context} dp %i{job.Data} etp %i{job.ExpertTensor} ep %i{job.Expert} '%s{job.Layout}'"

let private tiny = Recipe.Default.WithParallelism(2, 2, 2, 2).WithBatch(8, 1, 16)

let private files folder =
    Directory.GetFiles(folder, "*", SearchOption.AllDirectories)
    |> Array.sort
    |> Array.map (fun path -> Path.GetRelativePath(folder, path), File.ReadAllBytes path)

let tests =
    testList "resume" [
        for dtype in [ DType.Float32; DType.BFloat16 ] do
            testCase $"8 ranks, %s{dtype.Name}: resumed = uninterrupted, bitwise"
            <| fun () -> resumes Presets.Tiny (tiny.WithDType dtype)

        for i, (a, b) in List.indexed pairs do
            testCase $"pair %i{i}: %s{describe a} -> %s{describe b} and back, bitwise" <| fun () -> reshards a b

        test "saved in the background while training goes on = saved at once" {
            inFolder (fun folder ->
                let config = Presets.Tiny
                let plan = DeepSeekV3(config).Compile tiny
                let atOnce, behind = Path.Combine(folder, "a"), Path.Combine(folder, "b")

                task {
                    let! trainer = start config plan ""

                    let saver root background =
                        new CheckpointSaver(trainer, CheckpointOptions(Root = root, Background = background))

                    let one, two = saver atOnce false, saver behind true

                    let! _ =
                        train trainer 4L (fun _ -> task {
                            do! one.SaveAsync()
                            // a second save waits for the first
                            do! two.SaveAsync()
                            do! two.SaveAsync()
                        })

                    do! one.DisposeAsync()
                    do! two.DisposeAsync()
                    do! trainer.DisposeAsync()

                    for (name, left), (name', right) in Array.zip (files atOnce) (files behind) do
                        Expect.equal name name' "files"
                        Expect.isTrue (left = right) name

                    Expect.equal (CheckpointRoot.Steps behind |> List.ofSeq) [ 1L .. 4L ] "all of them"
                }
                |> wait)
        }

        test "other masters: a bf16 plan from an fp32 checkpoint has its exact values as masters" {
            inFolder (fun root ->
                let config = Presets.Tiny
                let one = Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(4, 1, 16)
                let plan dtype = DeepSeekV3(config).Compile(one.WithDType dtype)

                task {
                    let! wide = start config (plan DType.Float32) ""
                    let! _ = train wide 2L nothing
                    let expected = gathered wide
                    do! save wide root false
                    do! wide.DisposeAsync()
                    let! narrow = start config (plan DType.BFloat16) root
                    let moved = gathered narrow
                    let mutable masters = 0

                    for name in moved.Keys do
                        if name.StartsWith "master:" then
                            masters <- masters + 1
                            Expect.isTrue (moved[name] = expected[name[7..]]) name
                            use exact = Gathering.Slot(narrow.Ranks, 0, name)
                            use rounded = exact.to_type torch.ScalarType.BFloat16
                            Expect.isTrue (moved[name[7..]] = rounded.bytes.ToArray()) $"%s{name[7..]}, rounded"

                    Expect.isGreaterThan masters 10 "masters"
                    do! narrow.DisposeAsync()
                }
                |> wait)
        }

        test "a checkpoint of another model: everything that does not fit, in one diagnostic" {
            inFolder (fun root ->
                let one = Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(4, 1, 16)
                let config = Presets.Tiny

                let set (key: string) (value: int) (c: DeepSeekV3Config) =
                    RecordFields.With(c, key, string value) |> nonNull

                let other = config |> set "num_hidden_layers" 3 |> set "kv_lora_rank" (config.KvLoraRank * 2)

                task {
                    let! trainer = start config (DeepSeekV3(config).Compile one) ""
                    do! save trainer root false
                    do! trainer.DisposeAsync()

                    try
                        let! _ = start other (DeepSeekV3(other).Compile one) root
                        failtest "it loads"
                    with :? DiagnosticException as e ->
                        Expect.hasLength e.Diagnostics 1 "one"
                        let d = e.Diagnostics[0]
                        Expect.equal d.Code Codes.CheckpointMismatch "code"
                        Expect.stringContains d.Message "unknown to the plan: " "unknown"
                        Expect.stringContains d.Message "model.layers.4.self_attn.o_proj.weight" "by name"
                        Expect.stringContains d.Message "of another shape: " "shapes"
                        Expect.stringContains d.Message "kv_b_proj" "by name"
                }
                |> wait)
        }
    ]

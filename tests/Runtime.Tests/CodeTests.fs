/// Generated C#: it holds nothing of the plan's strings, it compiles, and it runs as the interpreter does.
module DeepSeekGraph.Runtime.Tests.CodeTests

open System
open System.Collections.Generic
open System.Runtime.CompilerServices
open System.Runtime.Loader
open System.Threading
open FSharp.Reflection
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime.Execution
open DeepSeekGraph.Runtime.Execution.Generated
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Runtime.Tests.RunnerTests

let private plan = TinyPlan.plan 2 2 4

/// A name that would be code wherever it were copied: into a string, a comment or a statement.
let private evil (name: string) = $"%s{name}\"]); */ System.Environment.Exit(9); //\u2028\n#error \\u0041 {name} %%n"

/// The plan with every string of it made hostile; axis letters keep to their grammar, which has no blanks or commas.
let private hostile (plan: PlanSet) : PlanSet =
    let letter (name: string) = $"\"+%s{name}/*\u2028//\\"
    let spec (text: string) = text.Replace("k+", letter "k" + "+").Replace("b ", letter "b" + " ")
    let axes (names: IReadOnlyList<string>) = [| for name in names -> evil name |]

    let step (step: Step) =
        match step with
        | Step.Launch(kernel, attributes, inputs, outputs, path) ->
            let attributes = [|
                for attribute in attributes ->
                    match attribute with
                    | Attribute.Text text -> Attribute.Text(spec text)
                    | other -> other
            |]

            Step.Launch(kernel, attributes, inputs, outputs, evil path)
        | Step.Start(token, kind, group, inputs, outputs, path) ->
            Step.Start(token, kind, group, inputs, outputs, evil path)
        | Step.Wait _
        | Step.Free _ -> step

    let stage (stage: StagePlan) : StagePlan = {
        stage with
            Units = evil stage.Units
            Slots = [|
                for s in stage.Slots ->
                    {
                        s with
                            Name = evil s.Name
                            Axes = axes s.Axes
                    }
            |]
            Programs = [|
                for p in stage.Programs ->
                    {
                        p with
                            Steps = [| for s in p.Steps -> step s |]
                    }
            |]
    }

    {
        plan with
            Recipe = [| for line in plan.Recipe -> evil line |]
            Layout = evil plan.Layout
            Schedule = evil plan.Schedule
            Groups = [| for g in plan.Groups -> { g with Name = evil g.Name } |]
            Parameters = [| for p in plan.Parameters -> { p with Name = evil p.Name } |]
            Inputs = [| for i in plan.Inputs -> { i with Name = evil i.Name } |]
            Stages = [| for s in plan.Stages -> stage s |]
    }

let private sources (plan: PlanSet) = [ for stage in plan.Stages -> CodeWriter.Write(plan, stage) ]

/// The plan with the attributes of its contractions changed.
let private contracting attributes (plan: PlanSet) =
    let step (step: Step) =
        match step with
        | Step.Launch(KernelId.Contract, _, inputs, outputs, path) ->
            Step.Launch(KernelId.Contract, attributes, inputs, outputs, path)
        | other -> other

    {
        plan with
            Stages = [|
                for s in plan.Stages ->
                    {
                        s with
                            Programs = [|
                                for p in s.Programs ->
                                    {
                                        p with
                                            Steps = [| for s in p.Steps -> step s |]
                                    }
                            |]
                    }
            |]
    }

let private writing =
    testList "writer" [
        testCase "the source does not depend on any string of the plan" (fun () ->
            Expect.equal (sources (hostile plan)) (sources plan) "same source"
            Expect.isFalse ((String.concat "" (sources (hostile plan))).Contains "Exit") "nothing of the names")

        testCase "axis names become letters; what is no contraction is read from the plan" (fun () ->
            let renamed = AxisLetters.Rename "tok x\"in+ ^, out^ x\"in+ ^ -> tok out"
            Expect.equal renamed "a b c, d b c -> a d" "letters"

            for wrong in [ "a b"; "a -> b"; "a, b, c -> d"; "a, b -> c -> d" ] do
                Expect.isNull (AxisLetters.Rename wrong) wrong

            let many = String.Join(' ', [ for i in 1..27 -> $"a%i{i}" ])
            Expect.isNull (AxisLetters.Rename $"%s{many}, a1 -> a2") "too many axes"

            let text = contracting [| Attribute.Text "Exit\" (" |] plan |> sources |> String.concat ""
            Expect.isFalse (text.Contains "Exit") "not copied"
            Expect.stringContains text "Given(" "read from the plan")

        testCase "numbers of every size survive" (fun () ->
            let numbers = [|
                Attribute.Int Int64.MinValue
                Attribute.Int Int64.MaxValue
                Attribute.Float nan
                Attribute.Float -infinity
                Attribute.Float -0.0
                Attribute.Float Double.Epsilon
                Attribute.Float 0.1
                Attribute.Ints [| Int64.MinValue; 0L; -1L |]
                Attribute.Ints [||]
            |]

            let text = contracting numbers plan |> sources |> List.item 1
            let assembly = CodeCompiler.Compile text
            let context = AssemblyLoadContext("numbers", true)
            let stage = context.LoadFromStream(new IO.MemoryStream(assembly)).GetType CodeWriter.ClassName

            let constants =
                (nonNull stage).GetFields(Reflection.BindingFlags.Static ||| Reflection.BindingFlags.NonPublic)
                |> Array.choose (fun f ->
                    match f.GetValue null with
                    | :? (Attribute[]) as values when values.Length = numbers.Length -> Some values
                    | _other -> None)

            let bits (attribute: Attribute) =
                match attribute with
                | Attribute.Float value -> $"%i{BitConverter.DoubleToInt64Bits value}"
                | Attribute.Ints values -> String.Join(' ', values)
                | other -> $"%A{other}"

            Expect.equal (Array.map (Array.map bits) constants) [| Array.map bits numbers |] "same bits"
            context.Unload())

        testCase "every kind of collective is written as itself" (fun () ->
            let kinds = [
                for form in FSharpType.GetUnionCases typeof<Collective> do
                    let fields = form.GetFields() |> Array.mapi (fun i _ -> box (i + 2))

                    match FSharpValue.MakeUnion(form, fields) with
                    | :? Collective as kind -> kind
                    | other -> failtest $"%O{other} is no collective"
            ]

            let values = String.Join(", ", kinds |> List.map CodeWriter.Kind)

            let text =
                $"using DeepSeekGraph; public static class K {{ public static readonly Collective[] All = [%s{values}]; }}"

            let context = AssemblyLoadContext("kinds", true)
            let assembly = context.LoadFromStream(new IO.MemoryStream(CodeCompiler.Compile text))
            let field = (nonNull (assembly.GetType "K")).GetField "All" |> nonNull

            match field.GetValue null with
            | :? (Collective[]) as written -> Expect.equal (List.ofArray written) kinds "read back"
            | other -> failtest $"%O{other} is no list of collectives"

            context.Unload())

        testCase "a source that does not compile is told as a bug" (fun () ->
            let e = Expect.throwsC (fun () -> CodeCompiler.Compile "class C { int x = y; }" |> ignore) id
            Expect.stringContains e.Message "CS0103" "the compiler's words")

        testCase "equal sources give equal assemblies" (fun () ->
            let text = List.head (sources plan)
            Expect.equal (CodeCompiler.Compile text) (CodeCompiler.Compile text) "bytes")
    ]

/// Everything a run leaves and shows: metrics, all slots that outlive a step, peaks, and what an observer saw.
let private outcome (plan: PlanSet) executor =
    task {
        use! trainer =
            Trainer.StartAsync(
                plan,
                TrainerOptions(Batches = Pattern(8, 0), LearningRate = LearningRate(0.05, 0.01), Executor = executor)
            )

        let run = trainer.RunAsync(3L, CancellationToken.None).GetAsyncEnumerator()
        let metrics = List<_>()

        while! run.MoveNextAsync() do
            metrics.Add(run.Current.Loss, run.Current.GradNorm)

        let seen = SortedDictionary<int, List<string * int * byte[]>>()

        for runner in trainer.Ranks do
            seen[runner.Rank.Rank] <- List()

        let tokens = torch.ones(4L, int64 (TinyPlan.seq + 1)).to_type torch.ScalarType.Int64
        let mask = torch.ones (4L, int64 TinyPlan.seq)

        let inputs =
            dict [ "tokens", tokens; "loss_mask", mask ] |> Dictionary :> IReadOnlyDictionary<string, torch.Tensor>

        do!
            trainer.ForwardBackwardAsync(
                [| inputs; inputs |],
                (fun runner value microbatch ->
                    seen[runner.Rank.Rank].Add((value.Info.Name, microbatch, value.Tensor.bytes.ToArray()))),
                CancellationToken.None
            )

        let states = [
            for runner in trainer.Ranks do
                for value in runner.Persistent do
                    value.Info.Name, value.Tensor.bytes.ToArray()
        ]

        let peaks = [ for runner in trainer.Ranks -> runner.Memory.Peak ]
        let seen = [ for KeyValue(rank, values) in seen -> rank, List.ofSeq values ]
        return List.ofSeq metrics, states, peaks, seen, trainer.CompiledStages, List.ofSeq trainer.Remarks
    }
    |> _.GetAwaiter().GetResult()

let private running =
    testCase "compiled and interpreted: same metrics, slots, peaks and observations, bit for bit" (fun () ->
        let metrics, states, peaks, seen, compiled, remarks = outcome plan Executor.Compiled
        let metrics', states', peaks', seen', interpreted, remarks' = outcome plan Executor.Interpreter
        Expect.equal metrics metrics' "metrics"
        Expect.equal states states' "slots"
        Expect.equal peaks peaks' "peaks"
        Expect.equal seen seen' "observations"
        Expect.isGreaterThan (seen |> List.sumBy (snd >> List.length)) 20 "something was observed"
        Expect.isLessThanOrEqual compiled 2 "a stage is compiled once for all its ranks"
        Expect.equal (interpreted, remarks, remarks') (0, [], []) "nothing to say")

[<MethodImpl(MethodImplOptions.NoInlining)>]
let private runOnce () = outcome plan Executor.Compiled |> ignore

let private contexts () =
    AssemblyLoadContext.All
    |> Seq.filter (fun c -> c.Name = "DeepSeekGraph generated code")
    |> Seq.length

let private unloading =
    testCase "generated code goes when its trainer is gone" (fun () ->
        runOnce ()

        let rec gone tries =
            GC.Collect()
            GC.WaitForPendingFinalizers()

            if contexts () > 0 && tries > 0 then
                Thread.Sleep 50
                gone (tries - 1)

        gone 100
        Expect.equal (contexts ()) 0 "load contexts")

let tests = testList "Code" [ writing; running; testSequenced unloading ]

/// Short runs end to end: what they write, that they repeat bit for bit, and that a signal ends them well.
module DeepSeekGraph.Cli.Tests.RunTests

open System
open System.Diagnostics
open System.IO
open System.Text.Json
open Expecto
open DeepSeekGraph.Testing
open DeepSeekGraph
open DeepSeekGraph.Runtime.Telemetry
open DeepSeekGraph.Cli.Tests

let private small = [ "--dtype"; "fp32"; "--seq-length"; "32"; "--global-batch"; "4" ]

let private metrics folder run = MetricsFile.Read(Path.Combine(folder, run, "metrics.jsonl"))

/// All that does not depend on the clock.
let private numbers (steps: StepMetrics seq) = [
    for s in steps -> s.Step, s.Loss, s.MtpLoss, s.Lr, s.GradNorm, s.Tokens
]

let private succeed folder arguments =
    let result = Dsg.run folder arguments
    Expect.equal (result.Code, result.Error) (0, "") $"dsg %A{arguments}: %s{result.Out}"
    result.Out

let tests =
    testList "Run" [
        test "8 ranks: metrics, plan and curve are written; the same seed and the plan file repeat it bit for bit" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let out = succeed folder ([ "pretrain"; "--steps"; "3"; "--data"; data ] @ small)
                let first = metrics folder "runs/0001"
                Expect.equal first.Count 3 "steps"
                Expect.isLessThan first[2].Loss first[0].Loss "loss falls"

                let line = File.ReadLines(Path.Combine(folder, "runs/0001/metrics.jsonl")) |> Seq.head

                use json = JsonDocument.Parse line

                Expect.sequenceEqual
                    [ for p in json.RootElement.EnumerateObject() -> p.Name ]
                    [
                        "step"
                        "loss"
                        "mtp_loss"
                        "balance_loss"
                        "lr"
                        "grad_norm"
                        "tokens"
                        "tokens_per_s"
                        "seconds"
                    ]
                    "keys"

                let png = File.ReadAllBytes(Path.Combine(folder, "runs/0001/loss.png"))
                Expect.sequenceEqual png[1..3] "PNG"B "curve"
                let plan = PlanFile.Read(Path.Combine(folder, "runs/0001/plan.txt"))

                Expect.equal
                    (plan.Mesh.Tensor, plan.Mesh.Pipeline, plan.Mesh.Data, plan.Mesh.Expert)
                    (2, 2, 2, 2)
                    "degrees"

                for text in
                    [
                        "TP 2 x CP 1 x DP 2 x PP 2; experts ETP 1 x EP 2 x EDP 2"
                        plan.Layout
                        "headroom  measured"
                        "show the plan, not speed"
                        "./dsg pretrain deepseek_v3_tiny --tp 1 --pp 1 --ep 1 --dp 1"
                        "loss first"
                        "tokens/s"
                    ] do
                    Expect.stringContains out text "report"

                succeed folder [
                    "run"
                    "runs/0001/plan.txt"
                    "--steps"
                    "3"
                    "--data"
                    data
                    "--out"
                    "again"
                ]
                |> ignore

                Expect.equal (numbers (metrics folder "again")) (numbers first) "run PLAN"

                succeed folder ([ "pretrain"; "--steps"; "3"; "--data"; data ] @ small) |> ignore

                Expect.equal (numbers (metrics folder "runs/0002")) (numbers first) "the same seed, the next folder"

                succeed folder ([ "compile"; "--out"; "made.txt" ] @ small) |> ignore

                Expect.equal
                    (File.ReadAllText(Path.Combine(folder, "made.txt")))
                    (File.ReadAllText(Path.Combine(folder, "runs/0001/plan.txt")))
                    "compile writes the plan that pretrain runs"

                Expect.stringContains (succeed folder [ "check"; "made.txt" ]) "8 ranks holds" "check"

                Expect.stringContains
                    (succeed folder [ "show"; "made.txt" ])
                    "rows_to_experts"
                    "show: experts exchange rows")
        }

        test "--trace records one step of every rank, by default the 5th or the last, and says what was hidden" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let two = [ "--tp"; "1"; "--pp"; "1"; "--ep"; "2"; "--dp"; "2" ]
                let job steps = [ "pretrain"; "--steps"; string<int> steps; "--data"; data ] @ two @ small
                let ranks = [ "rank-0.json"; "rank-1.json" ]

                let check out trace step =
                    Expect.sequenceEqual
                        (Directory.GetFiles(Path.Combine(folder, trace)) |> Seq.map Path.GetFileName |> Seq.sort)
                        ranks
                        "files"

                    for rank, name in List.indexed ranks do
                        use json = JsonDocument.Parse(File.ReadAllBytes(Path.Combine(folder, trace, name)))
                        let data = json.RootElement.GetProperty "otherData"
                        let number (name: string) = data.GetProperty(name).GetInt32()
                        Expect.equal (number "rank", number "step") (rank, step) "of this step"
                        let overlap = data.GetProperty "overlap"
                        let value (name: string) = overlap.GetProperty(name).GetDouble()
                        let communication, share = value "communication_ms", 100.0 * value "hidden_share"
                        let compute, whole = value "compute_ms", value "step_ms"

                        Expect.stringContains
                            out
                            ($"trace: rank %i{rank}: communication %.1f{communication} ms, %.1f{share} %% hidden; "
                             + $"compute %.1f{compute} ms of %.1f{whole} ms; ")
                            "said"

                        Expect.stringContains out $"; %s{trace}/%s{name}" "where"

                    Expect.stringContains out "  exposed: " "collectives"

                let out = succeed folder (job 6 @ [ "--trace"; "five" ])
                check out "five" 5
                let lines = out.Split '\n'
                let at (start: string) = Array.FindIndex(lines, fun line -> line.StartsWith start)

                Expect.isTrue
                    (at "step 5/6" < at "trace: rank 0" && at "trace: rank 0" < at "step 6/6")
                    "behind its step"

                check (succeed folder (job 2 @ [ "--trace"; "last" ])) "last" 2

                // a run that goes on counts from where it starts; its processes write for themselves
                succeed folder (job 2 @ [ "--save-interval"; "2"; "--out"; "saved" ]) |> ignore

                let out =
                    succeed
                        folder
                        ([ "launch"; "--nproc"; "2"; "--" ]
                         @ job 5
                         @ [ "--resume"; "saved"; "--trace"; "on"; "--trace-step"; "2" ])

                check out "on" 4)
        }

        test "one rank says how to get eight" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder

                let out =
                    succeed
                        folder
                        ([ "pretrain"; "--steps"; "2"; "--tp"; "1"; "--data"; data; "--out"; "one" ] @ small)

                Expect.stringContains out "TP 1 x CP 1 x DP 1 x PP 1" "degrees"
                Expect.equal (metrics folder "one").Count 2 "steps")
        }

        test "both executors give the same bits; the C# of a plan is written for reading, into an empty folder only" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let small = [ "--tp"; "1"; "--pp"; "2"; "--layout"; "Ettt|tmL" ] @ small
                let compiled = succeed folder ([ "compile"; "--out"; "p.txt"; "--emit-csharp"; "code" ] @ small)
                Expect.stringContains compiled "its C# is in code" "said"

                Expect.sequenceEqual
                    (Directory.GetFiles(Path.Combine(folder, "code")) |> Array.map Path.GetFileName |> Array.sort)
                    [ "Stage0.cs"; "Stage1.cs" ]
                    "a file a stage"

                let source = File.ReadAllText(Path.Combine(folder, "code", "Stage0.cs"))
                Expect.stringContains source "RmsNorm(new(" "kernels by name"

                let again = Dsg.run folder ([ "compile"; "--out"; "q.txt"; "--emit-csharp"; "code" ] @ small)
                Expect.equal again.Code 1 "exit code"
                Expect.stringContains again.Error "error DSG0815: the output folder 'code' is not empty" "refused"
                Expect.isFalse (File.Exists(Path.Combine(folder, "q.txt"))) "before the work"

                for executor in [ "compiled"; "interpreter" ] do
                    succeed folder [
                        "run"
                        "p.txt"
                        "--steps"
                        "2"
                        "--data"
                        data
                        "--executor"
                        executor
                        "--out"
                        executor
                    ]
                    |> ignore

                Expect.equal
                    (numbers (metrics folder "compiled"))
                    (numbers (metrics folder "interpreter"))
                    "losses and norms")
        }

        test "a cache folder that others may use is said once, and the plan still runs" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let shared = Directory.CreateDirectory(Path.Combine(folder, "shared"))
                File.SetUnixFileMode(shared.FullName, enum<UnixFileMode> 0o777)
                let info = Dsg.run folder ([ "compile"; "--tp"; "1"; "--out"; "p.txt" ] @ small)
                Expect.equal info.Code 0 "compiled"

                let result =
                    Dsg.runWith folder [ "DSG_CACHE", shared.FullName ] [
                        "run"
                        "p.txt"
                        "--steps"
                        "1"
                        "--data"
                        data
                    ]

                Expect.equal (result.Code, result.Error) (0, "") "runs"

                Expect.equal (result.Out.Split("other users may use it").Length - 1) 1 $"said once: %s{result.Out}"

                Expect.isEmpty (shared.GetFiles()) "nothing kept")
        }

        test "a tokenizer of Hugging Face, and a vocabulary that must hold it" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                SampleTokenizer.writeTo folder SampleTokenizer.json SampleTokenizer.config

                let run =
                    [
                        "pretrain"
                        "--tp"
                        "1"
                        "--steps"
                        "2"
                        "--data"
                        data
                        "--tokenizer"
                        "tokenizer.json"
                    ]
                    @ small

                let refused = Dsg.run folder run
                Expect.equal refused.Code 1 "exit code"
                Expect.stringContains refused.Error "error DSG0835" "256 ids are too few"
                let ids = SampleTokenizer.vocabulary.Count
                Expect.stringContains refused.Error $"has %d{ids} ids, the model's vocabulary 256" "both values"
                Expect.isFalse (Directory.Exists(Path.Combine(folder, "runs"))) "nothing written"
                let out = succeed folder (run @ [ "--set"; "model.vocab_size=384" ])
                Expect.stringContains out "by tokenizer.json" "tokens")
        }

        test "a plan that was tampered with is refused" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder

                succeed folder ([ "compile"; "--tp"; "1"; "--out"; "plan.txt" ] @ small) |> ignore

                let path = Path.Combine(folder, "plan.txt")
                let lines = File.ReadAllLines path
                File.WriteAllLines(path, [ for l in lines -> l.Replace("seq_length 32", "seq_length 31") ])
                let result = Dsg.run folder [ "run"; "plan.txt"; "--data"; data ]
                Expect.equal result.Code 1 "exit code"
                Expect.stringContains result.Error "error DSG0603" "its hash does not fit"

                // without its hash line a plan is taken as it is, and checked
                let isHash (l: string) = l.StartsWith("sha256", StringComparison.Ordinal)
                let isFree (l: string) = l.TrimStart().StartsWith("free", StringComparison.Ordinal)
                let first = lines |> Array.findIndex isFree
                File.WriteAllLines(path, lines |> Array.removeAt first |> Array.filter (isHash >> not))
                let result = Dsg.run folder [ "run"; "plan.txt"; "--data"; data ]
                Expect.equal result.Code 1 "exit code"
                Expect.stringContains result.Error "error DSG0605" "a slot is never freed"
                Expect.isFalse (Directory.Exists(Path.Combine(folder, "runs"))) "nothing written")
        }

        test "the plan of 671B on 1024 ranks compiles and holds" {
            Dsg.inFolder (fun folder ->
                let out = succeed folder [ "compile"; "deepseek_v3_pretrain"; "--out"; "v3.txt" ]
                Expect.stringContains out "1024 in 16 stages" "ranks"
                Expect.stringContains out "682,636,487,424" "parameters, with MTP")
        }

        test "Ctrl-C ends a run within two seconds with table, curve and a hint" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder

                let child = Dsg.start folder Dsg.program ([ "pretrain"; "--steps"; "5000"; "--data"; data ] @ small)

                let mutable line = child.StandardOutput.ReadLine()

                while not (isNull line) && not ((nonNull line).StartsWith("step", StringComparison.Ordinal)) do
                    line <- child.StandardOutput.ReadLine()

                let begin' = Stopwatch.GetTimestamp()
                Dsg.interrupt child
                let result = Dsg.finish child
                let seconds = Stopwatch.GetElapsedTime(begin').TotalSeconds
                Expect.equal (result.Code, result.Error) (130, "") "exit code of SIGINT"
                Expect.stringContains result.Out "stopped by a signal" "table"
                Expect.stringContains result.Out "what to try next" "hint"
                Expect.isTrue (File.Exists(Path.Combine(folder, "runs/0001/loss.png"))) "curve"

                // a machine that runs other work at the same time tells nothing about the limit
                let load = float ((File.ReadAllText "/proc/loadavg").Split(' ')[0])

                if seconds >= 2.0 && load > 2.0 * float Environment.ProcessorCount then
                    skiptest $"took %.1f{seconds} s under a load of %.1f{load}"

                Expect.isLessThan seconds 2.0 "seconds")
        }
    ]

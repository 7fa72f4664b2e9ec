/// Checkpoints end to end: kill -9 at random moments of a save, a full disk, and runs that go on where another one stopped.
module DeepSeekGraph.Cli.Tests.CheckpointTests

open System
open System.Diagnostics
open System.IO
open System.Text.RegularExpressions
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Checkpoints
open DeepSeekGraph.Runtime.Telemetry
open DeepSeekGraph.Cli.Tests

let private small = [
    "--dtype"
    "fp32"
    "--seq-length"
    "16"
    "--global-batch"
    "4"
    "--executor"
    "interpreter"
]

let private one = [ "--tp"; "1"; "--set"; "model.num_hidden_layers=2" ]

let private succeed folder arguments =
    let result = Dsg.run folder arguments
    Expect.equal (result.Code, result.Error) (0, "") $"dsg %A{arguments}: %s{result.Out}"
    result.Out

let private losses folder run = [
    for step in MetricsFile.Read(Path.Combine(folder, run, "metrics.jsonl")) ->
        step.Step, step.Loss, step.MtpLoss, step.Lr
]

/// A save that is under way, or that was killed.
let private half (root: string) =
    Directory.Exists root
    && Directory.EnumerateDirectories root
       |> Seq.exists (fun f -> f.EndsWith(".tmp", StringComparison.Ordinal))

let private kills =
    match Int32.TryParse(Environment.GetEnvironmentVariable "DSG_KILLS") with
    | true, count when count > 0 -> count
    | _ -> 8

/// Waits until a condition holds; false where the process ends before.
let private waitFor (child: Process) (condition: unit -> bool) =
    let mutable met = condition ()

    while not met && not child.HasExited do
        Threading.Thread.Sleep(TimeSpan.FromMilliseconds 0.1)
        met <- condition ()

    met

let private latest root =
    let file = Path.Combine(root, "latest")
    if File.Exists file then File.ReadAllText(file).Trim() else ""

let private killed =
    testCase
        $"kill -9 at %d{kills} random moments of a save: latest is whole each time, and the next run goes on from it"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let data = Dsg.writeText folder
            let root = Path.Combine(folder, "saved")
            let random = Random 1

            let arguments i = [
                "pretrain"
                "--steps"
                "1000000"
                "--data"
                data
                "--save-interval"
                "1"
                "--keep"
                "2"
                "--save"
                (if i % 2 = 0 then "sync" else "background")
                "--set"
                $"training.save=%s{root}"
                "--out"
                $"run%d{i}"
                yield! one
                yield! small

                if i > 0 then
                    yield! [ "--resume"; root ]
            ]

            let mutable inside = 0
            let mutable step = 0L

            for i in 0 .. kills - 1 do
                let named = latest root
                let child = Dsg.start folder Dsg.program (arguments i)
                let mutable line = child.StandardOutput.ReadLine()

                while not (isNull line) && not ((nonNull line).StartsWith("step", StringComparison.Ordinal)) do
                    let resumed = Regex.Match(nonNull line, @"^resumed: .*/(iter_\d+), step (\d+),")

                    if resumed.Success then
                        Expect.equal resumed.Groups[1].Value named $"kill %d{i}: goes on from latest"
                        step <- int64 resumed.Groups[2].Value

                    line <- child.StandardOutput.ReadLine()

                if isNull line then
                    failtest $"kill %d{i}: the run ended: %s{child.StandardError.ReadToEnd()}"

                // the first save of all must come to its end, so that there is something to go on from
                let begun () = half root && (i > 0 || latest root <> "")
                Expect.isTrue (waitFor child begun) $"kill %d{i}: a save begins"
                let milliseconds = Math.Exp(Math.Log 0.05 + random.NextDouble() * Math.Log(300.0 / 0.05))
                Threading.Thread.Sleep(TimeSpan.FromMilliseconds milliseconds)
                child.Kill()
                child.WaitForExit()
                child.Dispose()

                if half root then
                    inside <- inside + 1

                // every file of it is read and its checksum compared
                use whole = CheckpointReader.Open root
                Expect.isGreaterThanOrEqual whole.Manifest.Step step $"kill %d{i}: nothing is lost"

            if kills > 8 then
                printfn
                    $"%d{kills} kills, %d{inside} of them left a half-written folder; the last step is %s{latest root}"

            Expect.isGreaterThan inside (kills / 4) "kills in the middle of a save"
            Expect.isFalse (half root) "what they left is taken away")

let private shell folder (script: string) =
    let info =
        ProcessStartInfo(
            "sh",
            [ "-c"; script ],
            WorkingDirectory = folder,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            RedirectStandardInput = true
        )

    info.Environment["NO_COLOR"] <- "1"
    Dsg.finish (nonNull (Process.Start info))

let private quoted (arguments: string list) = arguments |> List.map (fun a -> $"'%s{a}'") |> String.concat " "

/// A shell whose programs cannot write files beyond so many 512-byte blocks.
let private limited folder (blocks: int) (arguments: string list) =
    shell
        folder
        $"trap '' XFSZ; ulimit -f %d{blocks}; DOTNET_EnableWriteXorExecute=0 exec dotnet '%s{Dsg.program}' %s{quoted arguments}"

/// Can this user mount a small disk for a shell of its own?
let private mounts =
    lazy (Dsg.inFolder (fun folder -> (shell folder "unshare -rm mount -t tmpfs -o size=1m none .").Code = 0))

let private onSmallDisk (name: string) (megabytes: int) (test: (string -> Dsg.Result) -> string -> unit) =
    if mounts.Value then
        testCase name
        <| fun () ->
            Dsg.inFolder (fun folder ->
                let run script =
                    shell
                        folder
                        $"unshare -rm sh -ec 'mkdir disk; mount -t tmpfs -o size=%d{megabytes}m none disk; %s{script}'"

                test run folder)
    else
        ptestCase $"%s{name} (needs unshare -rm)" ignore

let tests =
    testList "Checkpoint" [
        test "8 ranks: a run that is cut and resumed gives the losses of one that is not, and saves the same bytes" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let run = [ "pretrain"; "--data"; data; "--save-interval"; "2" ] @ small
                succeed folder (run @ [ "--steps"; "5"; "--out"; "a" ]) |> ignore

                let checkpoints = Path.Combine(folder, "a", "checkpoints")
                Expect.sequenceEqual (CheckpointRoot.Steps checkpoints) [ 2L; 4L; 5L ] "every second and the last"

                let out =
                    succeed folder (run @ [ "--resume"; "a/checkpoints/iter_0000002"; "--out"; "b"; "--save"; "sync" ])

                Expect.stringContains out "resumed: a/checkpoints/iter_0000002, step 2, behind 8 sequences" "said"
                Expect.stringContains out "2 in b/checkpoints, the last of step 5" "report"
                Expect.equal (losses folder "b") (losses folder "a" |> List.skip 2) "losses and rates"

                for file in Directory.GetFiles(Path.Combine(checkpoints, "iter_0000005")) do
                    let other = Path.Combine(folder, "b/checkpoints/iter_0000005", nonNull (Path.GetFileName file))
                    Expect.isTrue (File.ReadAllBytes file = File.ReadAllBytes other) $"the same bytes: %s{other}"

                // the last checkpoint of a run's folder, on one rank, with other data and longer sequences
                let other = Path.Combine(folder, "other.txt")
                File.WriteAllText(other, String.replicate 100 "text that the first run has not read. ")

                let more =
                    succeed folder [
                        "pretrain"
                        "--resume"
                        "a"
                        "--tp"
                        "1"
                        "--steps"
                        "6"
                        "--seq-length"
                        "32"
                        "--data"
                        other
                        "--executor"
                        "interpreter"
                    ]

                Expect.stringContains more "TP 1 x PP 1" "one rank"
                Expect.stringContains more "step 5, behind 10 sequences" "5 x 4 sequences of half the length"
                Expect.stringContains more "sequences of 32 tokens, the checkpoint's had 16" "longer"

                Expect.stringContains
                    more
                    "other data: 3,801 tokens by bytes of UTF-8, the checkpoint read"
                    "other data"

                let more =
                    succeed folder [
                        "run"
                        "b/plan.txt"
                        "--resume"
                        "a"
                        "--steps"
                        "6"
                        "--data"
                        data
                        "--seed"
                        "7"
                        "--executor"
                        "interpreter"
                    ]

                Expect.stringContains more "step 6/6" "one more step"
                Expect.stringContains more "seed 7, the checkpoint's is 1234" "another order")
        }

        test "Ctrl-C while checkpoints are saved: the save under way is finished, the last one is whole and resumed" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder

                let run = [ "pretrain"; "--data"; data; "--save-interval"; "1"; "--keep"; "3" ] @ one @ small
                let child = Dsg.start folder Dsg.program (run @ [ "--steps"; "5000"; "--out"; "a" ])
                let root = Path.Combine(folder, "a", "checkpoints")
                Expect.isTrue (waitFor child (fun () -> latest root > "iter_0000003" && half root)) "saves"
                Dsg.interrupt child
                let result = Dsg.finish child
                Expect.equal (result.Code, result.Error) (130, "") "exit code of SIGINT"
                Expect.stringContains result.Out "3 in a/checkpoints, the last of step" "report"
                Expect.stringContains result.Out "./dsg pretrain deepseek_v3_tiny --resume a" "how to go on"
                Expect.isFalse (half root) "nothing half"
                use whole = CheckpointReader.Open root
                let trained = (losses folder "a").Length
                Expect.equal whole.Manifest.Step (int64 trained) "the last step"
                let more = [ "--steps"; string (trained + 1); "--resume"; "a"; "--out"; "b" ]
                Expect.stringContains (succeed folder (run @ more)) $"step %d{trained + 1}/%d{trained + 1}" "goes on")
        }

        test "nothing left to train, and no checkpoint, are diagnostics before anything is written" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let run = [ "pretrain"; "--data"; data; "--steps"; "1" ] @ one @ small
                succeed folder (run @ [ "--save-interval"; "9"; "--out"; "a" ]) |> ignore
                let again = Dsg.run folder (run @ [ "--resume"; "a" ])
                Expect.equal again.Code 1 "exit code"

                Expect.stringContains
                    again.Error
                    "error DSG0848: the checkpoint is of step 1, the run has 1"
                    "none left"

                let other = Dsg.run folder (run @ [ "--resume"; "runs" ])
                Expect.stringContains other.Error "error DSG0840" "none there"
                let other = Dsg.run folder [ "pretrain"; "--tp"; "1"; "--data"; data; "--steps"; "2"; "--resume"; "a" ]
                Expect.equal other.Code 1 "exit code"
                Expect.stringContains other.Error "error DSG0844" "another model"
                Expect.isFalse (Directory.Exists(Path.Combine(folder, "runs"))) "nothing written"

                for option, value in [ "--save", "often"; "--keep", "0"; "--save-interval", "-1" ] do
                    let wrong = Dsg.run folder (run @ [ option; value ])
                    Expect.stringContains wrong.Error "error DSG0902" option)
        }

        test
            "files that cannot be written whole: a diagnostic for each save, the run goes on, the checkpoint before stays" {
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder
                let root = Path.Combine(folder, "saved")

                let run =
                    [
                        "pretrain"
                        "--data"
                        data
                        "--save-interval"
                        "1"
                        "--set"
                        $"training.save=%s{root}"
                    ]
                    @ one
                    @ small

                succeed folder (run @ [ "--steps"; "1"; "--out"; "a" ]) |> ignore

                for mode in [ "sync"; "background" ] do
                    let result =
                        limited folder 2000 (run @ [ "--steps"; "3"; "--resume"; root; "--out"; mode; "--save"; mode ])

                    Expect.equal result.Code 1 $"%s{mode}: exit code; %s{result.Error}"
                    let told = Regex.Matches(result.Error, "error DSG0816: the checkpoint cannot be written: ").Count
                    Expect.equal told 2 $"%s{mode}: two saves; %s{result.Error}"
                    Expect.stringContains result.Out "step 3/3" "it goes on"
                    Expect.stringContains result.Out "1 in saved, the last of step 1; 2 saves failed" "report"
                    Expect.equal (losses folder mode).Length 2 "steps"
                    Expect.isFalse (half root) "nothing is left of it"
                    use whole = CheckpointReader.Open root
                    Expect.equal whole.Manifest.Step 1L "the one before")
        }

        test "the README's commands on checkpoints do what they say" {
            let rec up (folder: DirectoryInfo) =
                if File.Exists(Path.Combine(folder.FullName, "DeepSeekGraph.sln")) then
                    folder.FullName
                else
                    up (nonNull folder.Parent)

            let readme = File.ReadAllText(Path.Combine(up (DirectoryInfo AppContext.BaseDirectory), "README.md"))
            let section = Regex.Match(readme, "\n## Checkpoints\n(.*?)\n## ", RegexOptions.Singleline).Groups[1].Value

            let commands = [
                for line in section.Split '\n' do
                    if line.StartsWith("    ./dsg ", StringComparison.Ordinal) then
                        line.Trim().Split(' ', StringSplitOptions.RemoveEmptyEntries) |> List.ofArray |> List.tail
            ]

            Expect.equal commands.Length 6 "commands"

            Dsg.inFolder (fun folder ->
                let out = commands |> List.map (succeed folder)

                Expect.stringContains
                    out[1]
                    "resumed: run/checkpoints/iter_0000010, step 10, behind 80 sequences"
                    "goes on"

                Expect.stringContains out[3] "cut for 4 ranks, in imported" "imports"

                // one rank goes on with the published form alike
                let text =
                    succeed folder [
                        "generate"
                        "--hf"
                        "published"
                        "--prompt"
                        "Returns"
                        "--max-new-tokens"
                        "100"
                    ]

                Expect.equal text out[4] "the text of the checkpoint on four ranks"
                Expect.isNonEmpty (text.Trim()) "a text"
                Expect.stringContains out[5] "weights only: moments of the optimizer start at zero" "starts from it"
                // the loss of the first step after the import is that of trained weights, not of new ones
                let first run =
                    let _, loss, _, _ = List.head (losses folder run)
                    loss

                Expect.isLessThan (first "again") (0.9 * first "run") "trained weights"

                let files =
                    Directory.GetFiles(Path.Combine(folder, "published")) |> Array.map Path.GetFileName |> Array.sort

                Expect.sequenceEqual
                    files
                    [
                        "config.json"
                        "generation_config.json"
                        "model.safetensors"
                        "tokenizer.json"
                        "tokenizer_config.json"
                    ]
                    "published form"

                let refused = Dsg.run folder [ "import"; "--hf"; "run"; "--out"; "x" ]
                Expect.stringContains refused.Error "error DSG07" "a run is no published checkpoint"
                let refused = Dsg.run folder [ "export"; "--checkpoint"; "run" ]
                Expect.stringContains refused.Error "error DSG0902: '--out DIR' is not given" "options")
        }

        onSmallDisk
            "a disk that has room for one checkpoint: the first is whole, the second is told, the first is resumed"
            14
        <| fun run folder ->
            let data = Dsg.writeText folder

            let dsg arguments =
                let arguments =
                    [
                        "pretrain"
                        "--data"
                        data
                        "--save-interval"
                        "1"
                        "--set"
                        "training.save=disk"
                    ]
                    @ arguments
                    @ one
                    @ small

                $"dotnet %s{Dsg.program} " + String.concat " " arguments

            let first = dsg [ "--steps"; "3"; "--out"; "a" ]
            let again = dsg [ "--steps"; "3"; "--resume"; "disk"; "--out"; "b" ]

            let result =
                run $"%s{first} || echo code $?; ls -a disk; cat disk/latest; %s{again} || echo code $?; ls disk"

            Expect.equal result.Code 0 $"script: %s{result.Error}"
            Expect.stringContains result.Error "error DSG0816: the checkpoint cannot be written: No space left" "told"
            Expect.stringContains result.Out "1 in disk, the last of step 1; 2 saves failed" "the first stays"
            Expect.stringContains result.Out "code 1" "exit code"
            Expect.stringContains result.Out "\niter_0000001\nlatest\niter_0000001\n" "nothing else is left"
            Expect.stringContains result.Out "resumed: disk/iter_0000001, step 1" "and is good"

        killed
    ]

/// Jobs of several processes end to end: the same bits as in one, and what happens when a process is killed.
module DeepSeekGraph.Cli.Tests.LaunchTests

open System
open System.Diagnostics
open System.IO
open System.Threading
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Checkpoints
open DeepSeekGraph.Runtime.Telemetry
open DeepSeekGraph.Cli.Tests

let private small data = [
    "--data"
    data
    "--dtype"
    "fp32"
    "--seq-length"
    "16"
    "--global-batch"
    "4"
    "--executor"
    "interpreter"
    "--set"
    "model.num_hidden_layers=2"
]

let private pair = [ "--tp"; "2"; "--pp"; "1"; "--ep"; "1"; "--dp"; "1" ]

/// Four ranks that send rows of experts, shards of sequences, activations and gradients.
let private four = [ "--tp"; "2"; "--pp"; "2"; "--ep"; "2"; "--dp"; "1" ]

let private launch ranks = [ "launch"; "--nproc"; string<int> ranks ]

let private numbers folder run = [
    for step in MetricsFile.Read(Path.Combine(folder, run, "metrics.jsonl")) ->
        step.Step, step.Loss, step.MtpLoss, step.BalanceLoss, step.GradNorm, step.Lr
]

let private succeed folder arguments =
    let result = Dsg.run folder arguments
    Expect.equal (result.Code, result.Error) (0, "") $"dsg %A{arguments}: %s{result.Out}"
    result.Out

let private files (root: string) = [
    for file in Directory.GetFiles(root, "*", SearchOption.AllDirectories) |> Array.sort do
        if Path.GetFileName file <> ".lock" then
            Path.GetRelativePath(root, file),
            Convert.ToHexString(Security.Cryptography.SHA256.HashData(File.ReadAllBytes file))
]

let private sameBits =
    testCase "four processes train, save and resume with the bits of one process; only rank 0 speaks"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let text = small (Dsg.writeText folder)

            let job (steps: string) = [
                "pretrain"
                "--steps"
                steps
                "--save-interval"
                "2"
                yield! four
                yield! text
            ]

            succeed folder (job "3" @ [ "--out"; "one" ]) |> ignore
            let said = succeed folder (launch 4 @ job "3" @ [ "--out"; "four" ])

            Expect.all
                (said.TrimEnd().Split '\n')
                (fun line -> line.StartsWith("[0] ", StringComparison.Ordinal))
                "rank 0"

            Expect.equal (numbers folder "four") (numbers folder "one") "metrics"
            let saved run = Path.Combine(folder, run, "checkpoints")
            Expect.equal (files (saved "four")) (files (saved "one")) "checkpoints, byte for byte"

            let more = job "5" @ [ "--resume"; "four" ]
            succeed folder (more @ [ "--out"; "one2" ]) |> ignore
            succeed folder (launch 4 @ "--" :: more @ [ "--save"; "sync"; "--out"; "four2" ]) |> ignore
            Expect.equal (numbers folder "four2") (numbers folder "one2") "resumed")

/// A port of this machine that nobody listens on.
let private freePort () =
    use listener = new Net.Sockets.TcpListener(Net.IPAddress.Loopback, 0)
    listener.Start()
    (listener.LocalEndpoint :?> Net.IPEndPoint).Port

/// The process id of a rank of a launcher.
let private pidOf (launcher: Process) (rank: int) =
    Directory.GetDirectories "/proc"
    |> Array.tryPick (fun folder ->
        try
            let stat = File.ReadAllText(Path.Combine(folder, "stat"))
            // pid (name) state parent
            let fields = stat.Substring(stat.LastIndexOf ')').Split ' '
            let variables = File.ReadAllText(Path.Combine(folder, "environ")).Split '\000'

            if fields[2] = string<int> launcher.Id && Array.contains $"RANK=%d{rank}" variables then
                Some(int (Path.GetFileName folder))
            else
                None
        with
        | :? IOException
        | :? UnauthorizedAccessException
        | :? IndexOutOfRangeException -> None)

let private waitUntil what (condition: unit -> bool) =
    let watch = Stopwatch.StartNew()

    while not (condition ()) do
        if watch.Elapsed > TimeSpan.FromSeconds 60.0 then
            failtest $"%s{what} did not happen within a minute"

        Thread.Sleep 5

let private has (text: string) (file: string) =
    try
        use reader = new StreamReader(new FileStream(file, FileMode.Open, FileAccess.Read, FileShare.ReadWrite))
        reader.ReadToEnd().Contains(text, StringComparison.Ordinal)
    with :? IOException ->
        false

let private killed =
    let rank, ranks = 2, 4

    testCase
        $"kill -9 of rank %d{rank} ends all within 30 s, names it and who waits for it, and leaves nothing half-written"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let job = [
                "pretrain"
                "--steps"
                "1000000"
                "--save-interval"
                "5"
                yield! four
                yield! small (Dsg.writeText folder)
            ]

            let launcher = Dsg.start folder Dsg.program (launch ranks @ job @ [ "--out"; "run" ])
            let metrics = Path.Combine(folder, "run", "metrics.jsonl")
            waitUntil "step 12" (fun () -> has "\"step\":12," metrics || launcher.HasExited)
            let pids = Array.init ranks (pidOf launcher >> Option.get)
            let watch = Stopwatch.StartNew()
            Process.GetProcessById(pids[rank]).Kill()
            let result = Dsg.finish launcher
            Expect.isLessThan watch.Elapsed.TotalSeconds 30.0 "time"
            Expect.equal result.Code 137 result.Error
            Expect.stringContains result.Error $"error DSG0865: rank %d{rank} is gone" "names the rank"
            Expect.isMatch result.Error @"rank \d (waits for it|was) at (the end of )?step \d+" "who waits, and where"
            Expect.stringContains result.Error $"launch: rank %d{rank} was ended by signal 9" "the launcher too"

            for pid in pids do
                Expect.isFalse (Directory.Exists $"/proc/%d{pid}") "no orphan"

            // what a save that was under way has left goes when the next process looks
            let root = Path.Combine(folder, "run", "checkpoints")
            use checkpoint = CheckpointReader.Open root
            Expect.isGreaterThanOrEqual checkpoint.Manifest.Step 5L "a whole checkpoint"
            Expect.isEmpty (Directory.GetDirectories(root, "*.tmp*")) "no half-written file")

let private restarted =
    testCase
        "with --max-restarts 1 a job whose rank 0 is killed goes on from its newest checkpoint, and ends with the same losses"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let job = [
                "pretrain"
                "--steps"
                "40"
                "--save-interval"
                "4"
                yield! pair
                yield! small (Dsg.writeText folder)
            ]

            succeed folder (job @ [ "--out"; "whole" ]) |> ignore

            let launcher =
                Dsg.start folder Dsg.program (launch 2 @ [ "--max-restarts"; "1" ] @ job @ [ "--out"; "run" ])

            let metrics = Path.Combine(folder, "run", "metrics.jsonl")
            waitUntil "step 10" (fun () -> has "\"step\":10," metrics || launcher.HasExited)
            Process.GetProcessById((pidOf launcher 0).Value).Kill()
            let result = Dsg.finish launcher
            Expect.equal result.Code 0 result.Error
            Expect.stringContains result.Error "error DSG0865: rank 0 is gone" "the fault"
            Expect.stringContains result.Error "launch: starting again (1 of 1)" "the restart"
            Expect.stringContains result.Out "[0] resumed: " "from a checkpoint"
            Expect.equal (numbers folder "run") (numbers folder "whole") "every step once, with the same numbers")

let private nodes =
    testCase "two launchers, as on two nodes, run one job"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let port = freePort ()

            let node rank =
                Dsg.start folder Dsg.program [
                    yield! launch 1
                    "--nnodes"
                    "2"
                    "--node-rank"
                    string<int> rank
                    "--master-addr"
                    "127.0.0.1"
                    "--master-port"
                    string<int> port
                    "pretrain"
                    "--steps"
                    "2"
                    yield! pair
                    yield! small (Path.Combine(folder, "text.txt"))
                    "--out"
                    "run"
                ]

            Dsg.writeText folder |> ignore
            let results = [ node 0; node 1 ] |> List.map Dsg.finish
            Expect.equal (results |> List.map (fun r -> r.Code, r.Error)) [ 0, ""; 0, "" ] "both end well"
            Expect.equal (List.length (numbers folder "run")) 2 "steps"
            Expect.equal results[1].Out "" "rank 1 is silent")

let private stopped =
    testCase "a signal to the launcher stops all ranks; what they have is the result"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let job = [
                "pretrain"
                "--steps"
                "1000000"
                yield! pair
                yield! small (Dsg.writeText folder)
            ]

            let launcher = Dsg.start folder Dsg.program (launch 2 @ job @ [ "--out"; "run" ])

            waitUntil "step 2" (fun () ->
                has "\"step\":2," (Path.Combine(folder, "run", "metrics.jsonl")) || launcher.HasExited)

            Dsg.interrupt launcher
            let result = Dsg.finish launcher
            Expect.equal (result.Code, result.Error) (130, "") result.Out
            Expect.stringContains result.Out "stopped by a signal" "says so")

/// Two processes with torchrun's variables, each with arguments of its own.
let private two folder (arguments: int -> string list) =
    let port = freePort ()

    Array.Parallel.map
        (fun rank ->
            Dsg.runWith
                folder
                [
                    "RANK", string rank
                    "WORLD_SIZE", "2"
                    "MASTER_ADDR", "127.0.0.1"
                    "MASTER_PORT", string port
                ]
                (arguments rank))
        [| 0; 1 |]

let private refused =
    testList "refused" [
        testCase "another plan: one diagnostic, of rank 0, names the rank and both hashes"
        <| fun () ->
            Dsg.inFolder (fun folder ->
                let data = Dsg.writeText folder

                let results =
                    two folder (fun rank -> [
                        "pretrain"
                        "--tp"
                        "2"
                        "--pp"
                        "1"
                        "--ep"
                        "1"
                        "--dp"
                        "1"
                        "--steps"
                        "2"
                        yield! small data
                        "--set"
                        $"model.rms_norm_eps=1e-%d{5 + rank}"
                        "--out"
                        "run"
                    ])

                Expect.equal (results |> Array.map _.Code) [| 1; 1 |] "exit codes"
                Expect.equal results[1].Error "" "rank 1 is silent"

                Expect.isMatch
                    results[0].Error
                    @"^error DSG0862: rank 1 has the plan [0-9a-f]{64}, rank 0 has [0-9a-f]{64}\n"
                    "both"

                Expect.isFalse (Directory.Exists(Path.Combine(folder, "run"))) "nothing is written")

        testCase "another number of processes than ranks"
        <| fun () ->
            Dsg.inFolder (fun folder ->
                let result =
                    Dsg.run
                        folder
                        (launch 2 @ [ "pretrain"; "--steps"; "1"; yield! four; yield! small (Dsg.writeText folder) ])

                Expect.equal result.Code 1 result.Out

                Expect.stringContains
                    result.Error
                    "[0] error DSG0861: the job has 2 processes, the plan 4 ranks"
                    "both"

                Expect.equal (result.Error.Split("error DSG").Length - 1) 1 result.Error)

        testCase "what runs in one process, variables that make no sense, and commands that cannot be launched"
        <| fun () ->
            Dsg.inFolder (fun folder ->
                for variables, arguments, code in
                    [
                        [ "RANK", "0"; "WORLD_SIZE", "2"; "MASTER_ADDR", "a"; "MASTER_PORT", "1" ],
                        [ "verify"; "--hf"; "x" ],
                        Codes.OneProcessOnly
                        [ "RANK", "2"; "WORLD_SIZE", "2"; "MASTER_ADDR", "a"; "MASTER_PORT", "1" ],
                        [ "pretrain" ],
                        Codes.LaunchEnvironment
                        [], [ "launch"; "--nproc"; "2"; "show"; "x" ], Codes.OptionValue
                        [], [ "launch"; "--nproc"; "2" ], Codes.OptionValue
                        [], [ "launch"; "pretrain" ], Codes.OptionValue
                    ] do
                    let result = Dsg.runWith folder variables arguments
                    Expect.equal result.Code 1 result.Out
                    Expect.stringContains result.Error $"error %s{code}" (String.concat " " arguments))
    ]

/// A program on the PATH, or where Debian has daemons.
let private programOf name =
    let path = Environment.GetEnvironmentVariable "PATH" |> Option.ofObj |> Option.defaultValue ""

    (path + ":/usr/sbin").Split ':'
    |> Array.map (fun folder -> Path.Combine(folder, name))
    |> Array.tryFind File.Exists

/// All eight ranks of the default job, whose sums MPI makes in an order of its own.
let private overMpi (mpirun: string) =
    Dsg.inFolder (fun folder ->
        let job = [
            "pretrain"
            "--steps"
            "3"
            "--seq-length"
            "16"
            "--dtype"
            "fp32"
            "--executor"
            "interpreter"
            "--data"
            Dsg.writeText folder
        ]

        succeed folder (job @ [ "--out"; "threads" ]) |> ignore

        let info =
            ProcessStartInfo(
                mpirun,
                [ "--allow-run-as-root"; "--oversubscribe"; "-n"; "8"; "dotnet"; Dsg.program ]
                @ job
                @ [ "--out"; "mpi" ],
                WorkingDirectory = folder,
                RedirectStandardOutput = true,
                RedirectStandardError = true,
                RedirectStandardInput = true
            )

        let result = Process.Start info |> nonNull |> Dsg.finish
        Expect.equal result.Code 0 result.Error
        Expect.stringContains result.Out "8 processes of one rank each, collectives over MPI" "what it says"

        for (step, loss, mtp, _, norm, _), (step', loss', mtp', _, norm', _) in
            List.zip (numbers folder "mpi") (numbers folder "threads") do
            Expect.equal step step' "step"

            let near a b what =
                Expect.isLessThan (abs (a - b) / abs b) 2e-5 $"step %d{step}, %s{what}: %g{a} and %g{b}"

            near loss loss' "loss"
            near mtp.Value mtp'.Value "MTP loss"
            near norm norm' "gradient norm")

let private mpi =
    match programOf "mpirun" with
    | Some path -> testCase "mpirun -n 8 trains the default job as threads do, to rounding" (fun () -> overMpi path)
    | None -> ptestCase "mpirun -n 8 trains the default job as threads do, to rounding (needs Open MPI)" ignore

let private slurm =
    let name = "Slurm with four pretend nodes: a job trains, is cancelled, resumes, and one is submitted"

    let needed = [ "srun"; "slurmctld"; "slurmd"; "munged" ]

    if Environment.UserName = "root" && List.forall (programOf >> Option.isSome) needed then
        testCase name (fun () ->
            let script = Path.Combine(Dsg.root, "tests", "cluster", "slurm.sh")

            let info =
                ProcessStartInfo(
                    "sh",
                    [ script; $"dotnet %s{Dsg.program}" ],
                    RedirectStandardOutput = true,
                    RedirectStandardError = true,
                    RedirectStandardInput = true
                )

            let result = Process.Start info |> nonNull |> Dsg.finish
            Expect.equal result.Code 0 (result.Out + result.Error)
            Expect.stringEnds (result.Out.TrimEnd()) "slurm: ok" result.Out)
    else
        ptestCase $"%s{name} (needs slurm-wlm, munge and root)" ignore

let tests = testList "Launch" [ sameBits; killed; restarted; nodes; stopped; refused; mpi; slurm ]

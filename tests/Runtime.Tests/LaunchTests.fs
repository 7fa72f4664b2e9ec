/// Jobs of several processes: how they are launched, agree, and end; what strangers and damaged messages can do.
module DeepSeekGraph.Runtime.Tests.LaunchTests

open System
open System.Collections.Generic
open System.IO
open System.Net
open System.Net.Sockets
open System.Text
open System.Threading
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Collectives
open DeepSeekGraph.Runtime.Launch
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Tests.Slots
open DeepSeekGraph.Runtime.Tests.CollectiveTests

let private variables (text: string) =
    let all =
        text.Split(' ', StringSplitOptions.RemoveEmptyEntries)
        |> Array.map (fun pair ->
            let at = pair.IndexOf '='
            KeyValuePair(pair[.. at - 1], pair[at + 1 ..]))
        |> Dictionary

    Func<string, string | null>(fun name ->
        match all.TryGetValue name with
        | true, value -> value
        | _ -> null)

let private detected (text: string) =
    let l = LaunchEnvironment.Of(variables text)
    l.Form, l.Rank, l.WorldSize, l.LocalRank, l.LocalSize, l.MasterAddress, l.MasterPort

let private torchrun = "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=29500"

let private ompi =
    "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2"

let private slurm =
    "SLURM_JOB_ID=7 SLURM_STEP_ID=1 SLURM_PROCID=2 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=4 SLURM_STEP_NODELIST=n[0-3] SLURM_STEP_TASKS_PER_NODE=1(x4)"

let private environments =
    testList "environments" [
        for name, text, expected in
            [
                "nothing", "", (LaunchForm.InProcess, 0, 1, 0, 1, "", 0)
                "an empty RANK is none", "RANK= HOME=h", (LaunchForm.InProcess, 0, 1, 0, 1, "", 0)
                "a stray WORLD_SIZE is none", "WORLD_SIZE=8", (LaunchForm.InProcess, 0, 1, 0, 1, "", 0)
                "torchrun", torchrun, (LaunchForm.Torchrun, 3, 4, 1, 2, "a", 29500)
                "torchrun in a step of Slurm", $"%s{torchrun} %s{slurm}", (LaunchForm.Torchrun, 3, 4, 1, 2, "a", 29500)
                "torchrun of several nodes under mpirun",
                $"%s{torchrun} TORCHELASTIC_RUN_ID=x %s{ompi}",
                (LaunchForm.Torchrun, 3, 4, 1, 2, "a", 29500)
                "mpirun", ompi, (LaunchForm.Mpi, 1, 2, 1, 2, "", 0)
                "mpirun in a batch script of Slurm",
                $"%s{ompi} SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4",
                (LaunchForm.Mpi, 1, 2, 1, 2, "", 0)
                "the same values twice",
                $"RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1 %s{ompi}",
                (LaunchForm.Torchrun, 1, 2, 0, 1, "a", 1)
                "srun", slurm, (LaunchForm.Slurm, 2, 4, 0, 1, "n0", 20449)
                "srun with an address", $"%s{slurm} MASTER_ADDR=b", (LaunchForm.Slurm, 2, 4, 0, 1, "b", 20449)
                "a batch script of Slurm",
                "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=4",
                (LaunchForm.InProcess, 0, 1, 0, 1, "", 0)
                "a shell in an allocation",
                slurm.Replace("TASKS=4", "TASKS=1"),
                (LaunchForm.InProcess, 0, 1, 0, 1, "", 0)
            ] do
            testCase name (fun () -> Expect.equal (detected text) expected text)

        for name, text, at in
            [
                "a rank without a size", "RANK=0 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE"
                "no address", "RANK=0 WORLD_SIZE=1 MASTER_PORT=1", "MASTER_ADDR"
                "no port", "RANK=0 WORLD_SIZE=1 MASTER_ADDR=a", "MASTER_PORT"
                "a rank beyond the size", torchrun.Replace("RANK=3 W", "RANK=4 W"), "RANK"
                "a rank that is no number", torchrun.Replace("RANK=3 W", "RANK=-1 W"), "RANK"
                "a port beyond all", torchrun.Replace("29500", "65536"), "MASTER_PORT"
                "torchrun's variables set by hand, other than mpirun's",
                $"%s{torchrun} %s{ompi}",
                "RANK, OMPI_COMM_WORLD_RANK"
                "mpirun without a size", "OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE"
                "no nodes", slurm.Replace("n[0-3]", "[0-3]"), "SLURM_STEP_NODELIST"
            ] do
            testCase name (fun () ->
                let wrong =
                    Expect.throwsC (fun () -> detected text |> ignore) (fun e ->
                        (e :?> DiagnosticException).Diagnostics[0])

                Expect.equal (wrong.Code, wrong.At) (Codes.LaunchEnvironment, at) wrong.Message)

        testCase "the first of a list of nodes"
        <| fun () ->
            for list, first in
                [
                    "n0", "n0"
                    "n[0-3]", "n0"
                    "gpu[007-009,12]", "gpu007"
                    "a-1,b", "a-1"
                    "r[1-2]c3,x", "r1c3"
                    "h.x.org", "h.x.org"
                ] do
                Expect.equal (SlurmNodes.First list) first list

            Expect.equal (SlurmNodes.MostTasks "2(x3),1") 2 "tasks of a node"

        testCase "jobs with other secrets, or of other numbers, have other tokens"
        <| fun () ->
            let token text = LaunchEnvironment.Of(variables text).Token

            Expect.equal (token slurm) (token (slurm.Replace("PROCID=2", "PROCID=1"))) "ranks of a job"
            Expect.notEqual (token slurm) (token (slurm.Replace("STEP_ID=1", "STEP_ID=2"))) "another step"
            Expect.notEqual (token slurm) (token (slurm + " DSG_JOB_TOKEN=s")) "a secret"
    ]

/// What `act` gave in each of `size` processes, or threw, over TCP.
let private together size (act: int -> IWorld -> 'a) : Result<'a, exn>[] =
    let port = freePort ()
    let results = Array.create size (Error(exn "did not run"))

    let threads =
        Array.init size (fun rank ->
            Thread(fun () ->
                try
                    use world = ProcessWorld.Join(launched port [| 1uy |] size rank)

                    try
                        results[rank] <- Ok(act rank world)
                    with e ->
                        world.Abort e
                        results[rank] <- Error e
                with e ->
                    results[rank] <- Error e))

    threads |> Array.iter _.Start()
    threads |> Array.iter _.Join()
    results

let private text (bytes: byte[]) = Encoding.UTF8.GetString bytes

let private codeOf (result: Result<'a, exn>) =
    match result with
    | Error(:? DiagnosticException as e) -> e.Diagnostics[0].Code
    | Error(:? JobEndedException as e) ->
        match e.InnerException with
        | :? DiagnosticException as inner -> inner.Diagnostics[0].Code
        | other -> string other
    | Error e -> string e
    | Ok _ -> "no error"

let private worlds =
    testSequenced
    <| testList "worlds" [
        testCase
            "a meeting: all are heard in rank order, all get what process 0 decides; topics do not wait for each other"
        <| fun () ->
            let results =
                together 4 (fun rank world ->
                    let meet (topic: string) (mine: string) =
                        world.Meet(
                            topic,
                            Encoding.UTF8.GetBytes mine,
                            (fun all -> all |> Seq.map text |> String.concat " " |> Encoding.UTF8.GetBytes),
                            CancellationToken.None
                        )
                        |> text

                    let other = Tasks.Task.Run(fun () -> meet "other" $"o%d{rank}")

                    if rank = 1 then
                        other.Wait()

                    let first = meet "t" $"a%d{rank}"
                    first, meet "t" $"b%d{rank}", other.Result)

            for result in results do
                Expect.equal result (Ok("a0 a1 a2 a3", "b0 b1 b2 b3", "o0 o1 o2 o3")) "everybody's"

        testCase "an error of one process is that of all"
        <| fun () ->
            let results =
                together 3 (fun rank world ->
                    if rank = 2 then
                        raise (DiagnosticException.Of(Codes.DataUnavailable, "data", "there is none", "give some"))

                    world.Meet("t", [||], (fun _ -> [||]), world.Stop) |> ignore)

            Expect.equal (results |> Array.map codeOf |> Array.distinct) [| Codes.DataUnavailable |] "code"

            match results[0] with
            | Error(:? DiagnosticException as e) -> Expect.equal e.Diagnostics[0].At "rank 2, data" "names the rank"
            | other -> failtest $"%A{other}"

        testCase "a process that is gone while the others meet is named, and no meeting ends without saying why"
        <| fun () ->
            let port = freePort ()
            let token = [| 1uy |]

            let met rank =
                Tasks.Task.Run(fun () ->
                    use world = ProcessWorld.Join(launched port token 3 rank)

                    try
                        SharedWork.OnFirst(world, "t", [||], (fun _ -> ""))
                    with
                    | :? DiagnosticException as e -> e.Message
                    | e -> string e)

            let others = [ met 0; met 1 ]
            // one that joins and drops its connection, as a process that is killed does
            let hub = IPEndPoint(IPAddress.Loopback, port)
            let lost = HubClient.Join(2, 3, ProcessWorld.VersionOfDsg, token, hub, 1, Action<Fault>(ignore))
            lost.Addresses() |> ignore
            lost.Drop()

            for other in others do
                Expect.stringContains other.Result "rank 2 is gone" "names it"

        testCase "another fact stops all, and names rank and both values"
        <| fun () ->
            let results =
                together 3 (fun rank world ->
                    Agreement.Require(world, [| struct ("the plan", (if rank = 1 then "x" else "y")) |]))

            Expect.equal (results |> Array.map codeOf |> Array.distinct) [| Codes.RanksDiffer |] "code"

            match results[0] with
            | Error e -> Expect.stringContains e.Message "rank 1 has the plan x, rank 0 has y" "values"
            | Ok() -> failtest "went on"

        testCase "work that fails in process 0 is told to all, and the job goes on"
        <| fun () ->
            let results =
                together 2 (fun _ world ->
                    let code =
                        try
                            SharedWork.OnFirst(
                                world,
                                "w",
                                [||],
                                fun _ -> raise (DiagnosticException.Of(Codes.OutputTaken, "f", "taken", ""))
                            )
                        with :? DiagnosticException as e ->
                            e.Diagnostics[0].Code

                    code, SharedWork.OnFirst(world, "w", [||], (fun all -> $"%d{all.Count}")))

            for result in results do
                Expect.equal result (Ok(Codes.OutputTaken, "2")) "the failure, then the next"

        for name, act in
            [
                "another version",
                fun port rank -> ProcessWorld.Join(launched port [| 1uy |] 2 rank, (if rank = 1 then "9.9" else "0.1"))
                "another world size", fun port rank -> ProcessWorld.Join(launched port [| 1uy |] (2 + rank) rank)
                "one rank twice", fun port rank -> ProcessWorld.Join(launched port [| 1uy |] 3 (min rank 1))
            ] do
            testCase $"%s{name} stops all"
            <| fun () ->
                let port = freePort ()

                let codes =
                    Array.Parallel.map
                        (fun rank ->
                            try
                                use world = act port rank
                                codeOf (Ok())
                            with e ->
                                codeOf (Error e))
                        [| 0 .. (if name = "one rank twice" then 2 else 1) |]

                Expect.equal (Array.distinct codes) [| Codes.RanksDiffer |] "all ended"

        testCase "strangers and another job's processes are refused, and disturb nobody"
        <| fun () ->
            let port = freePort ()

            let member' rank =
                Tasks.Task.Run(fun () ->
                    use world = ProcessWorld.Join(launched port [| 1uy |] 2 rank)
                    world.Meet("t", [| byte rank |], (fun all -> Array.concat all), world.Stop) |> List.ofArray)

            let first = member' 0

            let rec connect () =
                try
                    new TcpClient("127.0.0.1", port)
                with :? SocketException ->
                    Thread.Sleep 20
                    connect ()

            // silent, noisy, and gone at once
            use silent = connect ()

            for noise in [ Array.zeroCreate 41; Array.create 4096 255uy; [||] ] do
                use noisy = connect ()
                noisy.GetStream().Write(noise, 0, noise.Length)

            let other =
                Expect.throwsC (fun () -> ProcessWorld.Join(launched port [| 2uy |] 2 1) |> ignore) (fun e ->
                    (e :?> DiagnosticException).Diagnostics[0])

            Expect.equal other.Code Codes.Rendezvous other.Message
            Expect.stringContains other.Message "token" "says why"
            let second = member' 1
            Expect.equal (first.Result, second.Result) ([ 0uy; 1uy ], [ 0uy; 1uy ]) "the job meets"
    ]

let private random = Random 5

let private parcel () =
    let routes = [|
        RowSet.FromMask(ReadOnlySpan(Array.init 24 (fun i -> byte (i % 3 / 2))), 6, 4)
        RowSet.FromMask(ReadOnlySpan(Array.init 24 (fun i -> byte (i % 5 / 4))), 6, 4, 16)
        RowSet.FromMembers([| [| 1; 2 |]; [| 0; 5 |] |], 4)
    |]

    let tensors = [|
        (filled DType.Float32 [ 3; 4 ] (Array.zeroCreate 12)).Tensor
        (filled DType.BFloat16 [ 5 ] (Array.zeroCreate 5)).Tensor
    |]

    new Parcel(
        [| tensors[0]; tensors[1]; null; null; null; null |],
        [| null; null; routes[0]; routes[1]; routes[2]; null |]
    )

let private bytes =
    testList "messages" [
        testCase "a parcel's header says all of it but the elements"
        <| fun () ->
            LibTorch.Load()
            let sent = parcel ()
            let key = MessageKey(3, true, 7L)
            let struct (key', got) = ParcelBytes.Read(ParcelBytes.Header(key, sent))
            Expect.equal key' key "key"

            for i in 0 .. sent.Tensors.Length - 1 do
                match sent.Tensors[i], got.Tensors[i] with
                | null, null -> ()
                | null, _
                | _, null -> failtest $"value %d{i}"
                | a, b -> Expect.equal (b.shape, b.dtype) (a.shape, a.dtype) "tensor"

                match sent.Rows[i], got.Rows[i] with
                | null, null -> ()
                | null, _
                | _, null -> failtest $"value %d{i}"
                | a, b ->
                    Expect.equal b.Counts a.Counts "counts"
                    Expect.equal b.Offsets a.Offsets "blocks"
                    Expect.equal b.TokenIndex a.TokenIndex "tokens"
                    Expect.equal b.TokenStart a.TokenStart "starts"
                    Expect.equal b.TokenRows a.TokenRows "rows of tokens"
                    Expect.equal b.MemberCounts a.MemberCounts "members"

        testCase "damaged headers are InvalidDataException, whatever is in them"
        <| fun () ->
            LibTorch.Load()
            let whole = ParcelBytes.Header(MessageKey(0, false, 0L), parcel ())
            let mutable refused = 0

            let read (damaged: byte[]) =
                try
                    let struct (_, got) = ParcelBytes.Read damaged
                    got.Dispose()
                with :? InvalidDataException ->
                    refused <- refused + 1

            for length in 0 .. whole.Length - 1 do
                read whole[.. length - 1]

            Expect.equal refused whole.Length "every prefix is refused"

            for _ in 1..3000 do
                let damaged = Array.copy whole

                for _ in 0 .. random.Next 3 do
                    damaged[random.Next damaged.Length] <- byte (random.Next 256)

                read damaged

            Expect.isGreaterThan refused (whole.Length + 300) "many are"

        testCase "a fault comes through as it was; damaged ones are InvalidDataException"
        <| fun () ->
            let said at = {
                Code = Codes.OutputTaken
                At = at
                Message = "message"
                Help = "help"
            }

            let fault = Fault(3, [| said "at" |], "")
            let whole = fault.ToBytes()

            match (Fault.Read whole).ToException() with
            | :? DiagnosticException as e -> Expect.equal (List.ofSeq e.Diagnostics) [ said "rank 3, at" ] "rank"
            | e -> failtest $"%A{e}"

            for length in 0 .. whole.Length - 1 do
                Expect.throwsT<InvalidDataException>
                    (fun () -> Fault.Read whole[.. length - 1] |> ignore)
                    $"%d{length} bytes"
    ]

let tests = testList "Launch" [ environments; worlds; bytes ]

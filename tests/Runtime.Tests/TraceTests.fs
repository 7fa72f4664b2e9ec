/// Traced steps: every launch and collective once and in its lane, a file that reads back, and what share of communication is hidden.
module DeepSeekGraph.Runtime.Tests.TraceTests

open System
open System.Collections.Generic
open System.IO
open System.Text
open System.Text.Json
open System.Threading
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Collectives
open DeepSeekGraph.Runtime.Cuda
open DeepSeekGraph.Runtime.Telemetry
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Runtime.Tests.NcclTests
open DeepSeekGraph.Runtime.Tests.RunnerTests
open DeepSeekGraph.Testing

let private intervals (all: (byte * byte) list) = [
    for start, length in all -> Interval(int64 start, int64 start + int64 length % 40L)
]

/// Does one of the intervals hold all of the unit that begins at `t`?
let private covers (all: Interval list) (t: int64) = all |> List.exists (fun i -> i.Begin <= t && t < i.End)

let private event lane kind first last =
    TraceEvent(
        lane,
        kind,
        first,
        last,
        Path = "model.layers.3.mlp",
        Program = "F1@2",
        Microbatch = Nullable 1,
        Bytes = 64L
    )

let private compute kind first last = event TraceLane.Compute kind first last

let private communication kind group first last =
    let one = event TraceLane.Communication kind first last
    TraceEvent(one.Lane, kind, first, last, Path = one.Path, Program = one.Program, Bytes = 8L, Group = group)

let private trace (events: TraceEvent seq) =
    StepTrace(
        2,
        5L,
        "cpu",
        DateTime.UnixEpoch.AddSeconds 1.5,
        100_000_000L,
        events |> Seq.sortBy _.Begin |> Array.ofSeq
    )

let private overlap =
    testList "overlap" [
        Properties.property "agrees with a sweep over every unit of time"
        <| fun computed communicated waited ->
            let computed, communicated, waited = intervals computed, intervals communicated, intervals waited
            let found = Overlap.Of(300L, computed, communicated, waited)
            let count holds = [ 0L .. 299L ] |> List.filter holds |> List.length |> int64

            Expect.equal
                (found.Compute, found.Idle, found.Communication, found.Exposed, found.HostWait)
                (count (covers computed),
                 count (covers computed >> not),
                 count (covers communicated),
                 count (fun t -> covers communicated t && not (covers computed t)),
                 count (covers waited))
                "units"

        Properties.property "what lies outside a cover is counted unit by unit"
        <| fun covered first length ->
            let cover, one = intervals covered, Interval(int64<byte> first, int64<byte> first + int64<byte> length)

            Expect.equal
                (Cover(cover).Outside one)
                (seq { one.Begin .. one.End - 1L } |> Seq.filter (covers cover >> not) |> Seq.length |> int64)
                "outside"

        test "a share is of communication; without any there is none" {
            let share computed communicated =
                let all = List.map (fun (first, last) -> Interval(first, last))
                Overlap.Of(100L, all computed, all communicated, []).HiddenShare

            Expect.equal (share [ 0L, 40L ] [ 30L, 50L ]) (Nullable 0.5) "half"
            Expect.equal (share [ 0L, 40L ] [ 10L, 30L ]) (Nullable 1.0) "all"
            Expect.equal (share [ 0L, 10L ] [ 10L, 30L ]) (Nullable 0.0) "nothing: it only touches"
            Expect.equal (share [ 0L, 10L ] []) (Nullable()) "no communication"
        }

        test "collectives are summed over layers, the most exposed ones first; a finish is no second collective" {
            let finish =
                TraceEvent(
                    TraceLane.Communication,
                    "AllGather (finish)",
                    60L,
                    70L,
                    Kind = "AllGather",
                    Path = "model.layers.4.mlp",
                    Program = "F0",
                    Group = "dp"
                )

            let found =
                (trace [
                    compute "Contract" 0L 40L
                    communication "RowsToTokens" "ep" 30L 60L
                    communication "AllGather" "dp" 20L 50L
                    finish
                    communication "Send" "pp" 10L 20L
                ])
                    .Overlap.Collectives

            Expect.equal
                [ for c in found -> c.Kind, c.Path, c.Group, c.Count, c.Time, c.Exposed ]
                [
                    "AllGather", "model.layers.*.mlp", "dp", 1, 40L, 20L
                    "RowsToTokens", "model.layers.*.mlp", "ep", 1, 30L, 20L
                    "Send", "model.layers.*.mlp", "pp", 1, 10L, 0L
                ]
                "sums"

            for path, any in [ "12", "*"; "a1.b", "a1.b"; "experts.3.up.4", "experts.*.up.*"; "", "" ] do
                Expect.equal (Overlap.AnyLayer path) any path
        }
    ]

let private text (trace: StepTrace) =
    use stream = new MemoryStream()
    trace.Write stream
    Encoding.UTF8.GetString(stream.ToArray())

let private files =
    testList "file" [
        test "is this text: a process a rank, a thread a lane, a second one for what is under way at the same time" {
            let actual =
                text (
                    trace [
                        compute "Contract" 500L 2_000_500L
                        communication "AllGather" "dp" 1_000_500L 3_000_000L
                        communication "AllReduceSum" "dp" 2_000_000L 4_000_001L
                        communication "AllGather" "dp" 4_000_000L 5_000_500L
                    ]
                )

            let threads = "\"ph\":\"M\",\"pid\":2,\"tid\":"
            let shared = "\"args\":{\"path\":\"model.layers.3.mlp\",\"program\":\"F1@2\""

            let expected =
                [
                    "{\"displayTimeUnit\":\"ms\",\"otherData\":{\"rank\":2,\"step\":5,\"device\":\"cpu\",\"begin_us\":1500000,"
                    "\"overlap\":{\"step_ms\":100,\"compute_ms\":2,\"idle_ms\":98,\"communication_ms\":4,"
                    "\"exposed_ms\":3,\"hidden_share\":0.25,\"host_wait_ms\":0,\"collectives\":["
                    "{\"kind\":\"AllGather\",\"path\":\"model.layers.*.mlp\",\"group\":\"dp\",\"count\":2,\"ms\":3,\"exposed_ms\":2},"
                    "{\"kind\":\"AllReduceSum\",\"path\":\"model.layers.*.mlp\",\"group\":\"dp\",\"count\":1,\"ms\":2.000001,\"exposed_ms\":1.999501}]}},"
                    "\"traceEvents\":["
                    "{\"name\":\"process_name\"," + threads + "0,\"args\":{\"name\":\"rank 2\"}},"
                    "{\"name\":\"thread_name\"," + threads + "1,\"args\":{\"name\":\"compute\"}},"
                    "{\"name\":\"thread_name\"," + threads + "2,\"args\":{\"name\":\"dp\"}},"
                    "{\"name\":\"thread_name\"," + threads + "3,\"args\":{\"name\":\"dp (2)\"}},"
                    "{\"name\":\"Contract\",\"cat\":\"compute\",\"ph\":\"X\",\"pid\":2,\"tid\":1,\"ts\":0.5,\"dur\":2000,"
                    + shared
                    + ",\"microbatch\":1,\"bytes\":64}},"
                    "{\"name\":\"AllGather\",\"cat\":\"communication\",\"ph\":\"X\",\"pid\":2,\"tid\":2,\"ts\":1000.5,\"dur\":1999.5,"
                    + shared
                    + ",\"bytes\":8,\"group\":\"dp\"}},"
                    "{\"name\":\"AllGather\",\"cat\":\"communication\",\"ph\":\"X\",\"pid\":2,\"tid\":2,\"ts\":4000,\"dur\":1000.5,"
                    + shared
                    + ",\"bytes\":8,\"group\":\"dp\"}},"
                    "{\"name\":\"AllReduceSum\",\"cat\":\"communication\",\"ph\":\"X\",\"pid\":2,\"tid\":3,\"ts\":2000,\"dur\":2000.001,"
                    + shared
                    + ",\"bytes\":8,\"group\":\"dp\"}}]}"
                ]
                |> String.concat ""

            Expect.equal actual expected "text"
        }

        test "replaces an older one, leaves nothing beside it, and is refused where a folder cannot be" {
            inFolder (fun folder ->
                let one = trace [ compute "Contract" 0L 10L ]
                let inside = Path.Combine(folder, "new")
                Directory.CreateDirectory inside |> ignore
                File.WriteAllText(Path.Combine(inside, "rank-2.json"), "old")
                let path = one.Write inside
                Expect.equal path (Path.Combine(inside, "rank-2.json")) "path"
                Expect.equal (File.ReadAllText path) (text one) "written"
                Expect.equal (Directory.GetFiles inside) [| path |] "one file"

                try
                    one.Write(Path.Combine(path, "below")) |> ignore
                    failtest "no diagnostic"
                with :? DiagnosticException as e ->
                    Expect.equal e.Diagnostics[0].Code Codes.OutputUnwritable "code")
        }
    ]

/// The traces of step 2 of 3, and every loss; the world is given back.
let private tracedOn device (plan: PlanSet) executor (world: IWorld | null) step =
    task {
        let options =
            TrainerOptions(
                Batches = Pattern(plan.Microbatches * plan.MicroBatch, 0),
                Seed = 7UL,
                Executor = executor,
                World = world,
                Device = device,
                TracedStep = step
            )

        use! trainer = Trainer.StartAsync(plan, options)
        let losses = List<float>()
        let steps = trainer.RunAsync(3L, CancellationToken.None).GetAsyncEnumerator()

        while! steps.MoveNextAsync() do
            if steps.Current.Step = 1L then
                Expect.isEmpty trainer.Traces "nothing yet"

            losses.Add steps.Current.Loss

        return List.ofSeq trainer.Traces, List.ofSeq losses
    }
    |> _.GetAwaiter().GetResult()

let private traced plan executor world step = tracedOn RankDevice.Cpu plan executor world step

/// Name, path and program of every launch and every start of a step, as the plan has them.
let private planned (plan: PlanSet) (stage: int) =
    let steps = plan.Stages[stage]

    [
        for action in steps.Timetable do
            for program in steps.Programs do
                if program.Phase = action.Phase && program.Chunk = action.Chunk then
                    for step in program.Steps do
                        match step with
                        | Step.Launch(kernel, _, _, _, path) -> TraceLane.Compute, $"%O{kernel}", path, action.Name, ""
                        | Step.Start(_, kind, group, _, _, path) ->
                            let name = (string<Collective> kind).Split(' ')[0]
                            TraceLane.Communication, name, path, action.Name, plan.Groups[group].Name
                        | Step.Wait _
                        | Step.Free _ -> ()
    ]
    |> List.countBy id
    |> List.sort

let private plan = TinyPlan.plan 2 2 4

let private wholeOn (device: unit -> RankDevice) name executor (world: unit -> (IWorld | null)) =
    testCase
        $"every launch and collective of the step is there once, one after the other in its lane: %s{name}"
        (fun () ->
            let device = device ()
            let _, expected = tracedOn device plan executor (world ()) (Nullable())
            let traces, losses = tracedOn device plan executor (world ()) (Nullable 2L)
            Expect.equal losses expected "the losses of a run that is not traced"

            Expect.equal
                [ for t in traces -> t.Rank, t.Step, t.Device ]
                [ for r in 0..3 -> r, 2L, device.Name ]
                "every rank, the step"

            for t in traces do
                let parts, wholes = t.Events |> List.ofSeq |> List.partition (fun e -> e.Name <> e.Kind)

                Expect.equal
                    (wholes
                     |> List.map (fun e -> e.Lane, e.Name, e.Path, e.Program, e.Group)
                     |> List.countBy id
                     |> List.sort)
                    (planned plan (t.Rank / 2))
                    $"rank %i{t.Rank}"

                Expect.all
                    parts
                    (fun e -> e.Name.EndsWith " (finish)" || e.Name.EndsWith " (wait)" || e.Name.EndsWith " (pack)")
                    "other parts"

                for e in t.Events do
                    let once = e.Program = "prologue" || e.Program = "epilogue"
                    Expect.equal e.Microbatch.HasValue (not once) "microbatch"

                    if e.Microbatch.HasValue then
                        Expect.stringEnds e.Program $"%i{e.Microbatch.Value}" "of the program"

                    Expect.isTrue (0L <= e.Begin && e.Begin <= e.End && e.End <= t.Length) "within the step"

                for thread, events in [ for struct (name, events) in t.Threads() -> name, List.ofSeq events ] do
                    for a, b in List.pairwise events do
                        Expect.isLessThanOrEqual a.End b.Begin $"%s{thread}: one after the other"

                let communicated kind = t.Events |> Seq.filter (fun e -> e.Kind = kind && e.Name = kind) |> List.ofSeq

                let bytes =
                    if t.Rank / 2 = 0 then
                        TinyPlan.vocab * TinyPlan.hidden
                    else
                        TinyPlan.hidden * TinyPlan.hidden

                let sums = communicated "AllReduceSum" |> List.map _.Bytes |> List.sort
                Expect.equal sums [ 4L; 4L * int64 (bytes + 1) ] "bytes: the norm; gradient and loss"

                let found = t.Overlap
                Expect.isGreaterThan found.Compute 0L "something is computed"
                Expect.isGreaterThan found.Communication 0L "and something sent"
                Expect.isTrue (found.Compute <= t.Length && found.Communication <= t.Length) "within the step"

                use json = JsonDocument.Parse(text t)
                let root = json.RootElement
                let stated = root.GetProperty("otherData").GetProperty("overlap")
                let ms (name: string) = stated.GetProperty(name).GetDecimal()

                Expect.equal
                    (ms "step_ms", ms "compute_ms", ms "communication_ms", ms "exposed_ms", ms "host_wait_ms")
                    (decimal t.Length / 1e6m,
                     decimal found.Compute / 1e6m,
                     decimal found.Communication / 1e6m,
                     decimal found.Exposed / 1e6m,
                     decimal found.HostWait / 1e6m)
                    "overlap as computed"

                let events = [
                    for e in root.GetProperty("traceEvents").EnumerateArray() do
                        if e.GetProperty("ph").GetString() = "X" then
                            Expect.equal (e.GetProperty("pid").GetInt32()) t.Rank "process"
                            e.GetProperty("name").GetString(), e.GetProperty("ts").GetDecimal()
                ]

                Expect.equal
                    (List.sort events)
                    (t.Events |> Seq.map (fun e -> e.Name, decimal e.Begin / 1000m) |> List.ofSeq |> List.sort)
                    "events as recorded")

let private gpu () =
    if Driver.Count = 0 then
        skiptest "there is no GPU"

    RankDevice.Cuda 0

let private whole name executor world = wholeOn (fun () -> RankDevice.Cpu) name executor world

let private loopback () : IWorld | null = null

let private fabric () : IWorld | null =
    let world: IWorld = new FabricWorld(4) :> IWorld
    world

let private steps =
    testList "step" [
        whole "interpreter" Executor.Interpreter loopback
        whole "compiled" Executor.Compiled loopback
        whole "as on GPUs" Executor.Interpreter fabric
        wholeOn gpu "four ranks that share a GPU" Executor.Interpreter loopback

        testCase "while a rank waits, it communicates and computes nothing" (fun () ->
            let traces, _ = traced plan Executor.Interpreter null (Nullable 2L)

            for t in traces do
                let on lane = [
                    for e in t.Events do
                        if e.Lane = lane then
                            Interval(e.Begin, e.End)
                ]

                let communication, compute = Cover(on TraceLane.Communication), Cover(on TraceLane.Compute)
                let waits = on TraceLane.Host
                Expect.hasLength waits 4 "two messages, two sums"

                for wait in waits do
                    Expect.equal (communication.Outside wait) 0L "communicates"
                    Expect.equal (compute.Outside wait) (wait.End - wait.Begin) "computes nothing")

        testCase "a step that is not asked for records nothing" (fun () ->
            let traces, _ = traced plan Executor.Interpreter null (Nullable())
            Expect.isEmpty traces "nothing")
    ]

/// In the order of the stream, and within what the host sees.
let private onGpu =
    testCase "marks of a GPU measure what lies between them" (fun () ->
        let device = gpu ()
        device.Enter()
        device.Finish()
        use clock = new CudaClock(1)
        let wide = TorchSharp.torch.ones ([| 4096L; 4096L |], device = device.Torch)
        let first = (clock :> IStepClock).Mark 0n
        use _ = wide.matmul wide
        let second = (clock :> IStepClock).Mark 0n
        let third = (clock :> IStepClock).Mark 0n
        device.Finish()
        let elapsed = HostTime.Nanoseconds((clock :> IStepClock).Begin, HostTime.Now)
        let at mark = (clock :> IStepClock).Since mark
        Expect.isGreaterThan (at second - at first) 100_000L "a product of 137 GFLOP takes a tenth of a millisecond"
        Expect.isLessThanOrEqual (at second) (at third) "in order, beyond the marks that were made before"
        Expect.isLessThan (at third) (elapsed + 1_000_000L) "on the clock of the host")

let tests = testList "Trace" [ overlap; files; steps; onGpu ]

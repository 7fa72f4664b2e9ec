/// Collectives of GPUs without one: layouts, communicators, rows, order on streams, and what a fault says.
module DeepSeekGraph.Runtime.Tests.NcclTests

open System
open System.Collections.Generic
open System.Threading
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime.Collectives
open DeepSeekGraph.Runtime.Cuda
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Telemetry
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Runtime.Tests.Slots
open DeepSeekGraph.Runtime.Tests.CollectiveTests

/// What all ranks get, whoever hands it in: they have no process to agree with.
let internal named (topic: string) = Func<byte[], byte[]>(fun _ -> Text.Encoding.UTF8.GetBytes topic)

/// A world whose ranks meet in a fabric; each group gets its communicators when the ranks first start something on it.
type internal FabricWorld(ranks: int) =
    let fabric = new LocalFabric()
    let stop = new CancellationTokenSource()
    let mutable first: exn | null = null
    member _.Fabric = fabric

    interface IWorld with
        // all ranks are threads here, so that one process has what they hold
        member _.Processes = 1
        member _.Process = 0
        member _.Owns _ = true
        member _.Stop = stop.Token
        member _.FirstError = first

        member _.Whereabouts
            with set _ = ()

        member _.Abort error =
            Interlocked.CompareExchange(&first, error, null) |> ignore
            stop.Cancel()

        member _.Meet(_, mine, decide, _) = decide.Invoke [| mine |]

        member _.Dispose() =
            fabric.Dispose()
            stop.Dispose()

        member _.For(rank, _, _) =
            let made = Dictionary<int, NcclCollectives>()

            {
                new ICollectives with
                    member _.Start call =
                        if not (made.ContainsKey call.Group.Id) then
                            let calls = LocalCalls(fabric, RankDevice.Cpu, stop.Token)
                            let job = NcclJob(ranks, stop.Token)

                            made[call.Group.Id] <-
                                new NcclCollectives(calls, rank, [| call.Group |], named $"%i{call.Group.Id}", job)

                        made[call.Group.Id].Start call
            }

let private fabric = {
    new Worlds("as on GPUs") with
        member _.Run(_, sizes, stages, work) =
            use world = new FabricWorld(List.fold (*) stages sizes)
            let results = runAll (fun _ -> world :> IWorld) sizes stages work
            Expect.equal world.Fabric.Left 0 "everything that was sent was taken"
            results, (world :> IWorld).FirstError
}

/// A set of rows as a GPU has it: as many places as there may be, in blocks of `padding`.
let internal deviceRoute padding b s e (mask: float[]) width =
    let bytes = mask |> Array.map byte
    let host = RowSet.FromMask(ReadOnlySpan bytes, b * s, e, padding)

    let most =
        if padding = 1 then
            b * s * width
        else
            (b * s * width + e * (padding - 1)) / padding * padding

    let flat = Array.create most -1

    for expert in 0 .. e - 1 do
        for row in host.Offsets[expert] .. host.Offsets[expert] + host.Counts[expert] - 1 do
            flat[row] <- host.TokenIndex[row] * e + expert

    let rowOf = Array.create (b * s * width) -1

    for token in 0 .. b * s - 1 do
        let mine = host.TokenRows[host.TokenStart[token] .. host.TokenStart[token + 1] - 1]
        Array.blit mine 0 rowOf (token * width) mine.Length

    let i32 (values: int[]) = torch.tensor (values, dtype = Nullable torch.ScalarType.Int32)
    let slot = blockSlot padding DType.Bool [ b; s; e ]
    let lists = (i32 rowOf).reshape(int64 (b * s), int64 width)
    slot.Adopt(new DeviceRows(most, b * s, e, width, padding, i32 host.Counts, i32 host.Offsets, i32 flat, lists))

    slot, host

/// Rows of a set in a slot of `most` rows; those of no token hold -7.
let private rowsIn padding (extents: int list) most (host: RowSet) width (values: float[]) =
    let all = Array.create (most * width) -7.0
    let slot = blockSlot padding DType.Float32 extents
    let mutable next = 0

    for e in 0 .. host.Experts - 1 do
        for row in host.Offsets[e] .. host.Offsets[e] + host.Counts[e] - 1 do
            Array.blit values (next * width) all (row * width) width
            next <- next + 1

    use source = torch.tensor (all |> Array.map float32)
    let target = slot.Fill most
    use shaped = source.reshape target.shape
    target.copy_ shaped |> ignore
    slot

/// The rows of a set out of a slot, without what fills up.
let private rowsOf (host: RowSet) width (slot: SlotValue) =
    let all = read slot

    [|
        for e in 0 .. host.Experts - 1 do
            yield! all[host.Offsets[e] * width .. (host.Offsets[e] + host.Counts[e]) * width - 1]
    |]

/// What fills up the blocks of a set.
let private fillOf (host: RowSet) width (slot: SlotValue) =
    let all = read slot

    [|
        for e in 0 .. host.Experts - 1 do
            yield! all[(host.Offsets[e] + host.Counts[e]) * width .. host.Offsets[e + 1] * width - 1]
    |]

let private rows =
    testList "rows" [
        for padding in [ 1; 4 ] do
            testCase $"they go where the loopback sends them, and come back, in blocks of %i{padding}" (fun () ->
                let b, s, e, h, peers = 1, 7, 8, 3, 4
                let maskOf r = if r = 3 then Array.zeroCreate (s * e) else randomMask r s e 3
                let width = e
                let countOf r = maskOf r |> Array.sum |> int32
                let valuesOf r = random r (countOf r * h)
                let probsOf r = random (r + 50) (countOf r)

                let onHost =
                    together [ peers ] 1 (fun rank collectives ->
                        let r, group = rank.Rank, axesGroup 0 [ 0 ]
                        let route = routeOf b s e (maskOf r)
                        let there = blockSlot padding DType.Bool [ b; s * peers; e / peers ]
                        perform collectives Collective.RouteToExperts group [ route ] [ there ]
                        let own = filledRows DType.Float32 [ b; s; e; h ] route.Rows.Rows (valuesOf r)
                        let rows = blockSlot padding DType.Float32 [ b; s * peers; e / peers; h ]
                        perform collectives Collective.RowsToExperts group [ own; route; there ] [ rows ]
                        read rows, there.Rows.Counts, there.Rows.Offsets)
                    |> values

                let asOnGpus =
                    fabric.Run(
                        null,
                        [ peers ],
                        1,
                        fun rank collectives ->
                            let r, group = rank.Rank, axesGroup 0 [ 0 ]
                            let route, host = deviceRoute padding b s e (maskOf r) width
                            let there = blockSlot padding DType.Bool [ b; s * peers; e / peers ]
                            perform collectives Collective.RouteToExperts group [ route ] [ there ]
                            let most = route.DeviceRows.Rows
                            let own = rowsIn padding [ b; s; e; h ] most host h (valuesOf r)
                            let probs = rowsIn padding [ b; s; e ] most host 1 (probsOf r)
                            let rows = blockSlot padding DType.Float32 [ b; s * peers; e / peers; h ]
                            let rowProbs = blockSlot padding DType.Float32 [ b; s * peers; e / peers ]

                            perform collectives Collective.RowsToExperts group [
                                own
                                route
                                there
                                probs
                                route
                                there
                            ] [ rows; rowProbs ]

                            let back = blockSlot padding DType.Float32 [ b; s; e; h ]
                            let backProbs = blockSlot padding DType.Float32 [ b; s; e ]

                            perform collectives Collective.RowsToTokens group [
                                rows
                                there
                                route
                                rowProbs
                                there
                                route
                            ] [ back; backProbs ]

                            Expect.equal (rowsOf host h back) (rounded DType.Float32 (valuesOf r)) "rows come back"

                            Expect.equal
                                (rowsOf host 1 backProbs)
                                (rounded DType.Float32 (probsOf r))
                                "and probabilities"

                            Expect.all (fillOf host h back) (fun v -> v = 0.0) "zero where blocks are filled up"
                            let known = there.DeviceRows
                            use counts = known.Counts.alias ()
                            use offsets = known.Offsets.alias ()
                            read rows, counts.data<int>().ToArray(), offsets.data<int>().ToArray()
                    )
                    |> values

                Expect.equal asOnGpus onHost "rows, counts and blocks")

        for padding, perNode in [ 1, 8; 4, 8; 1, 2; 1, 1 ] do
            for dtype in [ DType.Float32; DType.BFloat16 ] do
                testCase
                    $"a fused dispatch and combine are those of the loopback: %s{dtype.Name}, blocks of %i{padding}, %i{perNode} ranks a node"
                    (fun () ->
                        let b, s, e, h, peers = 1, 9, 8, 4, 4
                        let maskOf r = if r = 3 then Array.zeroCreate (s * e) else randomMask (r + 60) s e 5

                        let crossed (worlds: Worlds) routeFor =
                            worlds.Run(
                                null,
                                [ peers ],
                                1,
                                fun rank collectives ->
                                    let r, group = rank.Rank, axesGroup 0 [ 0 ]
                                    let route: SlotValue = routeFor (maskOf r)
                                    let there = blockSlot padding DType.Bool [ b; s * peers; e / peers ]
                                    perform collectives Collective.RouteToExperts group [ route ] [ there ]

                                    [
                                        // forwards, and backwards by the same sets: with probabilities and without
                                        for pass in 0..1 do
                                            let x = filled dtype [ b; s; h ] (random (r + 10 * pass) (s * h))
                                            let p = filled DType.Float32 [ b; s; e ] (random (r + 90) (s * e))
                                            let rows = blockSlot padding dtype [ b; s * peers; e / peers; h ]
                                            let ones = blockSlot padding DType.Float32 [ b; s * peers; e / peers ]
                                            let y, back = slot dtype [ b; s; h ], slot DType.Float32 [ b; s; e ]

                                            let dispatch, combine =
                                                Collective.Dispatch perNode, Collective.Combine perNode

                                            if pass = 0 then
                                                perform collectives dispatch group [ x; p; route; there ] [
                                                    rows
                                                    ones
                                                ]

                                                perform collectives combine group [ rows; ones; there; route ] [
                                                    y
                                                    back
                                                ]

                                                read rows, read ones, read y, read back
                                            else
                                                perform collectives dispatch group [ x; route; there ] [ rows ]
                                                perform collectives combine group [ rows; there; route ] [ y ]
                                                read rows, [||], read y, [||]
                                    ]
                            )
                            |> values

                        let onHost = crossed threads (routeOf b s e)
                        let asOnGpus = crossed fabric (fun mask -> fst (deviceRoute 1 b s e mask e))
                        Expect.equal asOnGpus onHost "bit for bit")

        testCase "a fused dispatch sends a token once to each rank, and a combine one sum of its rows" (fun () ->
            let b, s, e, h, peers = 1, 6, 8, 16, 2
            let mask = Array.create (s * e) 1.0

            let sent =
                fabric.Run(
                    null,
                    [ peers ],
                    1,
                    fun _ collectives ->
                        let group = axesGroup 0 [ 0 ]
                        let route, _ = deviceRoute 1 b s e mask e
                        let there = rowSlot DType.Bool [ b; s * peers; e / peers ]
                        perform collectives Collective.RouteToExperts group [ route ] [ there ]
                        let x = filled DType.Float32 [ b; s; h ] (random 1 (s * h))
                        let rows = rowSlot DType.Float32 [ b; s * peers; e / peers; h ]
                        perform collectives (Collective.Dispatch 8) group [ x; route; there ] [ rows ]
                        let y = slot DType.Float32 [ b; s; h ]
                        perform collectives (Collective.Combine 8) group [ rows; there; route ] [ y ]

                        let crossing = there.DeviceRows.Crossing |> Unchecked.nonNull
                        crossing.SentCounts, crossing.ReceivedCounts, rows.Tensor.shape[0]
                )
                |> values

            for counts, received, rows in sent do
                Expect.equal (counts, received) ([| s; s |], [| s; s |]) "each token once, to both"
                Expect.equal rows (int64 (s * peers * e / peers)) "and a row for each of four experts there")

        testCase "they are gathered over a group and their results summed back" (fun () ->
            let b, s, e, h = 1, 4, 3, 2

            let results =
                fabric.Run(
                    null,
                    [ 2 ],
                    1,
                    fun rank collectives ->
                        let group = axesGroup 0 [ 0 ]
                        let mask = randomMask (rank.Rank + 5) s e 2
                        let own = random rank.Rank (int32 (Array.sum mask) * h) |> rounded DType.Float32
                        let route, host = deviceRoute 1 b s e mask e
                        let rows = rowsIn 1 [ b; s; e; h ] route.DeviceRows.Rows host h own
                        let joined = rowSlot DType.Bool [ b; 2 * s; e ]
                        perform collectives (Collective.AllGather 1) group [ route ] [ joined ]
                        let whole = rowSlot DType.Float32 [ b; 2 * s; e; h ]
                        perform collectives (Collective.AllGather 1) group [ rows; route; joined ] [ whole ]
                        let back = rowSlot DType.Float32 [ b; s; e; h ]
                        perform collectives (Collective.ReduceScatter 1) group [ whole; joined; route ] [ back ]
                        own, rowsOf host h back, joined.DeviceRows.Rows, whole.Tensor.shape[0]
                )
                |> values

            for own, back, rows, held in results do
                Expect.equal back (Array.map ((*) 2.0) own) "twice what was sent"
                Expect.equal held (int64 rows) "rows")
    ]

let private groups =
    testCase
        "communicators are those of GroupMembers, one for groups over the same axes, none for a rank alone"
        (fun () ->
            // 2 x 1 x 3 ranks on each of 2 stages
            let sizes, stages = [ 2; 1; 3 ], 2
            let axes = [ [ 0 ]; [ 1 ]; [ 2 ]; [ 0; 1 ]; [ 0; 2 ] ]
            let ofAxes = axes |> List.mapi axesGroup
            let ofStages = [ stageGroup 5 [ 0; 1 ]; stageGroup 6 [ 1; 0 ]; stageGroup 7 [ 1 ] ]
            let all = Array.ofList (ofAxes @ ofStages)
            use fabric = new LocalFabric()

            let made =
                together sizes stages (fun rank _ ->
                    let nccl = FakeNccl(fabric, CancellationToken.None)
                    let job = NcclJob(12, CancellationToken.None)
                    use collectives = new NcclCollectives(nccl, rank, all, named "id", job)
                    let origins = NcclGroups.Of(all, rank, 12) |> Seq.map (fun g -> g.Origin) |> List.ofSeq
                    rank, origins, nccl.Groups)
                |> values

            for rank, origins, communicators in made do
                Expect.equal
                    origins
                    [
                        Origin.Split
                        Origin.Alone
                        Origin.Split
                        Origin.Shared
                        Origin.Split
                        Origin.Split
                        Origin.Split
                        Origin.Alone
                    ]
                    "where they come from"

                let expected =
                    [ all[0]; all[2]; all[4]; all[5]; all[6] ]
                    |> List.map (fun group ->
                        let members = GroupMembers.Of(group, rank)
                        members.Ranks.Length, members.Me)

                Expect.equal
                    (communicators |> List.tail |> List.map (fun (_, size, me) -> size, me))
                    expected
                    "size and place"

            // members of one communicator are those of the group
            for i, group in List.indexed [ all[0]; all[2]; all[4]; all[5]; all[6] ] do
                for rank, _, communicators in made do
                    let name, _, _ = communicators[i + 1]

                    let those =
                        made
                        |> Array.filter (fun (_, _, others) -> let other, _, _ = others[i + 1] in other = name)
                        |> Array.map (fun (r, _, _) -> r.Rank)

                    Expect.equal (Array.sort those) (Array.sort (GroupMembers.Of(group, rank).Ranks)) "members")

let private world =
    testCase "all ranks in their order are the world" (fun () ->
        let of' ranks sizes group =
            NcclGroups.Of([| group |], RankContext.At(mesh sizes, 0, 0), ranks)
            |> Seq.map _.Origin
            |> List.ofSeq

        Expect.equal (of' 4 [ 2; 2 ] (axesGroup 0 [ 0; 1 ])) [ Origin.World ] "both axes"
        Expect.equal (of' 8 [ 2; 2 ] (axesGroup 0 [ 0; 1 ])) [ Origin.Split ] "one stage of two"
        Expect.equal (of' 4 [ 2; 2 ] (axesGroup 0 [ 1 ])) [ Origin.Split ] "one axis")

let private lonely =
    testList "a job of one rank has a world and a part of it" [
        for groups in [ [| axesGroup 0 [ 0 ]; axesGroup 1 [ 0; 1 ]; stageGroup 2 [ 0 ] |]; [||] ] do
            testCase $"of %i{groups.Length} groups" (fun () ->
                LibTorch.Load()
                use fabric = new LocalFabric()
                let nccl = FakeNccl(fabric, CancellationToken.None)
                let rank = RankContext.At(mesh [ 1; 1 ], 0, 0)

                do
                    use collectives =
                        new NcclCollectives(nccl, rank, groups, named "id", NcclJob(1, CancellationToken.None))

                    for group in groups do
                        let own, out = filled DType.Float32 [ 2 ] [| 1.0; 2.0 |], slot DType.Float32 [ 2 ]
                        perform collectives Collective.AllReduceSum group [ own ] [ out ]
                        Expect.equal (read out) [| 1.0; 2.0 |] "itself"

                Expect.equal (nccl.Groups |> List.map (fun (_, size, me) -> size, me)) [ 1, 0; 1, 0 ] "world and part"
                Expect.equal nccl.Sums (max 1 groups.Length) "sums over the part, one where nothing else is said"
                Expect.equal (List.ofSeq nccl.Ended) [ "close 2"; "close 1" ] "ended, the part before its world")
    ]

/// One rank's collectives over a fabric, with its calls.
let private single (seconds: float) work =
    LibTorch.Load()
    use fabric = new LocalFabric()
    use stop = new CancellationTokenSource()
    let told, errors = List<string>(), List<exn>()

    let abort (e: exn) =
        lock errors (fun () -> errors.Add e)
        stop.Cancel()

    let results =
        together [ 2 ] 1 (fun rank _ ->
            let nccl = FakeNccl(fabric, stop.Token)

            let job =
                NcclJob(
                    2,
                    stop.Token,
                    Abort = Action<exn> abort,
                    FirstError = Func<exn | null>(fun () -> lock errors (fun () -> Seq.tryHead errors |> Option.toObj)),
                    Whereabouts = Func<string>(fun () -> "step 3, F"),
                    Tell = Action<string>(fun text -> lock told (fun () -> told.Add text)),
                    Grace = TimeSpan.FromMilliseconds 50.0,
                    Timeout = TimeSpan.FromSeconds seconds
                )

            let collectives = new NcclCollectives(nccl, rank, [| axesGroup 0 [ 0 ] |], named "id", job)
            nccl.Log.Clear()

            try
                work rank.Rank nccl collectives stop
            finally
                collectives.Dispose()

            nccl)
        |> values

    results, List.ofSeq told, List.ofSeq errors

let private sum (collectives: NcclCollectives) =
    let own, out = filled DType.Float32 [ 2 ] [| 1.0; 2.0 |], slot DType.Float32 [ 2 ]
    collectives.Start(CollectiveCall(Collective.AllReduceSum, axesGroup 0 [ 0 ], [| own |], [| out |])), out

let private order =
    testCase
        "a collective begins behind stream 0, and stream 0 goes on behind it; the communicators are closed at the end"
        (fun () ->
            let results, told, _ =
                single 600.0 (fun _ nccl collectives _ ->
                    let pending, out = sum collectives
                    let started = nccl.Log.ToArray()
                    pending.Wait()
                    Expect.equal (read out) [| 2.0; 4.0 |] "sum"

                    match started, nccl.Log.ToArray()[started.Length ..] with
                    | [| begun; follows; "group"; ended |], [| goesOn |] ->
                        let event = begun.Split(' ')[1]
                        let stream = follows.Split(' ')[0]
                        let last = ended.Split(' ')[1]
                        Expect.equal begun $"record %s{event} on 0" "behind what stream 0 has to do"
                        Expect.equal follows $"%s{stream} follows %s{event}" "the stream of the group waits for it"
                        Expect.equal ended $"record %s{last} on %s{stream}" "an event behind it"
                        Expect.equal goesOn $"0 follows %s{last}" "and stream 0 waits for that"
                        Expect.notEqual event last "another event"
                        Expect.notEqual stream "0" "a stream of its own"
                    | other -> failtest $"%A{other}"

                    Expect.equal
                        (collectives.Record.Last |> Seq.map _.State |> List.ofSeq)
                        [ FlightState.Queued ]
                        "recorded")

            Expect.isEmpty told "nothing to tell"

            for nccl in results do
                Expect.equal (List.ofSeq nccl.Ended) [ "close 1" ] "the world")

/// Marks as the calls of a rank, in their log.
type private LoggedClock(nccl: FakeNccl) =
    let mutable marks = 0L

    interface IStepClock with
        member _.Begin = 0L
        member _.IsHost = false

        member _.Mark stream =
            nccl.Log.Add $"mark on %i{stream}"
            marks <- marks + 1L
            marks

        member _.Since mark = mark
        member _.Dispose() = ()

/// What streams are given in a traced step, with letters for their handles: s the stream of the group, e and d events.
let private marks =
    let logged kind (inputs: unit -> SlotValue list) (outputs: unit -> SlotValue list) =
        let results, _, _ =
            single 600.0 (fun _ nccl collectives _ ->
                let inputs, outputs = Array.ofList (inputs ()), Array.ofList (outputs ())
                let clock = new LoggedClock(nccl)
                let times = CollectiveTimes(clock, 0L)

                let pending =
                    collectives.Start(CollectiveCall(kind, axesGroup 0 [ 0 ], inputs, outputs, Times = times))

                nccl.Log.Add "wait"
                pending.Wait()

                Expect.equal
                    (times.Begun.HasValue, times.Ended.HasValue, times.Packed.HasValue, times.Join.HasValue)
                    (true, true, nccl.Log[0] = "mark on 0", nccl.Log[nccl.Log.Count - 1] = "mark on 0")
                    "noted"

                if kind.IsRouteToExperts then
                    Expect.equal times.HostWaits.Count 1 "the host waited"
                else
                    Expect.isEmpty times.HostWaits "the host did not wait")

        let letters (log: string list) =
            let handles = Dictionary<string, string>()
            handles["0"] <- "0"

            let letter next (handle: string) =
                if not (handles.ContainsKey handle) then
                    handles[handle] <- next

                handles[handle]

            log
            |> List.map (fun line ->
                match line.Split ' ' with
                | [| "record"; e; "on"; "0" |] -> let e = letter "e" e in $"record %s{e} on 0"
                | [| s; "follows"; e |] -> let s, e = letter "s" s, letter "e" e in $"%s{s} follows %s{e}"
                | [| "record"; d; "on"; s |] -> let d, s = letter "d" d, letter "s" s in $"record %s{d} on %s{s}"
                | [| "mark"; "on"; s |] -> let s = letter "s" s in $"mark on %s{s}"
                | _ -> line)

        [ for nccl in results -> letters (List.ofSeq nccl.Log) ]

    let start pack = [
        yield! pack
        "record e on 0"
        "s follows e"
        "mark on s"
        "group"
        "mark on s"
        "record d on s"
        "wait"
        "0 follows d"
    ]

    let square () = [ filled DType.Float32 [ 2; 2 ] [| 1.0; 2.0; 3.0; 4.0 |] ]
    let both expected = [ expected; expected ]
    let mark = [ "mark on 0" ]

    testList "marks of a traced step" [
        testCase "what ranks of one device queue on a stream is marked on stream 0, where it is done" (fun () ->
            use fabric = new LocalFabric()
            let calls = LocalCalls(fabric, RankDevice.Cpu, CancellationToken.None)
            let stream = calls.NewStream()
            Expect.notEqual stream 0n "a handle of its own"
            Expect.equal (calls.Where stream) 0n "the device knows stream 0 only")

        testCase
            "the lane's begin is behind what stream 0 has to do, its end before the event that is waited for"
            (fun () ->
                Expect.equal
                    (logged Collective.AllReduceSum square (fun () -> [ slot DType.Float32 [ 2; 2 ] ]))
                    (both (start []))
                    "order")

        testCase "what is copied together before and behind a collective is marked on stream 0" (fun () ->
            Expect.equal
                (logged (Collective.ReduceScatter 1) square (fun () -> [ slot DType.Float32 [ 2; 1 ] ]))
                (both (start mark))
                "before"

            Expect.equal
                (logged (Collective.AllGather 1) square (fun () -> [ slot DType.Float32 [ 2; 4 ] ]))
                (both (start [] @ mark @ mark))
                "behind")

        testCase "a wait for counts is the host's, and making the set is no work of the GPU" (fun () ->
            let route () = [ fst (deviceRoute 1 1 4 4 (randomMask 1 4 4 2) 4) ]

            Expect.equal
                (logged Collective.RouteToExperts route (fun () -> [ rowSlot DType.Bool [ 1; 8; 2 ] ]))
                (both (start []))
                "order")
    ]

let private faults =
    testList "faults" [
        testCase "a collective that does not end stops the job, and the record says what was under way" (fun () ->
            let results, told, errors =
                single 0.2 (fun _ nccl collectives stop ->
                    nccl.Stuck <- true
                    let pending, _ = sum collectives
                    pending.Wait()
                    Expect.isTrue (stop.Token.WaitHandle.WaitOne 10000) "stopped"

                    Expect.throwsT<StoppedException> (fun () -> sum collectives |> ignore) "nothing starts any more")

            let error = (Seq.head errors :?> DiagnosticException).Diagnostics[0]
            Expect.equal error.Code Codes.NcclTimeout "code"
            Expect.stringContains error.At "step 3, F" "where the rank is"
            Expect.stringContains error.Message "AllReduceSum on g0, number 1" "which"
            Expect.exists told (fun text -> text.Contains "#1 AllReduceSum on g0, 8 bytes, queued") "the record"

            for nccl in results do
                Expect.equal (List.ofSeq nccl.Ended) [ "abort 1" ] "aborted, not closed")

        testCase "a fault of NCCL stops the job" (fun () ->
            let _, told, errors =
                single 600.0 (fun rank nccl _ stop ->
                    if rank = 1 then
                        nccl.Broken <- "unhandled cuda error"

                    Expect.isTrue (stop.Token.WaitHandle.WaitOne 10000) "stopped")

            let error = (Seq.head errors :?> DiagnosticException).Diagnostics[0]
            Expect.equal (error.Code, error.Message) (Codes.NcclFault, "unhandled cuda error") "code"
            Expect.stringStarts error.At "rank 1" "rank"
            Expect.exists told (fun text -> text.Contains "no collective was started") "the record")

        testCase "a wait for counts ends when the job does" (fun () ->
            let _, _, errors =
                single 600.0 (fun rank nccl collectives stop ->
                    nccl.Stuck <- true
                    let route, _ = deviceRoute 1 1 4 4 (randomMask rank 4 4 2) 4
                    let there = rowSlot DType.Bool [ 1; 8; 2 ]

                    let pending =
                        collectives.Start(
                            CollectiveCall(Collective.RouteToExperts, axesGroup 0 [ 0 ], [| route |], [| there |])
                        )

                    stop.CancelAfter 200
                    Expect.throwsT<StoppedException> (fun () -> pending.Wait()) "stopped")

            Expect.isEmpty errors "no error of its own")

        testCase "a library that is not there, and seconds that are none" (fun () ->
            let diagnostic (act: unit -> unit) =
                try
                    act ()
                    failtest "no diagnostic"
                with :? DiagnosticException as e ->
                    e.Diagnostics[0]

            let missing = diagnostic (fun () -> NcclLibrary.Load([ "/nowhere" ], "libnone.so.2") |> ignore)
            Expect.equal missing.Code Codes.NcclMissing "code"
            Expect.stringContains missing.Message "/nowhere" "where it was looked for"

            for text in [ "0"; "-1"; "x"; "1.5" ] do
                let wrong = diagnostic (fun () -> NcclJob.TimeoutOf text |> ignore)
                Expect.equal (wrong.Code, wrong.At) (Codes.OptionValue, NcclJob.TimeoutVariable) text

            Expect.equal
                (NcclJob.TimeoutOf "7", NcclJob.TimeoutOf null)
                (TimeSpan.FromSeconds 7.0, TimeSpan.FromSeconds 600.0)
                "seconds"

            Expect.equal (NcclLibrary.VersionOf 22809, NcclLibrary.VersionOf 2708) ("2.28.9", "2.7.8") "versions")

        testCase "a record keeps the last ones" (fun () ->
            let record = FlightRecord 3

            for i in 1..5 do
                record.Add(Collective.AllReduceMax, $"g%i{i}", int64 i).State <- FlightState.Done

            let lines = record.Text(4).Split '\n'
            Expect.equal lines.Length 4 "three, below a heading"
            Expect.stringContains lines[1] "#3 AllReduceMax on g3, 3 bytes, done" "the oldest first"
            Expect.all lines (fun line -> line.StartsWith "rank 4:") "each with its rank")
    ]

/// Tokens below a vocabulary, the same for the same step.
type private Tokens(plan: PlanSet, vocabulary: int) =
    interface IBatchSource with
        member _.Get step =
            let rows = plan.Microbatches * plan.MicroBatch
            let columns = (plan.Inputs |> Seq.find (fun input -> input.Name = "tokens")).Extents[1]
            let source = Random(int32 step)
            TrainingBatch(rows, columns, Array.init (rows * columns) (fun _ -> int64 (source.Next vocabulary)))

/// Loss and gradient norm of some steps, in a world or over the loopback.
let private trained (plan: PlanSet) (batches: IBatchSource) (world: IWorld | null) =
    task {
        let options = TrainerOptions(Batches = batches, Seed = 7UL, Executor = Executor.Interpreter, World = world)

        use! trainer = Trainer.StartAsync(plan, options)
        let seen = List<float * float>()
        let steps = trainer.RunAsync(3L, CancellationToken.None).GetAsyncEnumerator()

        while! steps.MoveNextAsync() do
            seen.Add(steps.Current.Loss, steps.Current.GradNorm)

        return List.ofSeq seen
    }
    |> _.GetAwaiter().GetResult()

/// DSG_NCCL_PLANS: files of plans (colons between them); dsg compile writes them.
let private wholePlans =
    let same name (plan: PlanSet) batches =
        testCase $"a plan trains as over the loopback: %s{name}" (fun () ->
            let expected = trained plan batches null
            use world = new LoopbackWorld(AsOnGpus = true)
            let actual = trained plan batches world
            Expect.equal actual expected "loss and gradient norm, bit for bit"
            Expect.equal world.Left 0 "everything that was sent was taken")

    testList "whole plans" [
        let tiny = TinyPlan.plan 2 2 4
        same "two stages of two ranks" tiny (Tokens(tiny, TinyPlan.vocab))

        match Environment.GetEnvironmentVariable "DSG_NCCL_PLANS" with
        | null -> ()
        | files ->
            for file in files.Split(':', StringSplitOptions.RemoveEmptyEntries) do
                let plan = PlanFile.Read file
                same file plan (Tokens(plan, 256))
    ]

let tests =
    testList "Nccl" [
        testList fabric.Name [ reductions fabric; movement fabric; rows ]
        groups
        world
        lonely
        order
        marks
        faults
        wholePlans
    ]

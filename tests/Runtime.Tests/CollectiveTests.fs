/// Collectives between threads and between processes: same bits for every member, rows that come back, and a failure that stops everybody.
module DeepSeekGraph.Runtime.Tests.CollectiveTests

open System
open System.Diagnostics
open System.Threading
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Collectives
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Launch
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Tests.Slots

let mesh (sizes: int list) : MeshInfo = {
    Tensor = 1
    Context = 1
    Data = 1
    Pipeline = 1
    ExpertTensor = 1
    Expert = 1
    ExpertData = 1
    Axes = [| for i, size in List.indexed sizes -> { Name = $"x%i{i}"; Size = size } |]
}

let axesGroup id (axes: int list) : Group = {
    Id = id
    Name = $"g%i{id}"
    MeshAxes = Array.ofList axes
    Stages = [||]
}

let stageGroup id (stages: int list) : Group = {
    Id = id
    Name = $"p%i{id}"
    MeshAxes = [||]
    Stages = Array.ofList stages
}

/// Runs `work` on every rank of a mesh (of `stages` stages), each a thread with the world that `worldOf` gives it.
let runAll
    (worldOf: int -> IWorld)
    (sizes: int list)
    stages
    (work: RankContext -> ICollectives -> 'a)
    : Result<'a, exn>[] =
    LibTorch.Load()
    let mesh = mesh sizes
    let perStage = RankContext.RanksPerStage mesh
    let results = Array.create (perStage * stages) (Error(exn "did not run"))

    let threads =
        Array.init results.Length (fun i ->
            Thread(fun () ->
                TensorMemory.PrepareThread()
                let rank = RankContext.At(mesh, i / perStage, i % perStage)

                try
                    let world = worldOf i

                    try
                        results[i] <- Ok(work rank (world.For(rank, JobShape([||], results.Length, true))))
                    with e ->
                        if not (e :? StoppedException) then
                            world.Abort e

                        results[i] <- Error e
                with e ->
                    results[i] <- Error e))

    threads |> Array.iter _.Start()
    threads |> Array.iter _.Join()
    results

/// Where ranks meet: what each returned, or threw, and the first error of all.
[<AbstractClass>]
type Worlds(name: string) =
    member _.Name = name

    /// Runs `work` on every rank of a mesh of `stages` stages; what the exchange of rows sends may be counted.
    abstract Run:
        traffic: Traffic | null * sizes: int list * stages: int * work: (RankContext -> ICollectives -> 'a) ->
            Result<'a, exn>[] * (exn | null)

/// Ranks as threads of one process.
let threads = {
    new Worlds("in one process") with
        member _.Run(traffic, sizes, stages, work) =
            use world = new LoopbackWorld(Traffic = traffic)
            runAll (fun _ -> world :> IWorld) sizes stages work, world.FirstError
}

/// A port of this machine that nobody listens on.
let freePort () =
    use listener = new System.Net.Sockets.TcpListener(System.Net.IPAddress.Loopback, 0)

    listener.Start()
    (listener.LocalEndpoint :?> System.Net.IPEndPoint).Port

/// What rank `rank` of `size` is told by its launcher.
let launched port token size rank = LaunchEnvironment(LaunchForm.Torchrun, rank, size, rank, "127.0.0.1", port, token)

/// Ranks as processes are: each with a world of its own, which knows the others by TCP only.
let private sockets = {
    new Worlds("over TCP") with
        member _.Run(_, sizes, stages, work) =
            let size = List.fold (*) stages sizes
            let port = freePort ()
            let worlds: ProcessWorld[] = Array.zeroCreate size

            let join rank =
                worlds[rank] <- ProcessWorld.Join(launched port [| 7uy |] size rank)
                worlds[rank] :> IWorld

            let results = runAll join sizes stages work
            let first = worlds[0].FirstError
            // process 0 waits for the others' good-bye
            for world in Array.rev worlds do
                world.Dispose()

            results, first
}

/// The ranks of a mesh as threads of one process.
let together sizes stages (work: RankContext -> ICollectives -> 'a) = threads.Run(null, sizes, stages, work)

let values (results: Result<'a, exn>[] * (exn | null)) =
    fst results
    |> Array.map (function
        | Ok v -> v
        | Error e -> raise (AggregateException e))

let perform (collectives: ICollectives) kind group (inputs: SlotValue list) (outputs: SlotValue list) =
    collectives.Start(CollectiveCall(kind, group, Array.ofList inputs, Array.ofList outputs)).Wait()

let private f32 = DType.Float32

let reductions (worlds: Worlds) =
    testList "reductions" [
        for dtype in [ f32; DType.BFloat16 ] do
            testCase $"an all-reduce adds in member order, %s{dtype.Name}" (fun () ->
                let n = 37
                let own r = random r n |> Array.map (fun v -> v * 10.0 ** float (r % 5)) |> rounded dtype

                let run () =
                    worlds.Run(
                        null,
                        [ 2; 2; 2 ],
                        1,
                        fun rank collectives ->
                            let out = slot dtype [ n ]

                            perform collectives Collective.AllReduceSum (axesGroup 0 [ 0; 1; 2 ]) [
                                filled dtype [ n ] (own rank.Rank)
                            ] [ out ]

                            read out
                    )
                    |> values

                let first = run ()

                let expected =
                    Array.init n (fun i ->
                        let mutable sum = float32 (own 0).[i]

                        for r in 1..7 do
                            sum <- sum + float32 (own r).[i]

                        float sum)

                for result in first do
                    Expect.equal result (rounded dtype expected) "the same bits as a loop over the members"

                Expect.equal (run ()) first "the same bits again")

        testCase "max, integers, and several at once" (fun () ->
            let results =
                worlds.Run(
                    null,
                    [ 4 ],
                    1,
                    fun rank collectives ->
                        let a, b = slot f32 [ 2 ], slot DType.Int64 [ 1 ]
                        let group = axesGroup 0 [ 0 ]

                        perform collectives Collective.AllReduceMax group [
                            filled f32 [ 2 ] [| float rank.Rank; -1.0 |]
                        ] [ a ]

                        perform collectives Collective.AllReduceSum group [
                            ids [ 1 ] [| int64 rank.Rank + (1L <<< 40) |]
                        ] [ b ]

                        let c, d = slot f32 [ 1 ], slot f32 [ 1 ]

                        perform collectives Collective.AllReduceSum group [
                            filled f32 [ 1 ] [| 1.0 |]
                            filled f32 [ 1 ] [| float rank.Rank |]
                        ] [ c; d ]

                        read a, b.Tensor.data<int64>().ToArray(), read c, read d
                )
                |> values

            for result in results do
                Expect.equal result ([| 3.0; -1.0 |], [| 6L + (1L <<< 42) |], [| 4.0 |], [| 6.0 |]) "result")
    ]

let movement (worlds: Worlds) =
    testList "movement" [
        testCase "gather and scatter along a dim; the slowest axis is major" (fun () ->
            // groups along axes 0 and 2: members (0,0) (1,0) (0,1) (1,1)
            let results =
                worlds.Run(
                    null,
                    [ 2; 2; 2 ],
                    1,
                    fun rank collectives ->
                        let place = rank.Coordinates[0] + 2 * rank.Coordinates[2]
                        let group = axesGroup 0 [ 0; 2 ]
                        let offset = 100.0 * float rank.Coordinates[1]
                        let own = Array.init 4 (fun i -> offset + float (10 * place + i))
                        let whole = slot f32 [ 2; 8 ]
                        perform collectives (Collective.AllGather 1) group [ filled f32 [ 2; 2 ] own ] [ whole ]
                        let back = slot f32 [ 2; 2 ]
                        perform collectives (Collective.ReduceScatter 1) group [ whole ] [ back ]
                        rank.Coordinates[1], own, read whole, read back
                )
                |> values

            for part, own, whole, back in results do
                let expected =
                    Array.init 16 (fun at -> 100.0 * float part + float (10 * (at % 8 / 2) + at / 8 * 2 + at % 2))

                Expect.equal whole expected "gathered"
                Expect.equal back (Array.map ((*) 4.0) own) "four members scatter the same")

        testCase "all-to-all swaps a split dim for another, and back" (fun () ->
            let results =
                worlds.Run(
                    null,
                    [ 3 ],
                    1,
                    fun rank collectives ->
                        let group = axesGroup 0 [ 0 ]
                        let own = random rank.Rank 12
                        let source = filled f32 [ 2; 6 ] own
                        let across, back = slot f32 [ 6; 2 ], slot f32 [ 2; 6 ]
                        perform collectives (Collective.AllToAll(1, 0)) group [ source ] [ across ]
                        perform collectives (Collective.AllToAll(0, 1)) group [ across ] [ back ]
                        read source, read across, read back
                )
                |> values

            for rank, (own, across, back) in Array.indexed results do
                Expect.equal back own "there and back"

                let expected =
                    Array.init 12 (fun at ->
                        let peer, row, column = at / 4, at / 2 % 2, at % 2
                        let theirs, _, _ = results[peer]
                        theirs[row * 6 + rank * 2 + column])

                Expect.equal across expected "blocks of all members, joined")

        testCase "sends arrive in order, whatever else happens" (fun () ->
            let results =
                worlds.Run(
                    null,
                    [ 2 ],
                    3,
                    fun rank collectives ->
                        let group = stageGroup 5 [ 0; 1; 2 ]
                        let mutable got = []

                        for i in 0..3 do
                            if rank.Stage < 2 then
                                perform collectives (Collective.Send(rank.Stage + 1)) group [
                                    filled f32 [] [| float (10 * rank.Rank + i) |]
                                ] []

                        for i in 0..3 do
                            if rank.Stage > 0 then
                                let out = slot f32 []
                                perform collectives (Collective.Recv(rank.Stage - 1)) group [] [ out ]
                                got <- (read out)[0] :: got

                        let total = slot f32 []
                        perform collectives Collective.AllReduceSum group [ filled f32 [] [| 1.0 |] ] [ total ]
                        List.rev got, read total
                )
                |> values

            for rank, (got, total) in Array.indexed results do
                Expect.equal total [| 3.0 |] "stages"

                if rank >= 2 then
                    Expect.equal got [ for i in 0..3 -> float (10 * (rank - 2) + i) ] "in order")

        for padding in [ 1; 4 ] do
            testCase $"routed rows and their sets go to another stage, in blocks of %i{padding}" (fun () ->
                let b, s, e, h = 1, 6, 4, 3
                let maskOf place = if place = 1 then Array.zeroCreate (s * e) else randomMask (place + 8) s e 2
                let across, onward = axesGroup 0 [ 0 ], stageGroup 5 [ 0; 1 ]
                let token, expert = [ b; s; e ], [ b; 2 * s; e / 2 ]

                let results =
                    worlds.Run(
                        null,
                        [ 2 ],
                        2,
                        fun rank collectives ->
                            let send = Collective.Send 1, onward
                            // the groups are connected in one order on both stages
                            perform collectives Collective.AllReduceSum across [ filled f32 [] [| 1.0 |] ] [
                                slot f32 []
                            ]

                            let route, there = rowSlot DType.Bool token, blockSlot padding DType.Bool expert
                            let rows = blockSlot padding f32 (expert @ [ h ])

                            if rank.Stage = 0 then
                                let place = rank.Coordinates[0]
                                let route = routeOf b s e (maskOf place)

                                let own =
                                    filledRows f32 (token @ [ h ]) route.Rows.Rows (random place (route.Rows.Rows * h))

                                perform collectives Collective.RouteToExperts across [ route ] [ there ]
                                perform collectives Collective.RowsToExperts across [ own; route; there ] [ rows ]

                                for value in [ rows; route; there ] do
                                    perform collectives (fst send) (snd send) [ value ] []

                                read rows, there.Rows.Counts, route.Rows.TokenRows, read own
                            else
                                for value in [ rows; route; there ] do
                                    perform collectives (Collective.Recv 0) onward [] [ value ]

                                // what came is good for the way back
                                let home = rowSlot f32 (token @ [ h ])
                                perform collectives Collective.RowsToTokens across [ rows; there; route ] [ home ]
                                read rows, there.Rows.Counts, route.Rows.TokenRows, read home
                    )
                    |> values

                Expect.equal results[2..] results[..1] "what was sent")
    ]

let private routing (worlds: Worlds) =
    testList "rows" [
        testCase "rows go to their experts, ordered, and come back" (fun () ->
            let b, s, e, h, peers = 1, 5, 8, 3, 4
            let maskOf r = if r = 3 then Array.zeroCreate (s * e) else randomMask r s e 3
            // element = rank, token, expert, feature: every row is known by its contents
            let rowsOf r = [|
                for expert in 0 .. e - 1 do
                    for t in 0 .. s - 1 do
                        if (maskOf r)[t * e + expert] <> 0.0 then
                            for f in 0 .. h - 1 do
                                float (1000 * r + 100 * t + 10 * expert + f)
            |]

            let results =
                worlds.Run(
                    null,
                    [ peers ],
                    1,
                    fun rank collectives ->
                        let r, group = rank.Rank, axesGroup 0 [ 0 ]
                        let route = routeOf b s e (maskOf r)
                        let own = filledRows f32 [ b; s; e; h ] route.Rows.Rows (rowsOf r)
                        let there = rowSlot DType.Bool [ b; s * peers; e / peers ]
                        perform collectives Collective.RouteToExperts group [ route ] [ there ]
                        let rows = rowSlot f32 [ b; s * peers; e / peers; h ]
                        perform collectives Collective.RowsToExperts group [ own; route; there ] [ rows ]
                        let back = rowSlot f32 [ b; s; e; h ]
                        perform collectives Collective.RowsToTokens group [ rows; there; route ] [ back ]
                        read rows, read back, there.Rows.Counts
                )
                |> values

            for r, (rows, back, counts) in Array.indexed results do
                Expect.equal back (rowsOf r) "they come back"

                let expected = [|
                    for expert in r * 2 .. r * 2 + 1 do
                        for peer in 0 .. peers - 1 do
                            yield! rowsOf peer |> Array.filter (fun v -> int32 v / 10 % 10 = expert)
                |]

                Expect.equal rows expected "expert, then member, then token"
                Expect.equal (Array.sum counts * h) rows.Length "counts")

        testCase
            "a fused dispatch and combine move what permute, exchange and unpermute do, and a token once to a node"
            (fun () ->
                let b, s, e, h, peers, perNode = 1, 6, 8, 4, 4, 2
                let maskOf r = if r = 3 then Array.zeroCreate (s * e) else randomMask (r + 40) s e 4
                let tokensOf r = random (100 + r) (s * h)
                let probsOf r = random (200 + r) (s * e)

                let plain, fused = Traffic perNode, Traffic perNode

                let moved (traffic: Traffic) isFused =
                    worlds.Run(
                        traffic,
                        [ peers ],
                        1,
                        fun rank collectives ->
                            let r, group = rank.Rank, axesGroup 0 [ 0 ]
                            let route = routeOf b s e (maskOf r)
                            let x, p = filled f32 [ b; s; h ] (tokensOf r), filled f32 [ b; s; e ] (probsOf r)
                            let there = rowSlot DType.Bool [ b; s * peers; e / peers ]
                            perform collectives Collective.RouteToExperts group [ route ] [ there ]

                            let rows, probs =
                                rowSlot f32 [ b; s * peers; e / peers; h ], rowSlot f32 [ b; s * peers; e / peers ]

                            let y, back = slot f32 [ b; s; h ], slot f32 [ b; s; e ]

                            if isFused then
                                perform collectives (Collective.Dispatch perNode) group [ x; p; route; there ] [
                                    rows
                                    probs
                                ]

                                let received = read rows, read probs

                                perform collectives (Collective.Combine perNode) group [ rows; probs; there; route ] [
                                    y
                                    back
                                ]

                                received, read y, read back
                            else
                                let own, ownProbs = rowSlot f32 [ b; s; e; h ], rowSlot f32 [ b; s; e ]
                                run KernelId.PermuteWithProbs [] [ x; p; route ] [ own; ownProbs ]
                                perform collectives Collective.RowsToExperts group [ own; route; there ] [ rows ]
                                perform collectives Collective.RowsToExperts group [ ownProbs; route; there ] [ probs ]
                                let received = read rows, read probs
                                let home, homeProbs = rowSlot f32 [ b; s; e; h ], rowSlot f32 [ b; s; e ]
                                perform collectives Collective.RowsToTokens group [ rows; there; route ] [ home ]
                                perform collectives Collective.RowsToTokens group [ probs; there; route ] [ homeProbs ]
                                run KernelId.UnpermuteWithProbs [] [ home; homeProbs; route ] [ y; back ]
                                received, read y, read back
                    )
                    |> values

                for (rows, y, back), (rows', y', back') in Array.zip (moved fused true) (moved plain false) do
                    Expect.equal rows rows' "rows and probabilities arrive as permuted and exchanged"
                    Expect.equal back back' "probabilities come back"
                    Array.iter2 (fun a b -> Expect.floatClose Accuracy.medium a b "sums in another order") y y'

                // counted from the routing alone: 2 experts a rank, 4 a node; payload h floats each way, and one float each way
                let pairs between once =
                    Seq.sum [
                        for r in 0 .. peers - 1 do
                            for t in 0 .. s - 1 do
                                let targets = [
                                    for expert in 0 .. e - 1 do
                                        if (maskOf r)[t * e + expert] <> 0.0 then
                                            expert / (e / peers)
                                ]

                                let away =
                                    targets |> List.filter (fun m -> (m / perNode <> r / perNode) = between && m <> r)

                                if once then (if away.IsEmpty then 0 else 1) else away.Length
                    ]

                let rowBytes, probBytes, placeBytes = int64 (4 * h), 4L, 4L

                // the loopback counts what a network would carry
                if Object.ReferenceEquals(worlds, threads) then
                    Expect.equal
                        plain.Between
                        (2L * int64 (pairs true false) * (rowBytes + probBytes))
                        "all-to-all: once an expert"

                    Expect.equal
                        fused.Between
                        (2L * (int64 (pairs true true) * rowBytes + int64 (pairs true false) * probBytes)
                         + int64 (pairs true false) * placeBytes)
                        "flex: once a node (there is one other node), and what token each row is of"

                    Expect.isLessThan fused.Between plain.Between "fewer bytes between nodes")

        testCase "a bundle of rows is one meeting with the results of many" (fun () ->
            let b, s, e, h = 1, 6, 4, 3

            let results =
                worlds.Run(
                    null,
                    [ 2 ],
                    1,
                    fun rank collectives ->
                        let group = axesGroup 0 [ 0 ]
                        let route = routeOf b s e (randomMask (rank.Rank + 3) s e 2)
                        let n = route.Rows.Rows
                        let there = rowSlot DType.Bool [ b; 2 * s; e / 2 ]
                        perform collectives Collective.RouteToExperts group [ route ] [ there ]
                        let rows = filledRows f32 [ b; s; e; h ] n (random rank.Rank (n * h))
                        let probabilities = filledRows f32 [ b; s; e ] n (random (rank.Rank + 50) n)

                        let results () = rowSlot f32 [ b; 2 * s; e / 2; h ], rowSlot f32 [ b; 2 * s; e / 2 ]

                        let (x, p), (x', p') = results (), results ()

                        perform collectives Collective.RowsToExperts group [
                            rows
                            route
                            there
                            probabilities
                            route
                            there
                        ] [ x; p ]

                        perform collectives Collective.RowsToExperts group [ rows; route; there ] [ x' ]
                        perform collectives Collective.RowsToExperts group [ probabilities; route; there ] [ p' ]
                        let back, back' = rowSlot f32 [ b; s; e; h ], rowSlot f32 [ b; s; e ]

                        perform collectives Collective.RowsToTokens group [ x; there; route; p; there; route ] [
                            back
                            back'
                        ]

                        (read x, read p), (read x', read p'), (read back, read back'), (read rows, read probabilities)
                )
                |> values

            for bundled, single, back, own in results do
                Expect.equal bundled single "the bits of one at a time"
                Expect.equal back own "and they come back")

        testCase "rows are gathered over a group and their results summed back" (fun () ->
            let b, s, e, h = 1, 4, 3, 2

            let results =
                worlds.Run(
                    null,
                    [ 2 ],
                    1,
                    fun rank collectives ->
                        let group = axesGroup 0 [ 0 ]
                        let route = routeOf b s e (randomMask (rank.Rank + 5) s e 2)
                        let own = random rank.Rank (route.Rows.Rows * h) |> rounded f32
                        let rows = filledRows f32 [ b; s; e; h ] route.Rows.Rows own
                        let joined = rowSlot DType.Bool [ b; 2 * s; e ]
                        perform collectives (Collective.AllGather 1) group [ route ] [ joined ]
                        let whole = rowSlot f32 [ b; 2 * s; e; h ]
                        perform collectives (Collective.AllGather 1) group [ rows; route; joined ] [ whole ]
                        let back = rowSlot f32 [ b; s; e; h ]
                        perform collectives (Collective.ReduceScatter 1) group [ whole; joined; route ] [ back ]
                        own, read back, joined.Rows.Rows, whole.Tensor.shape[0]
                )
                |> values

            for own, back, rows, held in results do
                Expect.equal back (Array.map ((*) 2.0) own) "twice what was sent"
                Expect.equal held (int64 rows) "rows")
    ]

let private faults (worlds: Worlds) =
    testList "faults" [
        testCase "a NaN stays in its group" (fun () ->
            let results =
                worlds.Run(
                    null,
                    [ 2; 2 ],
                    1,
                    fun rank collectives ->
                        let poison = rank.Rank = 0
                        let out = slot f32 [ 3 ]
                        let own = Array.create 3 (if poison then nan else 1.0)

                        perform collectives Collective.AllReduceSum (axesGroup 0 [ 0 ]) [ filled f32 [ 3 ] own ] [
                            out
                        ]

                        read out
                )
                |> values

            Expect.isTrue
                (Array.forall Double.IsNaN results[0] && Array.forall Double.IsNaN results[1])
                "group of rank 0"

            Expect.equal (results[2], results[3]) (Array.create 3 2.0, Array.create 3 2.0) "the others")

        testCase "a copy: overwriting after the start changes nothing" (fun () ->
            let results =
                worlds.Run(
                    null,
                    [ 2 ],
                    1,
                    fun _ collectives ->
                        let own, out = filled f32 [ 2 ] [| 1.0; 2.0 |], slot f32 [ 2 ]

                        let pending =
                            collectives.Start(
                                CollectiveCall(Collective.AllReduceSum, axesGroup 0 [ 0 ], [| own |], [| out |])
                            )

                        run KernelId.Zero [] [] [ own ]
                        pending.Wait()
                        read out
                )
                |> values

            for result in results do
                Expect.equal result [| 2.0; 4.0 |] "sum")

        testCase "a rank that throws stops the others within two seconds, and its error is the one told" (fun () ->
            let watch = Stopwatch.StartNew()

            let results, first =
                worlds.Run(
                    null,
                    [ 8 ],
                    1,
                    fun rank collectives ->
                        if rank.Rank = 5 then
                            invalidOp "rank 5 broke"

                        perform collectives Collective.AllReduceSum (axesGroup 0 [ 0 ]) [ filled f32 [ 1 ] [| 1.0 |] ] [
                            slot f32 [ 1 ]
                        ]
                )

            Expect.isLessThan watch.Elapsed.TotalSeconds 2.0 "time"

            let message =
                match first with
                | null -> "none"
                | e -> e.Message

            Expect.stringContains message "rank 5 broke" "first error"

            for rank, result in Array.indexed results do
                match result with
                | Ok() -> failtest $"rank %i{rank} went on"
                | Error e -> Expect.equal (e :? StoppedException) (rank <> 5) "the others were stopped")
    ]

let tests =
    testList "Collectives" [
        for worlds in [ threads; sockets ] do
            testList worlds.Name [ reductions worlds; movement worlds; routing worlds; faults worlds ]
    ]

/// The order of a program's steps: collectives begin as soon as their operands can be there, and what does not need them runs meanwhile.
/// before: steps in the order of the graph; after: the same steps. Law: every slot gets the same bits; starts keep their order.
module DeepSeekGraph.Compiler.Lowering.Overlap

open System
open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition

/// How far a step may move past others: within it a layer's exchange and the products beside it lie, and what waits keeps its operands.
let private window = 96

/// What steps take, in ns: only their order of size matters. Integers, so that every machine orders alike.
type Clock = {
    /// A launch, by what it computes and what it moves.
    Launch: KernelId -> IReadOnlyList<Attribute> -> IReadOnlyList<int> -> IReadOnlyList<int> -> int64
    /// A collective of a group, by its operands and results.
    Collective: Collective -> int -> IReadOnlyList<int> -> IReadOnlyList<int> -> int64
    /// From a collective's end to that of the wait for it.
    Reaction: Collective -> int64
}

/// What a rank has run: one launch at a time, and one collective at a time in each group.
[<Sealed>]
type Timeline(clock: Clock) =
    let lanes = Dictionary<int, int64>()
    let mutable now = 0L

    member _.Now = now

    /// How long a wait would take now; `ends`: when the collectives of a microbatch are over. What began elsewhere is.
    member _.Stands(ends: Dictionary<int, int64>, token: int) : int64 =
        match ends.TryGetValue token with
        | true, at -> max 0L (at - now)
        | false, _ -> 0L

    member this.Run(ends: Dictionary<int, int64>, step: Step) =
        match step with
        | Step.Launch(kernel, attributes, inputs, outputs, _) ->
            now <- now + clock.Launch kernel attributes inputs outputs
        | Step.Start(token, kind, group, inputs, outputs, _) ->
            let free = max now (lanes.GetValueOrDefault(group, 0L))
            let over = free + clock.Collective kind group inputs outputs
            lanes[group] <- over
            ends[token] <- over + clock.Reaction kind
        | Step.Wait token -> now <- now + this.Stands(ends, token)
        | Step.Free _ -> ()

/// About an H100's: 600 TFLOP/s of products, 2.5 TB/s of memory, 3 us a launch; links and flex as dispatchers are chosen by.
let clock
    (mesh: MeshInfo)
    (ranksPerNode: int)
    (router: RouterChoice option)
    (groups: int -> Group)
    (slots: IReadOnlyList<SlotInfo>)
    : Clock =
    let bytes (ids: IReadOnlyList<int>) = ids |> Seq.sumBy (fun id -> Memory.bytes slots[id])

    let launch kernel attributes inputs outputs =
        let flops = PlanFlops.ofLaunch slots kernel attributes inputs outputs
        let moved = bytes inputs + bytes outputs
        3_000L + max (int64 (flops / 600_000.0)) (moved / 2_500L)

    /// Members lie as far apart as the slowest of their axes makes them.
    let dense kind axes inputs =
        let reach =
            axes
            |> Seq.fold
                (fun far m -> max far (mesh.Axes |> Seq.truncate (m + 1) |> Seq.fold (fun r a -> r * a.Size) 1))
                1

        let struct (sent, _) = Links.sent kind (bytes inputs) (Mesh.extent mesh axes) 0
        if reach > ranksPerNode then Links.time sent sent else Links.time sent 0L

    // layers send alike: row sets of a group are of one shape
    let known = Dictionary<struct (int * bool * float * float), int64>()

    /// What the rank that sends most takes, as far as any choice of experts is as likely.
    let fused (group: int) (exchange: RoutedTraffic.Exchange) =
        let key = struct (group, exchange.ToExperts, exchange.RowBytes, exchange.TokenBytes)

        match known.TryGetValue key with
        | true, time -> time
        | false, _ ->
            let ranks = Mesh.groups mesh 0 (List.ofSeq (groups group).MeshAxes) |> Array.head
            let sent = RoutedTraffic.run ranksPerNode mesh 0 None [| ranks |] exchange

            let time =
                sent.All
                |> Seq.map (fun (KeyValue(rank, all)) ->
                    Links.time (int64 all) (int64 (sent.Away.GetValueOrDefault(rank, 0.0))))
                |> Seq.fold max 0L

            known[key] <- time
            time

    let collective (kind: Collective) group inputs outputs =
        let exchange =
            if kind.IsDispatch || kind.IsCombine then
                RoutedTraffic.ofCollective (fun id -> slots[id]) (fun _ -> router) false kind inputs outputs
            else
                None

        let picoseconds =
            match exchange with
            | Some exchange -> fused group exchange
            | None -> dense kind (groups group).MeshAxes inputs

        20_000L + picoseconds / 1000L

    {
        Launch = launch
        Collective = collective
        // counts of rows are read by the host, which then begins the exchange: measured on two H200s
        Reaction = fun kind -> if kind.IsRouteToExperts then 500_000L else 0L
    }

/// Which steps each step comes behind. Reads come behind the write or the wait that fills; starts and waits for messages stay in order.
let private predecessors (steps: Step[]) : int list[] =
    let filled = Dictionary<int, int>()
    let readers = Dictionary<int, List<int>>()
    let begun = Dictionary<int, struct (int * IReadOnlyList<int> * IReadOnlyList<int>)>()
    let mutable ordered = -1

    let read i slot =
        match readers.TryGetValue slot with
        | true, list -> list.Add i
        | false, _ -> readers[slot] <- List [ i ]

        match filled.TryGetValue slot with
        | true, at -> [ at ]
        | false, _ -> []

    /// Behind the last write and all that read it.
    let write i slot =
        let before = [
            match filled.TryGetValue slot with
            | true, at -> at
            | false, _ -> ()

            match readers.TryGetValue slot with
            | true, list ->
                for r in list do
                    if r <> i then
                        r
            | false, _ -> ()
        ]

        filled[slot] <- i
        readers.Remove slot |> ignore
        before

    let inOrder i =
        let before = if ordered >= 0 then [ ordered ] else []
        ordered <- i
        before

    steps
    |> Array.mapi (fun i step ->
        match step with
        | Step.Launch(_, _, inputs, outputs, _) -> [
            for slot in inputs do
                yield! read i slot

            for slot in outputs do
                yield! write i slot
          ]
        | Step.Start(token, _, _, inputs, outputs, _) ->
            begun[token] <- struct (i, inputs, outputs)

            [
                yield! inOrder i

                for slot in inputs do
                    yield! read i slot

                for slot in outputs do
                    yield! write i slot
            ]
        | Step.Wait token ->
            match begun.TryGetValue token with
            | true, struct (at, inputs, outputs) -> [
                at

                // until here nobody else may write what it reads
                for slot in inputs do
                    yield! read i slot

                for slot in outputs do
                    yield! write i slot

                match steps[at] with
                | Step.Start(_, (Collective.Send _ | Collective.Recv _), _, _, _, _) -> yield! inOrder i
                | Step.Start _
                | Step.Launch _
                | Step.Wait _
                | Step.Free _ -> ()
              ]
            // begun in another program: a message
            | false, _ -> inOrder i
        | Step.Free _ -> invalidOp "memory is given back after steps are ordered (a bug in dsg)")

/// Schedules one program.
[<Sealed>]
type private Scheduler(clock: Clock, steps: Step[]) =
    let before = predecessors steps
    let isDone = Array.zeroCreate<bool> steps.Length
    let order = List<Step>(steps.Length)
    // when a token's collective is over
    let ends = Dictionary<int, int64>()
    let timeline = Timeline clock
    // the first step that is not ordered yet
    let mutable head = 0
    // the next start within reach, and what it comes behind
    let mutable target = -1
    let cone = HashSet<int>()

    let isWait i = steps[i].IsWait

    let isOver i =
        match steps[i] with
        | Step.Wait token -> timeline.Stands(ends, token) = 0L
        | Step.Launch _
        | Step.Start _
        | Step.Free _ -> false

    /// Could it run now, if waits for what is over were written first?
    let rec isReady i = before[i] |> List.forall (fun p -> isDone[p] || isWait p && isOver p && isReady p)

    let rec write i =
        if not isDone[i] then
            for p in before[i] do
                write p

            isDone[i] <- true
            order.Add steps[i]
            timeline.Run(ends, steps[i])

    /// All that a step comes behind and is not ordered yet.
    let rec collect i =
        for p in before[i] do
            if not isDone[p] && cone.Add p then
                collect p

    let reach () = min steps.Length (head + window) - 1

    let aim () =
        if target < 0 || isDone[target] then
            target <- -1
            cone.Clear()
            let mutable i = head

            while target < 0 && i <= reach () do
                if steps[i].IsStart && not isDone[i] then
                    target <- i
                    collect i

                i <- i + 1

    let first pick =
        let mutable found = -1
        let mutable i = head

        while found < 0 && i <= reach () do
            if not isDone[i] && pick i then
                found <- i

            i <- i + 1

        found

    member _.Run() : Step list =
        while head < steps.Length do
            if isDone[head] then
                head <- head + 1
            // what is over needs no company
            elif isOver head && isReady head then
                write head
            else
                aim ()
                let start = first (fun i -> steps[i].IsStart && isReady i)

                if start >= 0 then
                    write start
                else
                    // what the next collective needs, before what can run while it is under way
                    let needed = first (fun i -> steps[i].IsLaunch && cone.Contains i && isReady i)
                    let next = if needed >= 0 then needed else first (fun i -> steps[i].IsLaunch && isReady i)

                    if next >= 0 then
                        write next
                    else
                        // nothing to do but wait, for what is over first
                        let mutable best = -1

                        for i in head .. reach () do
                            if not isDone[i] && isWait i && before[i] |> List.forall (fun p -> isDone[p]) then
                                let at j =
                                    match steps[j] with
                                    | Step.Wait token -> ends.GetValueOrDefault(token, 0L)
                                    | Step.Launch _
                                    | Step.Start _
                                    | Step.Free _ -> Int64.MaxValue

                                if best < 0 || at i < at best then
                                    best <- i

                        write (if best >= 0 then best else head)

        List.ofSeq order

/// Steps in another order; those of a program without collectives stay as they are.
let run (clock: Clock) (steps: Step list) : Step list =
    if steps |> List.exists (fun step -> step.IsStart) then
        Scheduler(clock, Array.ofList steps).Run()
    else
        steps

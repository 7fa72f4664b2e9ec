/// Timetables: order and count of actions, golden tables, the replay table of makespans and peaks, and illegal combinations.
module DeepSeekGraph.Compiler.Tests.TimetableTests

open System
open System.Collections.Generic
open System.Security.Cryptography
open System.Text
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Testing

let private interleaved ranks microbatches chunks group = {
    Ranks = ranks
    Chunks = chunks
    Microbatches = microbatches
    Group = group
    Pairs = false
}

let private plain = [
    for p in [ 1; 2; 4; 8; 16 ] do
        for m in [ 1; 2; 8; 32; 64 ] do
            for schedule in [ Schedule.OneFOneB; Schedule.GPipe ] -> schedule, Timetable.plain p m
]

/// The pipelines over which Megatron tests its orders (pp, group) and two with large groups, and every count of microbatches and chunks there.
let private woven = [
    for p, g in [ 1, 1; 2, 2; 2, 4; 2, 6; 3, 7; 4, 4; 4, 5; 8, 9; 8, 11 ] do
        for m in [ 8; 32; 33 ] do
            for v in [ 2; 3; 4; 8 ] do
                let shape = interleaved p m v g

                if (Timetable.check Schedule.Interleaved shape).IsEmpty then
                    Schedule.Interleaved, shape
]

let private shapes = plain @ woven

/// Full backwards as cells of a table: I and W of one chunk and microbatch, one after the other, are B.
let private cells (shape: PipelineShape) rank (table: Action list) =
    let cell letter (a: Action) = $"%i{a.Chunk * shape.Ranks + rank}%s{letter}%i{a.Microbatch}"

    let rec loop (rest: Action list) =
        match rest with
        | a :: b :: rest when a.Phase.IsI && b = { a with Phase = Phase.W 0 } -> cell "B" a :: loop rest
        | a :: rest when a.Phase.IsOnce || a.Phase.IsS -> loop rest
        | a :: rest -> cell a.Phase.Name a :: loop rest
        | [] -> []

    loop table

/// The first 16 hex digits of the table's SHA-256: cells joined by commas, one line a rank.
let private digest schedule shape =
    let lines =
        Timetable.build schedule shape
        |> List.mapi (fun r table -> String.concat "," (cells shape r table) + "\n")

    let hash = SHA256.HashData(Encoding.UTF8.GetBytes(String.concat "" lines))
    (Convert.ToHexStringLower hash).Substring(0, 16)

/// End of the last action when each of a chunk's F, I and W takes 1 and messages take nothing; `sent`: after which phase a cotangent goes on;
/// `rendezvous`: S waits until the receiver has come to its I.
let private makespan (sent: Phase) (rendezvous: bool) (shape: PipelineShape) (tables: Action list list) =
    let ended, begun = Dictionary<struct (int * Phase * int), int>(), Dictionary<struct (int * int), int>()
    let last = shape.Ranks * shape.Chunks - 1
    let queues = tables |> List.map (List.filter (fun a -> not a.Phase.IsOnce)) |> Array.ofList
    let clock = Array.create tables.Length 0

    let found (table: Dictionary<'k, int>) key =
        match table.TryGetValue key with
        | true, t -> Some t
        | false, _ -> None

    let ready rank (a: Action) =
        let stage = a.Chunk * shape.Ranks + rank

        match a.Phase with
        | Phase.F _ -> if stage = 0 then Some 0 else found ended (struct (stage - 1, Phase.F 0, a.Microbatch))
        | Phase.I _ ->
            // the receive is posted as soon as the rank is here
            begun.TryAdd(struct (stage, a.Microbatch), clock[rank]) |> ignore
            if stage = last then Some 0 else found ended (struct (stage + 1, sent, a.Microbatch))
        | Phase.S when rendezvous && stage > 0 && shape.Ranks > 1 -> found begun (struct (stage - 1, a.Microbatch))
        | Phase.S
        | Phase.W _
        | Phase.R _
        | Phase.Prologue
        | Phase.Epilogue -> Some 0

    let mutable moved = true

    while moved do
        moved <- false

        for r in 0 .. shape.Ranks - 1 do
            match queues[r] with
            | a :: rest ->
                match ready r a with
                | Some t ->
                    clock[r] <- max clock[r] t + (if a.Phase.IsS then 0 else 1)
                    ended[struct (a.Chunk * shape.Ranks + r, a.Phase, a.Microbatch)] <- clock[r]
                    queues[r] <- rest
                    moved <- true
                | None -> ()
            | [] -> ()

    Expect.isTrue (queues |> Array.forall List.isEmpty) "no deadlock"
    Array.max clock

/// Most microbatches of a chunk that a rank holds between F and W.
let private peak (table: Action list) =
    let change (a: Action) =
        match a.Phase with
        | Phase.F _ -> 1
        | Phase.W _ -> -1
        | Phase.I _
        | Phase.S
        | Phase.R _
        | Phase.Prologue
        | Phase.Epilogue -> 0

    table |> List.scan (fun n a -> n + change a) 0 |> List.max

let private golden =
    testList "golden tables" [
        testCase "Interleaved p4 m8 v2, ranks 0 and 3"
        <| fun () ->
            let shape = interleaved 4 8 2 4
            let tables = Timetable.build Schedule.Interleaved shape
            let row r = String.concat " " (cells shape r tables[r])

            Expect.equal
                (row 0)
                ("0F0 0F1 0F2 0F3 4F0 4F1 4F2 4F3 0F4 0F5 0F6 4B0 0F7 4B1 4F4 4B2 4F5 4B3 4F6 0B0 4F7 0B1 0B2 0B3 "
                 + "4B4 4B5 4B6 4B7 0B4 0B5 0B6 0B7")
                "rank 0"

            Expect.equal
                (row 3)
                ("3F0 3F1 3F2 3F3 7F0 7B0 7F1 7B1 7F2 7B2 7F3 7B3 3F4 3B0 3F5 3B1 3F6 3B2 3F7 3B3 7F4 7B4 7F5 7B5 "
                 + "7F6 7B6 7F7 7B7 3B4 3B5 3B6 3B7")
                "rank 3"

        testCase "digests of whole tables"
        <| fun () ->
            Expect.equal (digest Schedule.Interleaved (interleaved 4 8 2 4)) "60b6b19fe1c7adf3" "Interleaved p4 m8 v2"
            Expect.equal (digest Schedule.OneFOneB (Timetable.plain 4 8)) "1eecbf9757581714" "1F1B p4 m8"
    ]

let private refused schedule shape (message: string) (help: string) =
    match Timetable.check schedule shape with
    | [ wrong ] ->
        Expect.equal wrong.Code Codes.ScheduleShape message
        Expect.stringContains wrong.Message message ""
        Expect.stringContains wrong.Help help message
    | other -> failtestf "%A: %A" shape other

let private combinations =
    testList "combinations" [
        testCase "several chunks make 1F1B interleaved, and nothing else"
        <| fun () ->
            let two = interleaved 4 8 2 4
            Expect.equal (Timetable.resolve Schedule.OneFOneB two) Schedule.Interleaved ""
            Expect.equal (Timetable.resolve Schedule.OneFOneB (Timetable.plain 4 8)) Schedule.OneFOneB ""
            Expect.equal (Timetable.resolve Schedule.GPipe two) Schedule.GPipe ""

        testCase "illegal ones are refused once, with both values and the choices"
        <| fun () ->
            refused
                Schedule.GPipe
                (interleaved 4 8 2 4)
                "GPipe runs one chunk of each rank, but virtual_pipeline is 2"
                "Interleaved1F1B"

            refused Schedule.Interleaved (Timetable.plain 4 8) "but virtual_pipeline is 1" "schedule 1F1B"

            refused
                Schedule.OneFOneB
                (interleaved 4 8 1 4)
                "microbatch_group is 4, but virtual_pipeline is 1"
                "2 or more"

            refused Schedule.Interleaved (interleaved 4 8 0 4) "virtual_pipeline is 0" "choose 1"

            refused
                Schedule.Interleaved
                (interleaved 4 8 2 3)
                "microbatch_group 3 is less than pipeline 4"
                "choose microbatch_group from 4 8"

            refused
                Schedule.Interleaved
                (interleaved 4 10 2 4)
                "10 microbatches in groups of 4 leave a last group of 2, fewer than pipeline 4"
                "choose microbatch_group from 5 6 10"

            refused
                Schedule.Interleaved
                (interleaved 4 3 2 4)
                "a last group of 3"
                "a global batch of 4 microbatches or more (there are 3)"

        testCase "a forward beside a backward: not in GPipe, not over ranks of one chunk, not of one microbatch"
        <| fun () ->
            let paired shape = { shape with Pairs = true }
            refused Schedule.GPipe (paired (Timetable.plain 1 8)) "no forward beside a backward" "schedule 1F1B"

            refused
                Schedule.OneFOneB
                (paired (Timetable.plain 4 8))
                "on each of 4 pipeline ranks"
                "virtual_pipeline of 2"

            refused Schedule.OneFOneB (paired (Timetable.plain 1 1)) "there is one microbatch" "a global batch of 2"
            Expect.isEmpty (Timetable.check Schedule.OneFOneB (paired (Timetable.plain 1 2))) "one rank"
            Expect.isEmpty (Timetable.check Schedule.Interleaved (paired (interleaved 4 8 2 4))) "chunks"

        testCase "one more forward before the first backward, so that no forward stands beside its own backward"
        <| fun () ->
            for schedule, shape in (Schedule.OneFOneB, Timetable.plain 1 8) :: woven do
                let tables = Timetable.build schedule { shape with Pairs = true }
                makespan (Phase.I 0) true shape tables |> ignore

                for rank, table in List.indexed tables do
                    let before = table |> List.takeWhile (fun a -> not a.Phase.IsI) |> List.filter _.Phase.IsF
                    let expected = Timetable.warmup schedule shape rank + 2
                    Expect.equal before.Length (min expected (shape.Microbatches * shape.Chunks)) "forwards"

                for groups, plain in List.zip (Timetable.groups schedule { shape with Pairs = true }) tables do
                    Expect.equal (List.concat groups) plain "the same actions"

                    for group in groups |> List.filter (fun g -> g.Length > 1) do
                        let phases = group |> List.map (fun a -> a.Phase.Word) |> String.concat ""
                        Expect.equal phases "FIW" "a forward and a backward"
                        Expect.notEqual group[0].Microbatch group[1].Microbatch "of two microbatches"
                        Expect.equal group[1].Microbatch group[2].Microbatch "one backward"

        Properties.property
            "what the help of a refused group offers is legal"
            (fun (p: FsCheck.PositiveInt) (m: FsCheck.PositiveInt) (g: FsCheck.PositiveInt) ->
                let shape = interleaved (1 + p.Get % 8) m.Get 2 g.Get

                match Timetable.check Schedule.Interleaved shape with
                | [] -> true
                | wrong ->
                    let mark = "choose microbatch_group from "
                    let help = wrong.Head.Help

                    if help.StartsWith mark then
                        help.Substring(mark.Length).Split ' '
                        |> Array.forall (fun g ->
                            (Timetable.check Schedule.Interleaved { shape with Group = int g }).IsEmpty)
                    else
                        m.Get < shape.Ranks)
    ]

let tests =
    testList "Schedule.Timetable" [
        testCase "each microbatch goes through F, I, W and S of each chunk once, in this order"
        <| fun () ->
            for schedule, shape in shapes do
                let m, v = shape.Microbatches, shape.Chunks

                for table in Timetable.build schedule shape do
                    let place = Dictionary<struct (Phase * int * int), int>()

                    table |> List.iteri (fun i a -> place.Add(struct (a.Phase, a.Chunk, a.Microbatch), i))

                    Expect.equal table.Length (4 * m * v + 2) "count"
                    Expect.equal (table.Head.Phase, (List.last table).Phase) (Phase.Prologue, Phase.Epilogue) "ends"

                    for c in 0 .. v - 1 do
                        for i in 0 .. m - 1 do
                            let at phase = place[struct (phase, c, i)]

                            Expect.isTrue
                                (at (Phase.F 0) < at (Phase.I 0)
                                 && at (Phase.I 0) < at (Phase.W 0)
                                 && at (Phase.W 0) < at Phase.S)
                                "order"

        golden
        combinations

        testCase "makespans are those of the replay table"
        <| fun () ->
            for p, m, t in [ 4, 8, 33; 8, 32, 117; 16, 64, 237 ] do
                for schedule in [ Schedule.OneFOneB; Schedule.GPipe ] do
                    let shape = Timetable.plain p m
                    let tables = Timetable.build schedule shape
                    Expect.equal (makespan (Phase.W 0) false shape tables) t $"%s{schedule.Name} p %i{p} m %i{m}"
                    // a cotangent that goes on before the weight gradients saves one W a stage
                    Expect.equal
                        (makespan (Phase.I 0) false shape tables)
                        (t - (p - 1))
                        $"%s{schedule.Name} p %i{p} m %i{m}"

            // in the time of a whole rank's share; a chunk takes 1/v of it
            for p, m, v, t in
                [
                    4, 8, 2, 28.5
                    4, 8, 4, 26.25
                    8, 32, 2, 106.5
                    8, 32, 4, 101.25
                    16, 64, 2, 214.5
                    16, 64, 4, 203.25
                ] do
                let shape = interleaved p m v p

                let whole =
                    float (makespan (Phase.W 0) false shape (Timetable.build Schedule.Interleaved shape)) / float v

                Expect.equal whole t $"interleaved p %i{p} m %i{m} v %i{v}"

        testCase "waits for sent cotangents cost no time, though a send ends only when it is received"
        <| fun () ->
            for p, g in [ 2, 2; 2, 5; 4, 4; 4, 7; 8, 8; 16, 16 ] do
                for v in [ 1; 2; 4 ] do
                    let shape = interleaved p (4 * g) v (if v = 1 then 0 else g)
                    let tables = Timetable.build (Timetable.resolve Schedule.OneFOneB shape) shape

                    Expect.equal
                        (makespan (Phase.I 0) true shape tables)
                        (makespan (Phase.I 0) false shape tables)
                        $"p %i{p} g %i{g} v %i{v}"

        testCase "every interleaved order runs to its end, with rendezvous too"
        <| fun () ->
            Expect.isGreaterThan woven.Length 50 "shapes"

            for schedule, shape in woven do
                makespan (Phase.I 0) true shape (Timetable.build schedule shape) |> ignore

        testCase "1F1B holds p - r microbatches, GPipe all, interleaved what the replay table says"
        <| fun () ->
            for schedule, shape in plain do
                let p, m = shape.Ranks, shape.Microbatches

                Timetable.build schedule shape
                |> List.iteri (fun r table ->
                    let expected = if schedule = Schedule.GPipe then m else min m (p - r)
                    Expect.equal (peak table) expected $"%s{schedule.Name} p %i{p} m %i{m} rank %i{r}")

            // whole shares on the first and the last rank
            for p, m, v, first, last in
                [
                    4, 8, 2, 5.5, 2.5
                    4, 8, 4, 4.75, 3.25
                    8, 32, 2, 11.5, 4.5
                    8, 32, 4, 9.75, 6.25
                    16, 64, 2, 23.5, 8.5
                    16, 64, 4, 19.75, 12.25
                ] do
                let tables = Timetable.build Schedule.Interleaved (interleaved p m v p)
                let share table = float (peak table) / float v
                Expect.equal (share tables.Head, share (List.last tables)) (first, last) $"p %i{p} m %i{m} v %i{v}"

        testCase "a schedule's name leads to it, and others are refused"
        <| fun () ->
            for schedule in Schedule.All do
                Expect.equal (Timetable.parse schedule.Name) (Ok schedule) ""

            match Timetable.parse "DualPipe" with
            | Ok _ -> failtest "not made"
            | Error wrong -> Expect.stringContains wrong.Head.Help "1F1B, Interleaved1F1B, GPipe" ""
    ]

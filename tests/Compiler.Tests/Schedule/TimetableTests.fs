/// Timetables: order and count of actions, and the replay table of makespans and peaks.
module DeepSeekGraph.Compiler.Tests.TimetableTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler

let private shapes = [
    for p in [ 1; 2; 4; 8; 16 ] do
        for m in [ 1; 2; 8; 32; 64 ] do
            for schedule in Schedule.All -> schedule, p, m
]

/// Ends of all actions when each of F, I, W takes 1 and messages take nothing; `sent`: after which phase a cotangent goes on.
let private makespan (sent: Phase) (tables: Action list list) =
    let ended = System.Collections.Generic.Dictionary<struct (int * Phase * int), int>()
    let last = tables.Length - 1

    let queues =
        tables
        |> List.map (List.filter (fun a -> a.Phase <> Phase.Prologue && a.Phase <> Phase.Epilogue))
        |> Array.ofList

    let clock = Array.create tables.Length 0

    let ready stage (a: Action) =
        let after s phase =
            match ended.TryGetValue(struct (s, phase, a.Microbatch)) with
            | true, t -> Some t
            | false, _ -> None

        match a.Phase with
        | Phase.F -> if stage = 0 then Some 0 else after (stage - 1) Phase.F
        | Phase.I -> if stage = last then Some 0 else after (stage + 1) sent
        | Phase.W
        | Phase.Prologue
        | Phase.Epilogue -> Some 0

    let mutable moved = true

    while moved do
        moved <- false

        for s in 0..last do
            match queues[s] with
            | a :: rest ->
                match ready s a with
                | Some t ->
                    clock[s] <- max clock[s] t + 1
                    ended[struct (s, a.Phase, a.Microbatch)] <- clock[s]
                    queues[s] <- rest
                    moved <- true
                | None -> ()
            | [] -> ()

    Expect.isTrue (queues |> Array.forall List.isEmpty) "no deadlock"
    Array.max clock

/// Most microbatches a stage holds between F and W.
let private peak (table: Action list) =
    let change (a: Action) =
        match a.Phase with
        | Phase.F -> 1
        | Phase.W -> -1
        | Phase.I
        | Phase.Prologue
        | Phase.Epilogue -> 0

    table |> List.scan (fun n a -> n + change a) 0 |> List.max

let tests =
    testList "Schedule.Timetable" [
        testCase "each microbatch goes through F, I and W once, in this order"
        <| fun () ->
            for schedule, p, m in shapes do
                for table in Timetable.build schedule p m do
                    let place phase i = table |> List.findIndex (fun a -> a.Phase = phase && a.Microbatch = i)
                    Expect.equal table.Length (3 * m + 2) "count"
                    Expect.equal (List.distinct table) table "once"
                    Expect.equal (table.Head.Phase, (List.last table).Phase) (Phase.Prologue, Phase.Epilogue) "ends"

                    if m <= 8 then
                        for i in 0 .. m - 1 do
                            Expect.isTrue
                                (place Phase.F i < place Phase.I i && place Phase.I i < place Phase.W i)
                                "order"

        testCase "makespans are those of the replay table"
        <| fun () ->
            for p, m, t in [ 4, 8, 33; 8, 32, 117; 16, 64, 237 ] do
                for schedule in Schedule.All do
                    let tables = Timetable.build schedule p m
                    Expect.equal (makespan Phase.W tables) t $"%s{schedule.Name} p %i{p} m %i{m}"
                    // a cotangent that goes on before the weight gradients saves one W a stage
                    Expect.equal (makespan Phase.I tables) (t - (p - 1)) $"%s{schedule.Name} p %i{p} m %i{m}"

        testCase "1F1B holds p - r microbatches, GPipe all"
        <| fun () ->
            for schedule, p, m in shapes do
                Timetable.build schedule p m
                |> List.iteri (fun r table ->
                    let expected =
                        match schedule with
                        | Schedule.GPipe -> m
                        | Schedule.OneFOneB -> min m (p - r)

                    Expect.equal (peak table) expected $"%s{schedule.Name} p %i{p} m %i{m} stage %i{r}")

        testCase "a schedule's name leads to it, and others are refused"
        <| fun () ->
            for schedule in Schedule.All do
                Expect.equal (Timetable.parse schedule.Name) (Ok schedule) ""

            match Timetable.parse "DualPipe" with
            | Ok _ -> failtest "not made"
            | Error wrong -> Expect.stringContains wrong.Head.Help "1F1B, GPipe" ""
    ]

/// The check of plans: legal ones pass, damaged ones are refused or harmless, and messages say what is wrong.
module DeepSeekGraph.Compiler.Tests.CheckTests

open System.Diagnostics
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Testing

/// The row with one number changed by one byte (offsets by one line), for every number it has.
let private tampered (row: MemoryRow) : MemoryRow list = [
    {
        row with
            Parameters = row.Parameters + 1L
    }
    {
        row with
            Optimizer = row.Optimizer - 1L
    }
    {
        row with
            Gradients = row.Gradients + 1L
    }
    {
        row with
            Counters = row.Counters - 1L
    }
    {
        row with
            Activations = row.Activations + 1L
    }
    {
        row with
            Collectives = row.Collectives + 1L
    }
    { row with Peak = row.Peak - 1L }
    {
        row with
            Headroom = row.Headroom + 1L
    }
    { row with Worst = row.Worst - 1L }
    { row with Arena = row.Arena + 1L }
    { row with Arena = row.Arena - 1L }
    for i in 0 .. row.Regions.Count - 1 do
        let region change = {
            row with
                Regions = row.Regions |> Seq.mapi (fun k r -> if k = i then change r else r) |> Array.ofSeq
        }

        region (fun r -> { r with Base = r.Base + 1L })
        region (fun r -> { r with Stride = r.Stride - 1L })
        region (fun r -> { r with Count = r.Count + 1 })
        region (fun r -> { r with Count = r.Count - 1 })
        region (fun r -> { r with Routed = not r.Routed })
        region (fun r -> { r with Until = "never" })

        {
            row with
                Regions = row.Regions |> Seq.removeAt i |> Array.ofSeq
        }
    for i in 0 .. row.Offsets.Count - 1 do
        let offset change = {
            row with
                Offsets = row.Offsets |> Seq.mapi (fun k at -> if k = i then change at else at) |> Array.ofSeq
        }

        offset (fun at -> at + 1L)
        offset (fun at -> at + Lowering.Arena.alignment)
    {
        row with
            Offsets = row.Offsets |> Seq.skip 1 |> Array.ofSeq
    }
]

let private shown (wrong: Diagnostic list) = wrong |> List.truncate 5 |> List.map string |> String.concat "\n"

let private legal name (plan: Lazy<PlanSet>) =
    testCase $"a plan of %s{name} passes"
    <| fun () -> Expect.equal (shown (Check.run plan.Value)) "" name

/// Is a damaged plan refused for more than its memory table?
let private passes (plan: PlanSet) =
    let plan = {
        plan with
            Memory = plan.Stages |> Seq.map (Lowering.Memory.row plan.Mesh) |> Array.ofSeq
    }

    (Check.run plan).IsEmpty

/// Runs take longer than checks: this many of a class, spread over all that pass.
let private runs = max 16 (Properties.cases / 10)

let private subjects = [
    Subjects.eight
    Subjects.experts
    Subjects.blocks
    Subjects.four
    Subjects.gpipe
    Subjects.deep
    Subjects.interleaved
    Subjects.remainders
    Subjects.reduced
    Subjects.paired
    Subjects.pairedChunks
]

let private refusedOrHarmless name (make: PlanSet -> Mutations.Mutant seq) =
    testCase $"%s{name}: refused, or harmless when run"
    <| fun () ->
        let mutants =
            subjects
            |> List.map (fun plan -> plan, make plan.Value |> Mutations.sample 50)
            |> List.collect (fun (plan, found) -> [ for m in found -> plan, m ])

        Expect.isGreaterThanOrEqual mutants.Length 100 "mutants"
        let passing = mutants |> List.filter (fun (_, m) -> passes m.Plan) |> Array.ofList
        let every = max 1 (passing.Length / runs)
        let baselines = System.Collections.Generic.Dictionary<PlanSet, Subjects.Outcome>(HashIdentity.Reference)

        passing
        |> Array.indexed
        |> Array.filter (fun (i, _) -> i % every = 0)
        |> Array.iter (fun (_, (plan, mutant)) ->
            let baseline =
                match baselines.TryGetValue plan.Value with
                | true, outcome -> outcome
                | false, _ ->
                    let outcome = (Subjects.run plan.Value).Value
                    baselines[plan.Value] <- outcome
                    outcome

            match Subjects.run mutant.Plan with
            | Some outcome -> Expect.isTrue (Subjects.same baseline outcome) $"%s{mutant.Note} changes the result"
            | None -> failtestf "%s breaks the run" mutant.Note)

/// The stage's program with one phase changed.
let private edited (plan: PlanSet) stage (phase: Phase) change = {
    plan with
        Stages =
            plan.Stages
            |> Seq.map (fun s ->
                if s.Stage <> stage then
                    s
                else
                    {
                        s with
                            Programs =
                                s.Programs
                                |> Seq.map (fun p ->
                                    if p.Phase = phase then
                                        {
                                            p with
                                                Steps = change (Array.ofSeq p.Steps)
                                        }
                                    else
                                        p)
                                |> Array.ofSeq
                    })
            |> Array.ofSeq
}

let private onlyCode code text plan =
    let wrong = Check.run plan
    Expect.isTrue (wrong |> List.exists (fun d -> d.Code = code && d.Message.Contains(text: string))) (shown wrong)

let private timetable (plan: PlanSet) stage (table: string) =
    let actions =
        table.Split ' '
        |> Array.map (fun word ->
            let phase = Phase.All |> Array.find (fun p -> p.Name = word.TrimEnd([| '0' .. '9' |]))
            let digits = word.Substring phase.Name.Length

            {
                Phase = phase
                Chunk = 0
                Microbatch = if digits = "" then 0 else int digits
            })

    {
        plan with
            Stages =
                plan.Stages
                |> Seq.map (fun s -> if s.Stage = stage then { s with Timetable = actions } else s)
                |> Array.ofSeq
    }

let private messages =
    testList "messages" [
        testCase "a deadlock names stages, actions and what they wait for"
        <| fun () ->
            // stage 0 wants the gradient of microbatch 0 before it has sent what stage 1 waits for
            let plan =
                timetable Subjects.eight.Value 0 "prologue F1 F0 I1 W1 S1 I0 W0 S0 F2 I2 W2 S2 F3 I3 W3 S3 epilogue"

            onlyCode Codes.PlanDeadlock "microbatch" plan

        testCase "a stage that waits for a message nobody sends is named"
        <| fun () ->
            let plan = Subjects.four.Value

            let isSend (step: Step) =
                match step with
                | Step.Start(_, kind, _, _, _, _) -> kind.IsSend
                | Step.Launch _
                | Step.Wait _
                | Step.Free _ -> false

            // both stages hold the gradient back until the end of W, where it is too late for the other's I
            let late (steps: Step[]) = Array.append (Array.filter (isSend >> not) steps) (Array.filter isSend steps)
            let program = plan.Stages[1].Programs |> Seq.find (fun p -> p.Phase.IsI)
            let sends = program.Steps |> Seq.filter isSend |> Array.ofSeq
            Expect.isNonEmpty sends "stage 1 sends gradients"
            Expect.isEmpty (Check.run (edited plan 1 (Phase.I 0) late)) "a late send is still in time"

            // GPipe on one stage and 1F1B on its neighbour: one waits for gradients, the other for activations
            let table =
                Timetable.build Schedule.OneFOneB (Timetable.plain 2 4)
                |> List.map (
                    List.map (fun (a: Action) -> a.Phase.Name + (if a.Phase.IsOnce then "" else string a.Microbatch))
                    >> String.concat " "
                )

            let early = "prologue F0 I0 W0 S0 F1 I1 W1 S1 F2 I2 W2 S2 F3 I3 W3 S3 epilogue"
            Expect.isEmpty (Check.run (timetable Subjects.eight.Value 1 table[1])) "the timetable it has"
            // stage 0 runs one microbatch at a time, stage 1 wants all activations first
            let both =
                timetable
                    (timetable Subjects.eight.Value 0 early)
                    1
                    "prologue F0 F1 F2 F3 I0 W0 S0 I1 W1 S1 I2 W2 S2 I3 W3 S3 epilogue"

            onlyCode
                Codes.PlanDeadlock
                "no stage can go on: stage 0 waits in W0 for number 0 of the messages from stage 1 to stage 0"
                both

        testCase "a second reduction of a gradient names slot and mesh axis"
        <| fun () ->
            let plan = Subjects.eight.Value

            let mutant =
                Mutations.classes
                |> List.find (fun (name, _) -> name = "a reduction repeated")
                |> snd
                |> fun make -> make plan |> Seq.head

            onlyCode Codes.PlanLayout "counted more than once" mutant.Plan

        testCase "a tied gradient that is not summed over its stages is told"
        <| fun () ->
            let plan = Subjects.eight.Value

            let dropped =
                Mutations.classes
                |> List.find (fun (name, _) -> name = "a reduction dropped")
                |> snd
                |> fun make -> make plan

            Expect.exists
                dropped
                (fun m ->
                    Check.run m.Plan
                    |> List.exists (fun d -> d.Code = Codes.PlanUpdate && d.Message.Contains "summed over stages"))
                "one of them"

        testCase "an epilogue without updates is told"
        <| fun () ->
            let plan = edited Subjects.experts.Value 0 Phase.Epilogue (fun _ -> [||])
            onlyCode Codes.PlanUpdate "is updated 0 times" plan

        testCase "a read before the wait is told"
        <| fun () ->
            let plan = Subjects.experts.Value
            let steps = edited plan 0 (Phase.F 0) (Array.filter (fun s -> not s.IsWait))
            onlyCode Codes.PlanLifetime "before the wait" steps

        testCase "one byte more or less anywhere in the memory table is told"
        <| fun () ->
            for subject in [ Subjects.four; Subjects.eight ] do
                let plan = subject.Value
                let mutable tried = 0

                for stage in 0 .. plan.Stages.Count - 1 do
                    for changed in tampered plan.Memory[stage] do
                        tried <- tried + 1

                        let plan = {
                            plan with
                                Memory =
                                    plan.Memory |> Seq.mapi (fun i r -> if i = stage then changed else r) |> Array.ofSeq
                        }

                        // everything else was checked: the memory table alone is enough
                        let findings = Checking.Shapes.Findings()
                        Checking.Memory.check findings plan

                        match findings.ToList() with
                        | [] -> failtestf "stage %i takes %A" stage changed
                        | found ->
                            for d in found do
                                Expect.equal d.Code Codes.PlanShape d.Message

                printfn "memory: %i changed tables, all told" tried

        testCase "a damaged memory table is told by the whole check"
        <| fun () ->
            let plan = Subjects.four.Value

            let less = {
                plan.Memory[2] with
                    Peak = plan.Memory[2].Peak - 1L
            }

            let plan = {
                plan with
                    Memory = plan.Memory |> Seq.map (fun r -> if r.Stage = 2 then less else r) |> Array.ofSeq
            }

            onlyCode Codes.PlanShape "memory table says a peak" plan

        testCase "slots that live at once never share bytes, and the arena is near what lives at most"
        <| fun () ->
            for name, plan in
                [
                    "four", Subjects.four
                    "eight", Subjects.eight
                    "gpipe", Subjects.gpipe
                    yield! Subjects.others
                ] do
                for row in plan.Value.Memory do
                    let share = float row.Arena / float row.Headroom
                    Expect.isGreaterThanOrEqual share 1.0 $"%s{name}: the arena holds what lives"

                    if row.Headroom > 1_000_000L then
                        printfn "%s stage %i: arena %.3f of what lives at most" name row.Stage share
                        Expect.isLessThan share 1.4 $"%s{name}: arena"

                    Expect.isLessThanOrEqual row.Peak row.Headroom $"%s{name}: headroom"
                    Expect.isLessThanOrEqual row.Headroom row.Worst $"%s{name}: worst case"

                    Expect.equal
                        (row.Parameters
                         + row.Optimizer
                         + row.Gradients
                         + row.Counters
                         + row.Activations
                         + row.Collectives)
                        row.Peak
                        $"%s{name}: kinds sum to the peak"

        testCase "a slice of what does not fall into blocks is told"
        <| fun () ->
            let plan = Subjects.eight.Value

            let cut (stage: StagePlan) =
                stage.Programs
                |> Seq.collect _.Steps
                |> Seq.pick (fun step ->
                    match step with
                    | Step.Launch(KernelId.LocalSlice, _, inputs, _, "model.embed_tokens") -> Some inputs[0]
                    | Step.Launch _
                    | Step.Start _
                    | Step.Wait _
                    | Step.Free _ -> None)

            let id = cut plan.Stages[0]

            // one id more than the vocabulary has: half of it, rounded down, is still what the slice makes
            let more (stage: StagePlan) = {
                stage with
                    Slots =
                        stage.Slots
                        |> Seq.map (fun s ->
                            if s.Id = id then
                                {
                                    s with
                                        Extents = [| s.Extents[0] + 1 |]
                                }
                            else
                                s)
                        |> Array.ofSeq
            }

            let plan = {
                plan with
                    Stages = [| more plan.Stages[0]; yield! Seq.tail plan.Stages |]
            }

            onlyCode Codes.PlanLayout "do not fall into 2 blocks" plan

        testCase "an update beside a remainder reads its own weight: every other is told"
        <| fun () ->
            let mutants = Mutations.changeWeight Subjects.remainders.Value |> Mutations.sample 400
            Expect.isGreaterThan mutants.Length 100 "mutants"

            for m in mutants do
                Expect.isFalse (passes m.Plan) m.Note

        testCase "two slots moved onto each other are told by name"
        <| fun () ->
            let plan = Subjects.four.Value
            let row = plan.Memory[0]
            let lifetimes = Lowering.Arena.lifetimes plan.Stages[0]

            let kept =
                [ 0 .. row.Offsets.Count - 1 ]
                |> List.filter (fun id ->
                    match lifetimes[id] with
                    | Lowering.Arena.Lifetime.Plan -> true
                    | _other -> false)

            let offsets = Array.ofSeq row.Offsets
            offsets[kept[1]] <- offsets[kept[0]]

            let plan = {
                plan with
                    Memory = [| { row with Offsets = offsets }; yield! Seq.tail plan.Memory |]
            }

            onlyCode Codes.PlanShape "share bytes" plan

        testCase "an id beyond the list is told, not followed"
        <| fun () ->
            let plan = edited Subjects.experts.Value 0 (Phase.F 0) (Array.insertAt 0 (Step.Free 999_999))
            onlyCode Codes.PlanShape "999999" plan
    ]

/// The plan with the steps of one rank changed where they start a message.
let private regrouped (change: Group -> int option) (plan: PlanSet) = {
    plan with
        Stages =
            plan.Stages
            |> Seq.map (fun stage -> {
                stage with
                    Programs =
                        stage.Programs
                        |> Seq.map (fun program -> {
                            program with
                                Steps =
                                    program.Steps
                                    |> Seq.map (fun step ->
                                        match step with
                                        | Step.Start(token, kind, group, inputs, outputs, path) ->
                                            let group = change plan.Groups[group] |> Option.defaultValue group
                                            Step.Start(token, kind, group, inputs, outputs, path)
                                        | Step.Launch _
                                        | Step.Wait _
                                        | Step.Free _ -> step)
                                    |> Array.ofSeq
                        })
                        |> Array.ofSeq
            })
            |> Array.ofSeq
}

let private chunks =
    testList "chunks" [
        testCase "each direction and distance between two ranks has its own group"
        <| fun () ->
            let plan = Subjects.interleaved.Value
            let messages = plan.Groups |> Seq.filter (fun g -> g.Name.Contains '>') |> Seq.map _.Name |> Set
            Expect.equal messages (Set [ "pp.0>1"; "pp.1>0"; "pp.1>0+1"; "pp.0>1-1" ]) "groups"

            for stage in plan.Stages do
                Expect.equal (List.ofSeq (stage.Timetable |> Seq.map _.Chunk |> Seq.distinct)) [ 0; 1 ] "both chunks"

        testCase "a chunk passes values to the next one on its rank without a message"
        <| fun () ->
            let plan = Subjects.folded.Value

            let kinds = [
                for p in plan.Stages[0].Programs -> p.Steps |> Seq.filter _.IsStart |> Seq.length
            ]

            Expect.equal (List.distinct kinds) [ 0 ] "no collective at all"
            Expect.equal plan.Stages[0].Units "Et|t|tmL" "one rank, three chunks"

        testCase "messages of two chunks that change places on one rank only are refused"
        <| fun () ->
            let plan = Subjects.interleaved.Value
            let table = Array.ofSeq plan.Stages[0].Timetable
            let place chunk i = table |> Array.findIndex (fun a -> a.Phase.IsF && a.Chunk = chunk && a.Microbatch = i)
            // F of microbatch 1 in chunk 0 and of microbatch 0 in chunk 1: stage 0 could run either first
            let a, b = place 0 1, place 1 0
            let swapped = table |> Array.updateAt a table[b] |> Array.updateAt b table[a]

            let plan = {
                plan with
                    Stages =
                        plan.Stages
                        |> Seq.map (fun s -> if s.Stage = 0 then { s with Timetable = swapped } else s)
                        |> Array.ofSeq
            }

            onlyCode Codes.PlanDeadlock "of the messages from stage 0 to stage 1 in group pp.0>1" plan

        testCase "one group for what goes around and what goes back is refused where its order differs between the ends"
        <| fun () ->
            // groups of two microbatches keep both ranks in step, larger ones do not
            let plan = Subjects.woven 4
            let id name = plan.Groups |> Seq.find (fun g -> g.Name = name) |> _.Id
            Expect.isEmpty (Check.run plan) "apart"

            for from, into in [ "pp.1>0+1", "pp.1>0"; "pp.0>1-1", "pp.0>1" ] do
                plan
                |> regrouped (fun g -> if g.Name = from then Some(id into) else None)
                |> onlyCode Codes.PlanDeadlock $"in group %s{into}"

        testCase "a message in the group of the other direction is refused"
        <| fun () ->
            let plan = Subjects.eight.Value
            let id name = plan.Groups |> Seq.find (fun g -> g.Name = name) |> _.Id
            let both = plan |> regrouped (fun g -> if g.Name = "pp.0>1" then Some(id "pp.1>0") else None)
            onlyCode Codes.PlanShape "is not for messages from stage 0 to 1" both

        testCase "a sum in a group of messages is refused"
        <| fun () ->
            let plan = Subjects.four.Value
            let group name = plan.Groups |> Seq.find (fun g -> g.Name = name)
            let tied = plan.Groups |> Seq.find (fun g -> g.Stages.Count = 2 && g.Name.Contains '-')
            let other = group $"pp.%i{tied.Stages[0]}>%i{tied.Stages[0] + 1}"
            let mixed = plan |> regrouped (fun g -> if g.Id = tied.Id then Some other.Id else None)
            Expect.isFalse (passes mixed) "refused"

        testCase "a tied parameter is one slot of its rank, with one accumulator and one update"
        <| fun () ->
            let plan = Subjects.folded.Value
            let stage = plan.Stages[0]
            let embedding = plan.Parameters |> Seq.find (fun p -> p.Name.Contains "embed")
            Expect.equal (List.ofSeq embedding.Stages) [ 0 ] "stages"
            let gradient = stage.Slots |> Seq.filter (fun s -> s.Name = "grad:" + embedding.Name) |> Seq.exactlyOne

            let added = [
                for p in stage.Programs do
                    for step in p.Steps do
                        match step with
                        | Step.Launch(KernelId.Accumulate, _, _, outputs, _) when outputs[0] = gradient.Id -> p.Name
                        | Step.Launch _
                        | Step.Start _
                        | Step.Wait _
                        | Step.Free _ -> ()
            ]

            Expect.equal (List.sort added) [ "W"; "W@2" ] "added by the embedding and by MTP"

        testCase "DeepSeek-V3 in the H100 benchmark's layout: 1024 ranks of PP 8 x VP 4 pass, and each has its memory"
        <| fun () ->
            let plan = Subjects.benchmark.Value
            Expect.isEmpty (Check.run plan) "check"
            Expect.equal (Mesh.world plan.Mesh) 1024 "ranks"
            Expect.equal (plan.Chunks, plan.Schedule) (4, "Interleaved1F1B") "schedule"
            Expect.equal plan.Stages[0].Units "Et|tt|tt|tt" "first"
            Expect.equal plan.Stages[7].Units "tt|tt|tt|mL" "last"

            for row in plan.Memory do
                let gib (bytes: int64) = float bytes / float (1L <<< 30)

                printfn
                    "rank %i %-12s parameters %6.2f gradients %6.2f optimizer %6.2f activations %6.2f peak %6.2f GiB"
                    row.Stage
                    plan.Stages[row.Stage].Units
                    (gib row.Parameters)
                    (gib row.Gradients)
                    (gib row.Optimizer)
                    (gib row.Activations)
                    (gib row.Peak)

            // warm-up falls from rank to rank, and with it what is held; ranks 0 and 1 have the dense layers
            let alike = plan.Memory |> Seq.skip 2 |> Seq.truncate 5 |> Seq.map _.Activations |> List.ofSeq
            Expect.equal alike (List.sortDescending alike) "activations fall from rank 2 to 6"
    ]

let tests =
    testList "Plan.Check" [
        for name, plan in
            [
                "eight ranks", Subjects.eight
                "experts", Subjects.experts
                "four stages", Subjects.four
                "GPipe", Subjects.gpipe
                "fourteen stages", Subjects.deep
                "two chunks on each of two ranks", Subjects.interleaved
                "three chunks on one rank", Subjects.folded
                "forwards beside backwards", Subjects.paired
                "forwards beside backwards, by chunks", Subjects.pairedChunks
            ]
            @ Subjects.others do
            legal name plan

        messages
        chunks

        testSequenced (testList "damaged plans" [ for name, make in Mutations.classes -> refusedOrHarmless name make ])

        Properties.propertyOver
            [ typeof<Plans.Arbitraries> ]
            "random data never crashes the check"
            (fun (plan: PlanSet) -> not (Check.run plan).IsEmpty)

        testCase "the plan of 1024 ranks is checked within seconds"
        <| fun () ->
            let plan = (List.last Subjects.others |> snd).Value
            let clock = Stopwatch.StartNew()
            Expect.isEmpty (Check.run plan) ""
            Expect.isLessThan clock.ElapsedMilliseconds 30_000L "ms"
    ]

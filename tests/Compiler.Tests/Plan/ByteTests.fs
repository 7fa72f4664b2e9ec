/// One byte count changed anywhere in a plan of sixteen stages, one at a time: the check refuses every such plan.
module DeepSeekGraph.Compiler.Tests.ByteTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Lowering
open DeepSeekGraph.Models

/// Everything is tried with the whole check on the 671B plan: minutes instead of seconds.
let private thorough = Environment.GetEnvironmentVariable "DSG_WHOLE_CHECK" = "1"

let private subject = if thorough then lazy Recipes.Pretrain.Compile() else Subjects.sixteen

let private at i change items = items |> Seq.mapi (fun k x -> if k = i then change x else x) |> Array.ofSeq

let private withRow (plan: PlanSet) stage row = {
    plan with
        Memory = plan.Memory |> at stage (fun _ -> row)
}

let private withStage (plan: PlanSet) stage change = {
    plan with
        Stages = plan.Stages |> at stage change
}

/// The stage's line of the memory table with one number changed by the least that is one: a byte, a frame, a place.
let private rows (stage: StagePlan) (row: MemoryRow) : (string * MemoryRow) list =
    let region i change = {
        row with
            Regions = row.Regions |> at i change
    }

    let offset i change = {
        row with
            Offsets = row.Offsets |> at i change
    }

    let lifetimes = Arena.lifetimes stage

    /// The first slot of each kind and lifetime.
    let places =
        stage.Slots
        |> Seq.map _.Id
        |> Seq.distinctBy (fun id ->
            let lifetime =
                match lifetimes[id] with
                | Arena.Lifetime.Never -> "never"
                | Arena.Lifetime.Plan -> "plan"
                | Arena.Lifetime.Within _ -> "within"
                | Arena.Lifetime.Across _ -> "across"

            string stage.Slots[id].Kind, stage.Slots[id].Routed, lifetime)
        |> List.ofSeq

    [
        "parameters",
        {
            row with
                Parameters = row.Parameters + 1L
        }
        "optimizer",
        {
            row with
                Optimizer = row.Optimizer - 1L
        }
        "gradients",
        {
            row with
                Gradients = row.Gradients + 1L
        }
        "counters",
        {
            row with
                Counters = row.Counters - 1L
        }
        "activations",
        {
            row with
                Activations = row.Activations + 1L
        }
        "collectives",
        {
            row with
                Collectives = row.Collectives - 1L
        }
        "peak", { row with Peak = row.Peak + 1L }
        "headroom",
        {
            row with
                Headroom = row.Headroom - 1L
        }
        "worst", { row with Worst = row.Worst + 1L }
        "arena", { row with Arena = row.Arena + 1L }
        for i in 0 .. row.Regions.Count - 1 do
            $"base of region %i{i}", region i (fun r -> { r with Base = r.Base + 1L })
            $"stride of region %i{i}", region i (fun r -> { r with Stride = r.Stride + 1L })
            $"frames of region %i{i}", region i (fun r -> { r with Count = r.Count + 1 })
        for id in places do
            $"offset of slot %i{id}", offset id (fun o -> o + 1L)
    ]

/// A slot of each kind with one element more along its last axis.
let private slots (stage: StagePlan) : (string * StagePlan) list = [
    let kinds =
        stage.Slots
        |> Seq.filter (fun s -> s.Extents.Count > 0)
        |> Seq.distinctBy (fun s -> string s.Kind, s.Routed)

    for slot in kinds ->
        $"extent of %%%i{slot.Id} (%O{slot.Kind})",
        {
            stage with
                Slots =
                    stage.Slots
                    |> at slot.Id (fun s -> {
                        s with
                            Extents = s.Extents |> at (s.Extents.Count - 1) ((+) 1)
                    })
        }
]

/// The first bundle of each kind of collective carries one value less; one operand more.
let private bundles (stage: StagePlan) : (string * StagePlan) list = [
    let places =
        Seq.indexed stage.Programs
        |> Seq.collect (fun (p, program) -> program.Steps |> Seq.indexed |> Seq.map (fun (i, step) -> p, i, step))
        |> Seq.choose (fun (p, i, step) ->
            match step with
            | Step.Start(token, kind, group, inputs, outputs, path) when kind.TakesTuples && outputs.Count > 1 ->
                Some(p, i, kind, (fun ins outs -> Step.Start(token, kind, group, ins, outs, path)), inputs, outputs)
            | Step.Start _
            | Step.Launch _
            | Step.Wait _
            | Step.Free _ -> None)
        |> Seq.distinctBy (fun (_, _, kind, _, _, _) -> kind.ToString())

    for p, i, kind, make, inputs, outputs in places do
        let put step = {
            stage with
                Programs =
                    stage.Programs
                    |> at p (fun program -> {
                        program with
                            Steps = program.Steps |> at i (fun _ -> step)
                    })
        }

        let each = inputs.Count / outputs.Count
        $"a value less, %O{kind}", put (make (Array.ofSeq (Seq.skip each inputs)) (Array.ofSeq (Seq.skip 1 outputs)))

        $"an operand more, %O{kind}",
        put (make (Array.append (Array.ofSeq inputs) [| inputs[0] |]) (Array.ofSeq outputs))
]

let private refused name (plan: PlanSet) =
    let wrong = Check.run plan
    Expect.isNonEmpty wrong name
    wrong |> List.map string

/// What the check of memory says of one stage by itself.
let private alone (plan: PlanSet) (stage: StagePlan) row =
    let findings = Checking.Shapes.Findings()

    Checking.Memory.check findings {
        plan with
            Stages = [| stage |]
            Memory = [| row |]
    }

    findings.ToList() |> List.map string

let tests =
    testList "bytes" [
        testCase
            "one number of the memory table changed, in any of sixteen stages, is refused (DSG_WHOLE_CHECK=1: of the 671B plan)"
        <| fun () ->
            let plan = subject.Value
            Expect.equal plan.Stages.Count 16 "stages"
            Expect.isEmpty (Check.run plan) "the plan itself"
            let mutable tried = 0

            for stage in plan.Stages do
                let changed = rows stage plan.Memory[stage.Stage]
                Expect.isEmpty (alone plan stage plan.Memory[stage.Stage]) "a stage by itself"

                for i, (what, row) in List.indexed changed do
                    let name = $"stage %i{stage.Stage}: %s{what}"
                    let told = alone plan stage row
                    Expect.isNonEmpty told name
                    tried <- tried + 1

                    // memory is checked stage by stage, behind everything else: each number is tried with the whole check on some stage
                    if thorough || i % plan.Stages.Count = stage.Stage then
                        Expect.equal (refused name (withRow plan stage.Stage row)) told name

            printfn $"memory: %i{tried} changed numbers, all told"

        testCase "one element more in a slot, one value less in a bundle, in any of sixteen stages, is refused"
        <| fun () ->
            let plan = subject.Value
            let mutable tried = 0

            for stage in plan.Stages do
                let changed = slots stage @ bundles stage

                for i, (what, changed) in List.indexed changed do
                    // every stage has some of each, and every kind is tried on some stage
                    if thorough || i % 8 = stage.Stage % 8 then
                        refused $"stage %i{stage.Stage}: %s{what}" (withStage plan stage.Stage (fun _ -> changed))
                        |> ignore

                        tried <- tried + 1

            printfn $"slots and bundles: %i{tried} changes, all told"
    ]

/// Everything that must hold of a plan before it runs: well formed, no race, no deadlock, every value where it is said to be.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Check

open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking

/// The memory table must be what the slots, programs and timetable come to.
let private checkMemory (findings: Shapes.Findings) (plan: PlanSet) =
    let rows = plan.Stages |> Seq.map Lowering.Memory.row |> List.ofSeq

    if List.ofSeq plan.Memory <> rows then
        for row in rows do
            match plan.Memory |> Seq.tryFind (fun r -> r.Stage = row.Stage) with
            | Some said when said = row -> ()
            | Some said ->
                findings.Add(
                    Codes.PlanShape,
                    $"stage %i{row.Stage}",
                    $"the memory table says a peak of %i{said.Peak} bytes, its steps come to %i{row.Peak}, or a row differs"
                )
            | None -> findings.Add(Codes.PlanShape, $"stage %i{row.Stage}", "the memory table has no row for it")

        if plan.Memory.Count <> rows.Length then
            findings.Add(
                Codes.PlanShape,
                "memory",
                $"the memory table has %i{plan.Memory.Count} rows for %i{rows.Length} stages"
            )

/// What is wrong with a plan; empty when it can run.
/// Ranks of a stage run one program and differ in coordinates only, so one rank of each stage stands for all.
let run (plan: PlanSet) : Diagnostic list =
    let findings = Shapes.Findings()
    Shapes.check findings plan

    // the other checks index by ids and look up programs, which must be there
    if findings.Count = 0 then
        Layouts.check findings plan
        Lifetimes.check findings plan

    // messages and sums are walked only when their operands are
    if findings.Count = 0 then
        Messages.check findings plan
        Updates.check findings plan

    if findings.Count = 0 then
        checkMemory findings plan

    findings.ToList()

/// Everything that must hold of a plan before it runs: well formed, no race, no deadlock, every value where it is said to be.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Check

open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking

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
        Memory.check findings plan

    findings.ToList()

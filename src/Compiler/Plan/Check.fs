/// Everything that must hold of a plan before it runs: well formed, no race, no deadlock, every value where it is said to be.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Check

open System.Threading.Tasks
open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking

/// A check under way: what it finds. Checks share nothing, so that they run side by side.
let private start (plan: PlanSet) (check: Shapes.Findings -> PlanSet -> unit) : Task<Diagnostic list> =
    Task.Run(fun () ->
        let findings = Shapes.Findings()
        check findings plan
        findings.ToList())

/// What checks find, in their order.
let private found (checks: Task<Diagnostic list> list) : Diagnostic list =
    checks |> List.collect _.GetAwaiter().GetResult()

/// What is wrong with a plan; empty when it can run.
/// Ranks of a stage run one program and differ in coordinates only, so one rank of each stage stands for all.
let run (plan: PlanSet) : Diagnostic list =
    let start = start plan

    // the other checks index by ids and look up programs, which must be there
    match found [ start Shapes.check ] with
    | [] ->
        match found [ start Layouts.check; start Padding.check; start Lifetimes.check ] with
        | [] ->
            // messages and sums are walked only when their operands are; what memory comes to is asked only when those fit
            let memory = start Memory.check

            match found [ start Paths.check; start Messages.check; start Updates.check ] with
            | [] -> found [ memory ]
            | wrong -> wrong
        | wrong -> wrong
    | wrong -> wrong

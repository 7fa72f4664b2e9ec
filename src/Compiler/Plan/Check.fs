/// Everything that must hold of a plan before it runs: well formed, no race, no deadlock, every value where it is said to be.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Check

open System.Threading.Tasks
open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking

/// What these checks find, in their order. They share nothing, so that they run side by side.
let private together (plan: PlanSet) (checks: (Shapes.Findings -> PlanSet -> unit) list) : Diagnostic list list =
    checks
    |> List.map (fun check ->
        Task.Run(fun () ->
            let findings = Shapes.Findings()
            check findings plan
            findings.ToList()))
    |> List.map _.GetAwaiter().GetResult()

/// What is wrong with a plan; empty when it can run.
/// Ranks of a stage run one program and differ in coordinates only, so one rank of each stage stands for all.
let run (plan: PlanSet) : Diagnostic list =
    // the other checks index by ids and look up programs, which must be there
    match together plan [ Shapes.check ] |> List.concat with
    | [] ->
        match together plan [ Layouts.check; Lifetimes.check ] |> List.concat with
        | [] ->
            // messages and sums are walked only when their operands are; what memory comes to means nothing before they fit
            match together plan [ Messages.check; Updates.check; Memory.check ] with
            | [ []; []; memory ] -> memory
            | wrong -> wrong |> List.truncate 2 |> List.concat
        | wrong -> wrong
    | wrong -> wrong

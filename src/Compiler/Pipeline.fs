/// THE list of passes from a declared graph to a checked plan, as data: run, printed and dumped from this one list.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open System.Runtime.ExceptionServices
open System.Threading.Tasks
open DeepSeekGraph
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Compiler.Lowering

/// What a pass works on.
[<RequireQualifiedAccess>]
type Form =
    /// Unsharded: forward only, or forward and backward.
    | Logical of Graph
    /// One rank's shards with their layouts.
    | Local of Partitioned
    | Plan of PlanSet

/// A job between two passes.
type Progress = {
    Recipe: Recipe
    Mesh: MeshInfo
    Schedule: Schedule
    Pipeline: PipelineShape
    Form: Form
    /// As the recipe says, or for `auto` what was chosen.
    Dispatcher: Dispatcher
    /// Units of each stage of the model; empty before the cut.
    Stages: LayoutUnit list list
    /// How often each fusion rule was applied.
    Fusions: (string * int) list
    /// What a budget made the recompute pass choose.
    Recomputed: RecomputeBudget.Outcome option
}

/// One step of a compilation. What it leaves is verified while the next one runs, whose result then counts only if that held.
type Pass = {
    Name: string
    /// Why it stands where it does.
    Why: string
    Run: Progress -> Result<Progress, Diagnostic list>
}

/// What a compilation made beside the plan: for tests, dumps and summaries.
type Compiled = {
    Plan: PlanSet
    /// Forward graph after precision and fusion.
    Forward: Graph
    /// Forward and backward, logical.
    Joint: Graph
    /// One rank's graph.
    Local: Partitioned
    /// How often each fusion rule was applied.
    Fusions: (string * int) list
    /// What a budget made the recompute pass choose.
    Recomputed: RecomputeBudget.Outcome option
}

[<RequireQualifiedAccess>]
module Pipeline =
    let private logical (progress: Progress) =
        match progress.Form with
        | Form.Logical graph -> graph
        | Form.Local _
        | Form.Plan _ -> invalidOp "this pass stands before the partition (a bug in dsg)"

    /// Graph to graph.
    let private onGraph name why (change: Progress -> Graph -> Graph) = {
        Name = name
        Why = why
        Run =
            fun progress ->
                Ok {
                    progress with
                        Form = Form.Logical(change progress (logical progress))
                }
    }

    /// What a plan that generates has no use for.
    let private training (pass: Pass) = {
        pass with
            Run = fun progress -> if progress.Recipe.Mode.IsTrain then pass.Run progress else Ok progress
    }

    let private lower (progress: Progress) (local: Partitioned) =
        Lower.run
            {
                Recipe = progress.Recipe
                Mesh = progress.Mesh
                Stages = progress.Stages
                Schedule = progress.Schedule
                Shape = progress.Pipeline
            }
            local

    /// Will mesh axes split parameters along this axis? (No dispatcher changes that.)
    let private isSplit (progress: Progress) (axis: string) =
        (AxisMap.ofMesh progress.Mesh).Parameters
        |> Map.tryFind axis
        |> Option.exists (fun axes -> Layout.size progress.Mesh axes > 1)

    let private partition (progress: Progress) (joint: Graph) =
        let recipe = progress.Recipe

        Dispatching.choose recipe progress.Mesh joint (fun dispatcher ->
            Propagate.run (AxisMap.create recipe.SequenceParallel dispatcher progress.Mesh) joint)

    let private dispatch (progress: Progress) (dispatcher: Dispatcher) (local: Partitioned) =
        if dispatcher.IsFlex then FusedDispatch.run progress.Recipe.RanksPerNode local else local

    /// The recipe's names; with a budget, whatever else it takes, found by compiling on.
    let private recompute (progress: Progress) : Result<Progress, Diagnostic list> =
        let joint = logical progress
        let recipe = progress.Recipe

        let outcome =
            if recipe.RecomputeBudget = 0L then
                Ok None
            else
                let stageOf = Lower.stageOf progress.Stages

                RecomputeBudget.choose
                    recipe
                    recipe.RecomputeBudget
                    (fun part ->
                        let stage = stageOf part
                        struct (stage % progress.Mesh.Pipeline, stage / progress.Mesh.Pipeline))
                    (let struct (_, plain) = partition progress joint in plain.Graph)
                    (fun policy ->
                        let struct (dispatcher, local) = partition progress (Recompute.run policy joint)
                        let local = dispatch progress dispatcher local
                        let plan = lower progress local

                        {
                            Local = local
                            Stages = plan.Stages
                            Memory = plan.Memory
                        })
                |> Result.map Some

        outcome
        |> Result.map (fun outcome ->
            let choices = outcome |> Option.map _.Choices |> Option.defaultValue []

            {
                progress with
                    Form = Form.Logical(Recompute.run (RecomputeBudget.policy recipe choices) joint)
                    Recomputed = outcome
            })

    /// The plan, and in its recipe's lines what was chosen on the way.
    let private recorded (progress: Progress) (plan: PlanSet) =
        match progress.Recomputed with
        | None -> plan
        | Some outcome -> {
            plan with
                Recipe = [|
                    yield! plan.Recipe
                    yield! RecomputeBudget.explain progress.Recipe.RecomputeBudget outcome plan.Memory
                |]
          }

    /// THE list of passes, in order.
    let passes: Pass list = [
        onGraph "prune" "first: what no output needs would be cast, fused and differentiated for nothing" (fun _ ->
            Rewrite.prune)
        onGraph "precision" "before fusion and gradients, which then see final element types" (fun progress ->
            Precision.run progress.Recipe.DType)
        {
            Name = "generate"
            Why =
                "after precision, which goes by how parameters change: without objectives there is no backward pass, and none does"
            Run =
                fun progress ->
                    if progress.Recipe.Mode.IsTrain then
                        Ok progress
                    else
                        Generation.run (logical progress)
                        |> Result.map (fun graph -> {
                            progress with
                                Form = Form.Logical graph
                        })
        }
        {
            Name = "fuse"
            Why = "before gradients: a fused op brings its own gradient rule"
            Run =
                fun progress ->
                    let rules =
                        Fusion.Rules.under (isSplit progress)
                        |> List.filter (fun rule -> progress.Recipe.Fusions.Takes rule.Name)

                    let fused, counts = Fusion.Fuse.by rules (logical progress)

                    Ok {
                        progress with
                            Form = Form.Logical fused
                            Fusions = counts
                    }
        }
        {
            Name = "stages"
            Why = "on the forward graph: its FLOPs are what a cut by cost balances"
            Run =
                fun progress ->
                    Stages.run
                        progress.Recipe.Layout
                        progress.Pipeline.Ranks
                        progress.Pipeline.Chunks
                        (logical progress)
                    |> Result.map (fun stages -> { progress with Stages = stages })
        }
        {
            Name = "context"
            Why =
                "before gradients: what is gathered for keys forward is then a partial sum backward, reduced where it came from"
            Run =
                fun progress ->
                    ContextParallel.run progress.Mesh (logical progress)
                    |> Result.map (fun graph ->
                        if obj.ReferenceEquals(graph, logical progress) then
                            progress
                        else
                            {
                                progress with
                                    Form = Form.Logical graph
                            })
        }
        training {
            Name = "differentiate"
            Why = "on unsharded math, so that every collective of the backward pass falls out of the partition"
            Run =
                fun progress ->
                    Autodiff.differentiate "loss" (logical progress)
                    |> Result.map (fun joint -> {
                        progress with
                            Form = Form.Logical joint
                    })
        }
        training (
            onGraph
                "losses"
                "once a loss has its cotangent: where that does not depend on the loss, one op gives both loss and gradient, of one set of logits"
                (fun _ -> Fusion.Losses.run)
        )
        onGraph
            "fp8"
            "once the backward pass has products of its own to round; before recomputation, which then makes rounded operands again"
            (fun progress -> Fp8.run progress.Recipe.Fp8Block)
        training {
            Name = "recompute"
            Why =
                "once there is a backward pass, while values are still logical; what it makes needless is dead before it costs collectives"
            Run = recompute
        }
        {
            Name = "partition"
            Why =
                "once forward and backward are one graph: one rule shards both, a collective wherever two layouts disagree"
            Run =
                fun progress ->
                    let struct (dispatcher, local) = partition progress (logical progress)

                    Ok {
                        progress with
                            Form = Form.Local local
                            Dispatcher = dispatcher
                    }
        }
        {
            Name = "dispatch"
            Why =
                "once exchanges of rows are there: flex makes one dispatch and one combine of them and their permutations"
            Run =
                fun progress ->
                    match progress.Form with
                    | Form.Local local when progress.Dispatcher.IsFlex ->
                        Ok {
                            progress with
                                Form = Form.Local(dispatch progress progress.Dispatcher local)
                        }
                    | Form.Local _
                    | Form.Logical _
                    | Form.Plan _ -> Ok progress
        }
        {
            Name = "lower"
            Why =
                "last: slots, programs, timetables, epilogue and memory of stages; the plan is then proven anew from its text alone"
            Run =
                fun progress ->
                    match progress.Form with
                    | Form.Local local ->
                        Ok {
                            progress with
                                Form = Form.Plan(lower progress local |> recorded progress)
                        }
                    | Form.Logical _
                    | Form.Plan _ -> invalidOp "lowering follows the partition (a bug in dsg)"
        }
    ]

    /// The invariants of a form; empty for a legal one.
    let verify (mesh: MeshInfo) (form: Form) : Diagnostic list =
        match form with
        | Form.Logical graph -> Verify.check graph
        | Form.Local local ->
            match Verify.check local.Graph with
            | [] -> Checking.Layouts.checkGraph mesh local
            | wrong -> wrong
        | Form.Plan plan -> Check.run plan

    /// The invariants of what a pass left, as diagnostics that name it.
    let private verified (pass: string) (progress: Progress) : Diagnostic list = [
        for d in verify progress.Mesh progress.Form ->
            {
                d with
                    At = $"after pass %s{pass}, %s{d.At}"
            }
    ]

    let private start (recipe: Recipe) (declared: Graph) : Result<Progress, Diagnostic list> =
        Mesh.create recipe.Degrees
        |> Result.bind (fun mesh ->
            let wrong =
                List.concat [
                    Verify.check declared
                    RecipeCheck.unsupported recipe
                    Recompute.check (List.ofSeq recipe.Recompute)
                    Fusion.Fuse.check recipe.Fusions
                    RecipeCheck.divides recipe mesh declared
                    RecipeCheck.fp8Blocks recipe mesh declared
                ]

            match wrong, RecipeCheck.pipeline recipe mesh with
            | [], Ok(struct (schedule, pipeline)) ->
                Ok {
                    Recipe = recipe
                    Mesh = mesh
                    Schedule = schedule
                    Pipeline = pipeline
                    Form = Form.Logical declared
                    Dispatcher = recipe.Dispatcher
                    Stages = []
                    Fusions = []
                    Recomputed = None
                }
            | [], Error wrong
            | wrong, _ -> Error wrong)

    /// A job between two passes, and the proof of its form, which is under way while the next pass runs.
    type private Underway = {
        Progress: Progress
        Proof: Task<Diagnostic list>
    }

    /// The next pass. What is wrong with its operand comes first, whatever the pass made of it.
    let private next (observe: string -> Progress -> unit) (before: Underway) (pass: Pass) =
        let outcome =
            try
                Choice1Of2(pass.Run before.Progress)
            with fault ->
                Choice2Of2(ExceptionDispatchInfo.Capture fault)

        match before.Proof.GetAwaiter().GetResult(), outcome with
        | [], Choice1Of2(Ok after) ->
            // what did not change was verified before
            let proof =
                if obj.ReferenceEquals(after.Form, before.Progress.Form) then
                    before.Proof
                else
                    Task.Run(fun () -> verified pass.Name after)

            observe pass.Name after
            Ok { Progress = after; Proof = proof }
        | [], Choice1Of2(Error wrong) -> Error wrong
        | [], Choice2Of2 fault ->
            fault.Throw()
            Error []
        | wrong, _ -> Error wrong

    /// Runs all passes; `observe` sees the form that each leaves, numbered from 1, and the declared graph as number 0.
    let observed
        (observe: int -> string -> Progress -> unit)
        (recipe: Recipe)
        (declared: Graph)
        : Result<Progress, Diagnostic list> =
        let begun =
            start recipe declared
            |> Result.map (fun progress ->
                observe 0 "declared" progress

                {
                    Progress = progress
                    Proof = Task.FromResult []
                })

        passes
        |> List.indexed
        |> List.fold
            (fun state (i, pass) -> state |> Result.bind (fun before -> next (observe (i + 1)) before pass))
            begun
        |> Result.bind (fun last ->
            match last.Proof.GetAwaiter().GetResult() with
            | [] -> Ok last.Progress
            | wrong -> Error wrong)

    /// The plan of a declared graph and what came before it.
    let run (recipe: Recipe) (declared: Graph) : Result<Compiled, Diagnostic list> =
        let seen = Dictionary<string, Form>()

        observed (fun _ name progress -> seen[name] <- progress.Form) recipe declared
        |> Result.map (fun progress ->
            match progress.Form, seen["fuse"], seen["recompute"], seen["dispatch"] with
            | Form.Plan plan, Form.Logical forward, Form.Logical joint, Form.Local local -> {
                Plan = plan
                Forward = forward
                Joint = joint
                Local = local
                Fusions = progress.Fusions
                Recomputed = progress.Recomputed
              }
            | _unfinished -> invalidOp "the last pass made no plan (a bug in dsg)")

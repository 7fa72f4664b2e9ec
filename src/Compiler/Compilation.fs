/// The C#-facing entry: graph + recipe -> plan. Pipeline.fs has the passes.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Compiler.Lowering

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
}

[<RequireQualifiedAccess>]
module Pipeline =
    let private divides (recipe: Recipe) (mesh: MeshInfo) (graph: Graph) : Diagnostic list =
        let map = AxisMap.ofMesh mesh
        let tokens = Map.find "residual" map.Anchors

        let checks = [
            for node in graph.Nodes do
                match node.Op with
                | Op.Parameter(spec, t) ->
                    for a in t.Axes do
                        match Map.tryFind a.Name map.Parameters with
                        | Some axes -> spec.Name, a, axes
                        | None -> ()
                | Op.Anchor name when name = "residual" ->
                    for a in graph.Types[node.Outputs[0]].Axes do
                        match Map.tryFind a.Name tokens with
                        | Some axes -> node.Origin.Path, a, axes
                        | None -> ()
                | _other -> ()
        ]

        [
            for path, axis, axes in checks do
                let size = Layout.size mesh axes

                if axis.Extent % size <> 0 then
                    let names = axes |> List.map (fun m -> mesh.Axes[m].Name) |> String.concat " x "

                    let legal = [
                        for n in 1 .. axis.Extent do
                            if axis.Extent % n = 0 && n <= 4096 then
                                string n
                    ]

                    {
                        Code = Codes.NotDivisible
                        At = $"%s{path}, recipe %s{recipe.Name}"
                        Message =
                            $"axis '%s{axis.Name}' (%i{axis.Extent}) does not split over mesh axes %s{names} (%i{size})"
                        Help = $"""choose a product of degrees from %s{String.concat " " legal}"""
                    }
        ]
        |> List.distinctBy (fun d -> d.Message)

    let private notCompiled setting message help = {
        Code = Codes.NotCompiledYet
        At = $"recipe.%s{setting}"
        Message = message + " is not compiled yet"
        Help = help
    }

    /// Settings that no pass carries out: refused, never ignored.
    let private unsupported (recipe: Recipe) (mesh: MeshInfo) : Diagnostic list = [
        for name, degree in [ "context", mesh.Context; "expert_tensor", mesh.ExpertTensor ] do
            if degree > 1 then
                notCompiled name $"%s{name} parallelism of %i{degree}" "choose 1"
        if recipe.Dispatcher <> Dispatcher.AllToAll then
            notCompiled "dispatcher" $"the dispatcher %s{recipe.Dispatcher.Name}" "choose alltoall"
        if not recipe.SequenceParallel && mesh.Tensor > 1 then
            notCompiled
                "sequence_parallel"
                $"tensor parallelism of %i{mesh.Tensor} without sequence parallelism"
                "turn sequence_parallel on, or choose a tensor degree of 1"
    ]

    let private batches (recipe: Recipe) (mesh: MeshInfo) : Result<int, Diagnostic list> =
        let wrong message help =
            Error [
                {
                    Code = Codes.BatchSize
                    At = "recipe.batch"
                    Message = message
                    Help = help
                }
            ]

        let together = recipe.MicroBatch * mesh.Data

        if recipe.MicroBatch < 1 || recipe.GlobalBatch < 1 || recipe.SeqLength < 1 then
            wrong
                $"global batch %i{recipe.GlobalBatch}, micro batch %i{recipe.MicroBatch} and sequence length %i{recipe.SeqLength} must be at least 1"
                ""
        elif recipe.GlobalBatch % together <> 0 then
            let below = recipe.GlobalBatch / together * together
            let near = if below = 0 then string together else $"%i{below} or %i{below + together}"

            wrong
                $"global batch %i{recipe.GlobalBatch} is no multiple of micro batch %i{recipe.MicroBatch} x data %i{mesh.Data}"
                $"choose a global batch of %s{near}"
        else
            Ok(recipe.GlobalBatch / together)

    /// THE list of passes, in order.
    let run (recipe: Recipe) (declared: Graph) : Result<Compiled, Diagnostic list> =
        let all (lists: Diagnostic list list) =
            match List.concat lists with
            | [] -> Ok()
            | wrong -> Error wrong

        Mesh.create recipe.Degrees
        |> Result.bind (fun mesh ->
            all [
                Verify.check declared
                unsupported recipe mesh
                Recompute.check (List.ofSeq recipe.Recompute)
                divides recipe mesh declared
            ]
            |> Result.bind (fun () -> batches recipe mesh)
            |> Result.bind (fun microbatches ->
                // casts first: fused ops and gradients then see final types
                let typed = Precision.run recipe.DType (Rewrite.prune declared)
                // fuse before gradients: a fused op brings its own rule
                let forward, fusions = if recipe.Fuse then Fusion.Fuse.run typed else typed, []

                Stages.run recipe.Layout mesh.Pipeline forward
                |> Result.bind (fun stages ->
                    Autodiff.differentiate "loss" forward
                    |> Result.bind (fun joint ->
                        // what backward computes again is decided while values are still logical
                        let joint = Recompute.run (List.ofSeq recipe.Recompute) joint
                        // dead code is gone by now: it would cost collectives
                        let local = Propagate.run (AxisMap.ofMesh mesh) joint

                        let plan =
                            Lower.run
                                {
                                    Recipe = recipe
                                    Mesh = mesh
                                    Stages = stages
                                    Microbatches = microbatches
                                }
                                local

                        // what the passes above promise, proven anew from the plan alone
                        match Check.run plan with
                        | [] ->
                            Ok {
                                Plan = plan
                                Forward = forward
                                Joint = joint
                                Local = local
                                Fusions = fusions
                            }
                        | wrong -> Error wrong))))

/// Compiles a declared model for a cluster.
[<AbstractClass; Sealed>]
type Compilation private () =
    /// The degrees a recipe comes to, with those it leaves out. Raises DiagnosticException.
    static member Mesh(recipe: Recipe) : MeshInfo =
        match Mesh.create recipe.Degrees with
        | Ok mesh -> mesh
        | Error wrong -> raise (DiagnosticException(Array.ofList wrong))

    /// The plan of `graph`, declared for one microbatch over all data ranks. Raises DiagnosticException with every mistake found.
    static member Compile(graph: Graph, recipe: Recipe) : PlanSet =
        match Pipeline.run recipe graph with
        | Ok compiled -> compiled.Plan
        | Error wrong -> raise (DiagnosticException(Array.ofList wrong))

    /// The plan, or every mistake found.
    static member TryCompile
        (graph: Graph, recipe: Recipe, diagnostics: byref<IReadOnlyList<Diagnostic>>)
        : PlanSet | null =
        match Pipeline.run recipe graph with
        | Ok compiled ->
            diagnostics <- [||]
            compiled.Plan
        | Error wrong ->
            diagnostics <- Array.ofList wrong
            null

/// The C#-facing entry: graph + recipe -> plan. Pipeline.fs has the passes.
namespace DeepSeekGraph.Compiler

open System
open System.Collections.Generic
open DeepSeekGraph

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

    /// The same; `observe` sees what each pass leaves: its number from 1, its name, and the job as it stands.
    static member Compile(graph: Graph, recipe: Recipe, observe: Action<int, string, Progress>) : PlanSet =
        let seen n name progress = observe.Invoke(n, name, progress)

        match Pipeline.observed seen recipe graph with
        | Ok { Form = Form.Plan plan } -> plan
        | Ok _ -> invalidOp "the last pass made no plan (a bug in dsg)"
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

/// The list of passes: each is seen, and a graph that breaks an invariant does not get past the verification.
module DeepSeekGraph.Compiler.Tests.PipelineTests

open System.Collections.Generic
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models

let private tiny = Recipes.Tiny.Recipe
let private declared = lazy DeepSeekV3(Presets.Tiny).Declare(2, tiny.SeqLength)

/// Every form of a compilation, by the pass that left it.
let private forms =
    lazy
        (let seen = List<string * Form>()

         match Pipeline.observed (fun _ name progress -> seen.Add((name, progress.Form))) tiny (declared.Force()) with
         | Ok progress -> progress.Mesh, List.ofSeq seen
         | Error wrong -> failtestf "%A" wrong)

let private localForm () =
    let mesh, seen = forms.Force()

    match seen |> List.find (fun (name, _) -> name = "partition") |> snd with
    | Form.Local local -> mesh, local
    | Form.Logical _
    | Form.Plan _ -> failtest "the partition leaves one rank's graph"

let tests =
    testList "Pipeline" [
        testCase "passes run in the order of their list, each with its reason"
        <| fun () ->
            let _, seen = forms.Force()
            Expect.equal (List.map fst seen) ("declared" :: (Pipeline.passes |> List.map _.Name)) ""

            for pass in Pipeline.passes do
                Expect.isGreaterThan pass.Why.Length 20 $"%s{pass.Name} says why"

        testCase "every form that a pass leaves is legal"
        <| fun () ->
            let mesh, seen = forms.Force()

            for name, form in seen do
                Expect.isEmpty (Pipeline.verify mesh form) name

        testCase "a shard that is declared to lie otherwise is found"
        <| fun () ->
            let mesh, local = localForm ()
            let whole = Partition.Layout.replicated mesh
            let mutable found = 0
            let mutable tried = 0

            for v in 0..17 .. local.Layouts.Length - 1 do
                if local.Layouts[v] <> whole then
                    tried <- tried + 1
                    let layouts = Array.copy local.Layouts
                    layouts[v] <- whole

                    if not (Pipeline.verify mesh (Form.Local { local with Layouts = layouts })).IsEmpty then
                        found <- found + 1

            Expect.isGreaterThan tried 20 "values that are split or partial"
            Expect.equal found tried "each is found"

        testCase "a layout that names a dim the value lacks is found, not thrown"
        <| fun () ->
            let mesh, local = localForm ()
            let layouts = Array.copy local.Layouts
            layouts[3] <- Array.create mesh.Axes.Count (AxisState.Split 9)
            Expect.isNonEmpty (Pipeline.verify mesh (Form.Local { local with Layouts = layouts })) "found"

            let short =
                Form.Local {
                    local with
                        Layouts = local.Layouts[1..]
                }

            Expect.isNonEmpty (Pipeline.verify mesh short) "too few"
    ]

/// The named recipes compile.
module DeepSeekGraph.Models.Tests.RecipeTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Models.Tests.Golden

let private compiles (recipe: NamedRecipe) (ranks: int) =
    testCase $"%s{recipe.Name} compiles for %i{ranks} ranks"
    <| fun () ->
        let plan = recipe.Compile()
        let perStage = plan.Mesh.Axes |> Seq.fold (fun n axis -> n * axis.Size) 1
        Expect.equal (perStage * plan.Stages.Count) ranks "ranks"

/// The declaration's chains are those that fusion looks for: once a layer each.
let private fuses =
    testCase "rotation and routing of every layer are fused"
    <| fun () ->
        let recipe = Recipes.Tiny.Recipe

        match Pipeline.run recipe (DeepSeekV3(Presets.Tiny).Declare(2, recipe.SeqLength)) with
        | Error wrong -> failtest $"%A{wrong}"
        | Ok compiled ->
            let count op = compiled.Forward.Nodes |> Array.filter (fun n -> op n.Op) |> Array.length

            Expect.equal (count _.IsRopeQ, count _.IsRopeKv) (5, 5) "rotation: four layers and one of MTP"
            Expect.equal (count _.IsPermuteWithProbs) 4 "routing: three layers and one of MTP"
            Expect.equal (count _.IsRope, count _.IsRouteProbs) (0, 0) "nothing is left"

let private summary =
    testCase "a summary has a line for each stage"
    <| fun () ->
        let plan = Recipes.Tiny.Compile()
        let lines = plan.Summary().TrimEnd('\n').Split '\n'
        Expect.equal lines.Length (4 + plan.Stages.Count) "lines"
        Expect.stringContains lines[0] "on 8 ranks" "ranks"

let private unknown =
    testCase "an unknown recipe is told with the names of the known ones"
    <| fun () ->
        try
            Recipes.Named "deepseek_v4" |> ignore
            failtest "there was no diagnostic"
        with :? DiagnosticException as e ->
            Expect.equal e.Diagnostics[0].Code Codes.UnknownModel "code"
            Expect.stringContains e.Diagnostics[0].Help "deepseek_v3_pretrain" "names"

let tests =
    testList "recipes" [
        compiles Recipes.Tiny 8
        compiles Recipes.Proxy 1
        compiles Recipes.Pretrain 1024
        fuses
        summary
        unknown
    ]

/// The named recipes compile.
module DeepSeekGraph.Models.Tests.RecipeTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Models
open DeepSeekGraph.Models.Tests.Golden

let private compiles (recipe: NamedRecipe) (ranks: int) =
    testCase $"%s{recipe.Name} compiles for %i{ranks} ranks"
    <| fun () ->
        let plan = recipe.Compile()
        let perStage = plan.Mesh.Axes |> Seq.fold (fun n axis -> n * axis.Size) 1
        Expect.equal (perStage * plan.Stages.Count) ranks "ranks"

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
        unknown
    ]

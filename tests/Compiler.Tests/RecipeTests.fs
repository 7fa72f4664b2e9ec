/// A recipe's choices: each is a line of the plan, and one that no pass carries out is refused.
module DeepSeekGraph.Compiler.Tests.RecipeTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Testing

/// Enough of a model for the checks that come before the passes.
let private model =
    let s = Sketch()
    s.Loss [ s.Param("x", [ "batch", 4; "hidden", 4 ]) ]

let private refused (setting: string) (recipe: Recipe) =
    testCase $"%s{setting} is refused"
    <| fun () ->
        match Pipeline.run recipe model with
        | Ok _ -> failtest "compiled"
        | Error wrong ->
            let found = wrong |> List.filter (fun d -> d.Code = Codes.NotCompiledYet)
            Expect.equal (found |> List.map _.At) [ $"recipe.%s{setting}" ] "one diagnostic, which names the setting"

let private base' = Recipe.Default.WithName "test"

let tests =
    testList "Recipe" [
        testList "what no pass carries out" [
            refused "context" (base'.WithContextParallel 2)
            refused "expert_tensor" (base'.WithParallelism(2, 1, 1, 1).WithExpertTensorParallel 2)
            refused "dispatcher" (base'.WithDispatcher Dispatcher.Flex)
            refused "sequence_parallel" (base'.WithParallelism(2, 1, 1, 1).WithSequenceParallel false)
        ]
        testCase "choices are lines of the plan"
        <| fun () ->
            let lines = base'.WithDispatcher(Dispatcher.AllGather).WithSequenceParallel(false).Lines
            Expect.contains lines "dispatcher=allgather" ""
            Expect.contains lines "sequence_parallel=false" ""
    ]

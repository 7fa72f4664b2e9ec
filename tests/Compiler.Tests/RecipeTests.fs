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
            refused
                "optimizer.main_params_dtype"
                (base'.WithStateTypes(MainParams.BFloat16, DType.Float32, DType.Float32, DType.Float32))
        ]
        testCase "a fusion rule that there is none of is refused with the names"
        <| fun () ->
            match Pipeline.run (base'.WithoutFusions "permut") model with
            | Ok _ -> failtest "compiled"
            | Error wrong ->
                Expect.equal (wrong |> List.map _.Code) [ Codes.UnknownFusion ] ""
                Expect.stringContains wrong.Head.Help "permute" ""
        testCase "every setting reads back what it wrote, and changes nothing else"
        <| fun () ->
            let lines = RecipeSettings.lines base'
            Expect.equal lines.Count RecipeSettings.all.Length "a line each"

            for setting in RecipeSettings.all do
                let before = setting.Read base'

                let others =
                    [
                        "7"
                        "0.25"
                        "bf16"
                        "false"
                        "flex"
                        "GPipe"
                        "-permute"
                        "a,b"
                        "Et|L"
                        "generate"
                        "exact"
                        "true"
                    ]
                    |> List.choose (setting.Write base')
                    |> List.filter (fun r -> setting.Read r <> before)

                Expect.isNonEmpty others $"%s{setting.Key} takes some other value"
                let changed = others.Head

                let apart =
                    Seq.zip lines (RecipeSettings.lines changed)
                    |> Seq.filter (fun (a, b) -> a <> b)
                    |> Seq.map (snd >> string)
                    |> List.ofSeq

                Expect.equal apart [ $"%s{setting.Key}=%s{setting.Read changed}" ] "one line differs"
                let again = setting.Write base' (setting.Read changed)
                Expect.equal (again |> Option.map setting.Read) (Some(setting.Read changed)) "text reads back"
        testCase "values of another kind are refused"
        <| fun () ->
            for key, value in
                [
                    "tensor", "two"
                    "tensor", "-1"
                    "seq_length", "99999999999"
                    "dispatcher", "ring"
                    "sequence_parallel", "yes"
                    "fusions", "permute,-unpermute"
                    "optimizer.beta1", "NaN"
                    "optimizer.main_grads_dtype", "i64"
                ] do
                let setting = RecipeSettings.all |> List.find (fun s -> s.Key = key)
                Expect.isNone (setting.Write base' value) $"%s{key}=%s{value}"
        testCase "choices are lines of the plan"
        <| fun () ->
            let lines = RecipeSettings.lines (base'.WithDispatcher(Dispatcher.AllGather).WithSequenceParallel(false))
            Expect.contains lines "dispatcher=allgather" ""
            Expect.contains lines "sequence_parallel=false" ""
    ]

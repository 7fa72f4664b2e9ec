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
    testCase "a summary has degrees, and two tables with a line for each stage"
    <| fun () ->
        let plan = Recipes.Tiny.Compile()
        let text = plan.Summary()
        Expect.stringContains text "8 in 2 stages" "ranks"
        let ofStage (line: string) = line.StartsWith "  0 " || line.StartsWith "  1 "
        Expect.equal (text.Split '\n' |> Array.filter ofStage |> Array.length) 4 "lines"

/// What a token costs by formula, and what the plan of 671B executes for it.
let private flops =
    testCase "FLOPs of the 671B plan: the formula's, and every difference has a name"
    <| fun () ->
        let plan = Recipes.Pretrain.Compile()
        let config = RecordFields.ConfigOf plan.Recipe
        Expect.equal config Recipes.Pretrain.Config "the plan records its model"
        let rows = FlopsTable.Of(plan, config)
        Expect.equal (rows |> Seq.sumBy _.Formula) 259_992_950_784.0 "formula"

        for row in rows do
            Expect.equal (row.Why <> "") (row.Difference <> 0.0) $"%s{row.Part}: %f{row.Difference} %s{row.Why}"

        let exact = [
            FlopsParts.Dense
            FlopsParts.Routed
            FlopsParts.Shared
            FlopsParts.Projections
            FlopsParts.MultiToken
        ]

        for part in exact do
            let row = rows |> Seq.find (fun r -> r.Part = part)
            Expect.floatClose Accuracy.veryHigh row.Plan row.Formula part

        let of' part = rows |> Seq.find (fun r -> r.Part = part)
        // 3.5 of flash attention and 1 of recompute, for the formula's 3
        Expect.floatClose Accuracy.veryHigh (of' FlopsParts.Core).Plan ((of' FlopsParts.Core).Formula * 1.5) "core"
        Expect.equal (rows |> Seq.exists (fun r -> r.Part = FlopsParts.Other)) false "nothing is left over"

let private withoutMtp =
    testCase "FLOPs of the 671B plan without multi-token prediction"
    <| fun () ->
        let plan = DeepSeekV3Recipes.Pretrain(mtpNumLayers = 0).Compile()
        let rows = PlanExplanation(plan, 8).Flops
        Expect.equal (rows |> Seq.sumBy _.Formula) 249_812_054_016.0 "formula"
        Expect.equal (rows |> Seq.find (fun r -> r.Part = FlopsParts.MultiToken) |> _.Plan) 0.0 "no projection"

        for row in rows do
            Expect.equal (row.Why <> "") (row.Difference <> 0.0) $"%s{row.Part}: %f{row.Difference} %s{row.Why}"

/// Arguments of a recipe end in its plan's lines and its training.
let private arguments =
    testCase "arguments of the pretrain recipe are what it says"
    <| fun () ->
        let job =
            DeepSeekV3Recipes.Pretrain(
                name = "mine",
                dataPaths = [| "a.jsonl"; "b.jsonl" |],
                dir = "results",
                trainIters = 500_000,
                globalBatchSize = 2048,
                seqLength = 8192,
                mtpNumLayers = 0,
                moePermuteFusion = false
            )

        let lines = RecipeSettings.lines job.Recipe

        for line in
            [
                "name=mine"
                "global_batch_size=2048"
                "seq_length=8192"
                "fusions=-permute_with_probs,-permute,-unpermute"
                "optimizer.eps=1E-05"
            ] do
            Expect.contains lines line "line"

        Expect.equal (job.Config.NumNextnPredictLayers, job.Training.TrainIters) (0, 500_000) "model and training"
        Expect.equal (List.ofSeq job.Training.DataPaths, job.Training.Dir) ([ "a.jsonl"; "b.jsonl" ], "results") "data"
        let rate = job.Training.Schedule()
        Expect.equal (rate.WarmupSteps, rate.TotalSteps, rate.Peak) (2000L, 500_000L, 3e-4) "learning rate"
        Expect.equal (Mesh.world (Compilation.Mesh(DeepSeekV3Recipes.Pretrain().Recipe))) 1024 "1024 ranks"
        Expect.equal (Mesh.world (Compilation.Mesh(DeepSeekV3Recipes.Pretrain32Nodes().Recipe))) 256 "256 ranks"

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
        flops
        withoutMtp
        arguments
        summary
        unknown
    ]

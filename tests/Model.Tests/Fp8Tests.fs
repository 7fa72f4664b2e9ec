/// fp8 on the whole model: which products it takes, one rank or many, and a run beside bf16.
module DeepSeekGraph.Models.Tests.Fp8Tests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Reference
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Testing
open DeepSeekGraph.Models.Tests.Jobs

let private compiled (config: DeepSeekV3Config) (recipe: Recipe) : Compiled =
    let mesh = Compilation.Mesh recipe
    let graph = DeepSeekV3(config).Declare(recipe.MicroBatch * mesh.Data, recipe.SeqLength)

    match Pipeline.run recipe graph with
    | Ok c -> c
    | Error wrong -> failtestf "%A" wrong

/// Products by module and number: 3 of each linear layer (forward, input gradient, weight gradient).
let private products =
    testCase "the three products of every linear layer; head, gate and attention stay"
    <| fun () ->
        let recipe = Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(2, 1, 16).WithFp8()
        let c = compiled Presets.Tiny recipe
        let yes, no = PlanProducts.list c.Plan |> List.ofSeq |> List.partition _.IsFp8
        let count (list: Product list) path = list |> List.filter (fun p -> p.Path = path) |> List.length
        // q_a, q_b, kv_a, kv_b, o
        Expect.equal (count yes "model.layers.1.self_attn") 15 "attention projections"
        // gate and up are one product
        Expect.equal (count yes "model.layers.0.mlp") 6 "dense feed-forward"
        Expect.equal (count yes "model.layers.1.mlp.experts") 6 "routed experts"
        Expect.equal (count yes "model.layers.1.mlp.shared_experts") 6 "shared experts"

        for path in [ "loss"; "model.layers.1.mlp.gate" ] do
            Expect.equal (count yes path) 0 path

        // the gate is a product, and stays; so is the head, which is fused with the loss: the model's own and MTP's
        Expect.isGreaterThan (count no "model.layers.1.mlp.gate") 0 "gate"

        Expect.equal
            (no |> List.filter (fun p -> p.Weight = "lm_head") |> List.map _.Kernel |> List.distinct)
            [ KernelId.LinearCrossEntropyGrad ]
            "head: loss and gradients of one launch"

        Expect.equal (no |> List.filter (fun p -> p.Weight = "lm_head") |> List.length) 2 "heads"

/// What `dsg explain` says of each weight: DeepSeek-V3's blocks, except that gradients of experts keep 1 x 128.
let private told =
    testCase "explain lists each weight's three products with their blocks, and what stays"
    <| fun () ->
        let recipe = Recipe.Default.WithParallelism(2, 1, 4, 2).WithBatch(4, 1, 128).WithDType(DType.BFloat16)
        let compile (recipe: Recipe) = PlanExplanation(DeepSeekV3(Presets.Tiny).Compile recipe, 8)
        Expect.isEmpty (compile recipe).Products "nothing to tell without fp8"
        let explained = compile (recipe.WithFp8())
        let layer = "model.layers.*."

        /// Names of what a weight [out, in] sums over, forward and backward.
        let weights = [
            layer + "self_attn.q_a_proj", "hidden", "q_lora"
            layer + "self_attn.q_b_proj", "q_lora", "qk_dim"
            layer + "self_attn.kv_a_proj_with_mqa", "hidden", "kv_a"
            layer + "self_attn.kv_b_proj", "kv_lora", "kv_dim"
            layer + "self_attn.o_proj", "v_dim", "hidden"
            layer + "mlp.gate_up_proj", "hidden", "ffn"
            layer + "mlp.down_proj", "ffn", "hidden"
            layer + "mlp.shared_experts.gate_up_proj", "hidden", "ffn"
            layer + "mlp.shared_experts.down_proj", "ffn", "hidden"
            layer + "mlp.experts.gate_up_proj", "hidden", "expert_ffn"
            layer + "mlp.experts.down_proj", "expert_ffn", "hidden"
            layer + "eh_proj", "hidden_pair", "hidden"
        ]

        let rows product fp8 =
            explained.Products |> Seq.filter (fun r -> r.IsFp8 = fp8 && r.Direction = product) |> List.ofSeq

        for product in [ "forward"; "input gradient"; "weight gradient" ] do
            Expect.equal
                (rows product true |> List.map _.Weight |> List.sort)
                (weights |> List.map (fun (w, _, _) -> w) |> List.sort)
                product

        for weight, input, output in weights do
            let operands product =
                rows product true
                |> List.filter (fun r -> r.Weight = weight)
                |> List.map (fun r -> r.First, r.Second)

            let tile axis = $"1 x 128 along %s{axis}"
            Expect.equal (operands "forward") [ tile input, "128 x 128" ] weight
            Expect.equal (operands "input gradient") [ tile output, "128 x 128" ] weight

            let gradient =
                if weight.Contains ".experts." then
                    tile output, tile input
                else
                    "128 x 1 along seq", "128 x 1 along seq"

            Expect.equal (operands "weight gradient") [ gradient ] weight

        Expect.equal
            (explained.Products
             |> Seq.filter (fun r -> not r.IsFp8)
             |> Seq.map (fun r -> r.Weight, r.Direction, r.Precision)
             |> Set)
            (Set [
                layer + "mlp.gate", "forward", "fp32"
                layer + "mlp.gate", "input gradient", "fp32"
                layer + "mlp.gate", "weight gradient", "fp32"
                layer + "self_attn", "forward", "bf16"
                layer + "self_attn", "gradients", "bf16"
                "lm_head", "forward", "bf16"
                "lm_head", "gradients", "bf16"
            ])
            "what stays"

        let json = explained.ToJson()
        Expect.equal ((nonNull json["products"]).AsArray().Count) explained.Products.Count "as JSON"

/// Blocks of 2, which the splits of 8, 4 and 16 over 2 or 4 ranks respect or are gathered for.
let private computes (job: Job) =
    let c = compiled job.Config (job.Recipe.WithFp8 2)
    let sizes = c.Plan.Mesh.Axes |> Seq.map _.Size |> Array.ofSeq
    let whole = Feed.lookup 7 c.Joint
    let reference = Evaluator.run c.Joint whole whole
    let spmd = Spmd.runGlobal sizes c.Local.Layouts c.Local.Graph whole

    for name in reference.OutputNames do
        let distance = PartitionTests.apart (spmd.Output name) (reference.Output name)

        if not (distance < 1e-8) then
            failtestf "%s differs by %g: %A" name distance job

/// Rows of experts cannot be gathered over etp, nor tokens put in order over cp: blocks that these cut are refused.
let private lawful (job: Job) =
    if fp8Fits { job with Fp8 = 2 } then
        computes job
    else
        let graph = DeepSeekV3(job.Config).Declare(job.Batch * job.Data, job.SeqLength)

        match Pipeline.run (job.Recipe.WithFp8 2) graph with
        | Ok _ -> failtestf "blocks are cut: %A" job
        | Error wrong -> Expect.exists wrong (fun d -> d.Code = Codes.NotDivisible) "refused"

let private few = {
    Properties.config [ typeof<OneStage> ] with
        maxTest = max 8 (Properties.cases / 10)
}

let private losses (recipe: Recipe) =
    let plan = DeepSeekV3(Presets.Tiny).Compile recipe
    let tokens = plan.Inputs |> Seq.find (fun i -> i.Name = "tokens")
    let rows, columns = plan.Microbatches * plan.MicroBatch, tokens.Extents[1]

    let batches = {
        new IBatchSource with
            member _.Get step =
                let random = Random(int step % 2 + 5)
                TrainingBatch(rows, columns, Array.init (rows * columns) (fun _ -> int64 (random.Next 40)))
    }

    task {
        let! trainer =
            Trainer.StartAsync(plan, TrainerOptions(Batches = batches, LearningRate = LearningRate(3e-3, 3e-3, 0L, 0L)))

        let run = trainer.RunAsync(12L).GetAsyncEnumerator()
        let found = Collections.Generic.List<float>()
        let mutable more = true

        while more do
            let! next = run.MoveNextAsync()
            more <- next

            if more then
                found.Add run.Current.Loss

        do! trainer.DisposeAsync()
        return List.ofSeq found
    }
    |> _.GetAwaiter().GetResult()

let tests =
    testSequenced
    <| testList "fp8" [
        products
        told

        testPropertyWithConfig few "many ranks round the blocks that one rank rounds" lawful

        testCase "a sequence whose zigzag pieces cut a block is refused: one rank would round other blocks"
        <| fun () ->
            // pieces of 16 / (2 x 4) = 2 tokens
            let cut = {
                plain with
                    Context = 4
                    SeqLength = 16
            }

            let graph = DeepSeekV3(cut.Config).Declare(1, 16)

            match Pipeline.run (cut.Recipe.WithFp8 4) graph with
            | Ok _ -> failtest "blocks of 4 in pieces of 2"
            | Error wrong ->
                Expect.equal [ for d in wrong -> d.Code ] [ Codes.NotDivisible ] "code"
                Expect.stringContains wrong.Head.Message "pieces of 2, no multiple of the fp8 block (4)" "both values"

            computes { cut with Fp8 = 2 }

        // measured 7.1 %: the loss halves in 12 steps at a high rate, which amplifies every rounding
        testCase "a tiny run in fp8 stays within 10 % of bf16's loss, and learns"
        <| fun () ->
            let recipe = Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(2, 1, 32).WithDType(DType.BFloat16)
            let wide, narrow = losses recipe, losses (recipe.WithFp8())
            let distance = List.map2 (fun a b -> abs (a - b) / b) narrow wide |> List.max

            printfn
                $"fp8 against bf16, 12 steps: largest relative difference of the loss %.4f{distance}; loss %.3f{narrow.Head} to %.3f{List.last narrow}"

            Expect.isLessThan distance 0.1 "band"
            Expect.isGreaterThan distance 0.0 "it is another type"
            Expect.isLessThan (List.last narrow) (0.95 * narrow.Head) "it learns"

        testCase "the setting is a line of the plan, and reads back"
        <| fun () ->
            let setting key = RecipeSettings.all |> List.find (fun s -> s.Key = key)
            let recipe = ((setting "dtype").Write Recipe.Default "fp8").Value
            Expect.equal recipe.DType DType.BFloat16 "what is not fp8 is bf16"
            Expect.equal recipe.Fp8Block 128 "DeepSeek's blocks"
            Expect.equal ((setting "dtype").Read recipe) "fp8" "name"
            let plain = ((setting "dtype").Write recipe "bf16").Value
            Expect.equal plain.Fp8Block 0 "off"
    ]

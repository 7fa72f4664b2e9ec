/// Blocks of experts' rows change no bit of losses and gradients, and the memory table counts what they hold.
module DeepSeekGraph.Models.Tests.PaddingTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Lowering
open DeepSeekGraph.Models
open DeepSeekGraph.Models.Tests.RecomputeTests

let private tiny = Recipe.Default.WithBatch(8, 2, 32)

// rows are whole cache lines, so that products round alike wherever they begin
let private small =
    DeepSeekV3Config(
        VocabSize = 32,
        HiddenSize = 32,
        NumHiddenLayers = 2,
        InitializerRange = 0.1,
        NumAttentionHeads = 2,
        QLoraRank = 16,
        KvLoraRank = 16,
        QkNopeHeadDim = 8,
        QkRopeHeadDim = 8,
        VHeadDim = 8,
        IntermediateSize = 32,
        FirstKDenseReplace = 1,
        MoeIntermediateSize = 32,
        NRoutedExperts = 8,
        NumExpertsPerTok = 2,
        NGroup = 4,
        TopkGroup = 2
    )

let private base' = Recipe.Default.WithBatch(4, 1, 16)

let private jobs = [
    "one rank", base'.WithParallelism(1, 1, 1, 1)
    "one rank, unfused", base'.WithParallelism(1, 1, 1, 1).WithFusion false
    "all-to-all", base'.WithParallelism(2, 1, 4, 2)
    "all-gather", base'.WithParallelism(1, 1, 2, 2).WithDispatcher Dispatcher.AllGather
    "flex", base'.WithParallelism(1, 1, 2, 2).WithDispatcher Dispatcher.Flex
    "expert tensor parallel", base'.WithParallelism(2, 1, 2, 2).WithExpertTensorParallel 2
    "context parallel", base'.WithParallelism(1, 1, 2, 1).WithContextParallel 2
    "no sequence parallel", base'.WithParallelism(2, 1, 2, 1).WithSequenceParallel false
    "two stages, recomputed", base'.WithParallelism(1, 2, 1, 1).WithLayout("Et|tmL").WithRecompute "full"
    "fp8", base'.WithParallelism(1, 1, 2, 2).WithFp8 8
    "bf16", base'.WithParallelism(1, 1, 2, 2).WithDType DType.BFloat16
]

let private planOf (recipe: Recipe) = (DeepSeekV3 Presets.Tiny).Compile recipe

let private padded (plan: PlanSet) =
    plan.Stages |> Seq.collect _.Slots |> Seq.filter (fun s -> s.Padding > 1) |> List.ofSeq

/// A rank holds 4 of 16 experts; a token has 4, each rank's tokens are 2 x 16.
let private memory =
    testCase "the memory table counts blocks: balanced as experts fill them, else as many as can be cut"
    <| fun () ->
        let plan = planOf (tiny.WithParallelism(2, 1, 4, 2).WithPermutePadding 16)

        let slot =
            padded plan
            |> List.find (fun s -> s.Extents.Count = 4 && s.Axes[3] = "hidden" && s.DType = DType.Float32)

        let tokens, experts, width = slot.Extents[0] * slot.Extents[1], slot.Extents[2], slot.Extents[3] * 4
        Expect.equal (tokens, experts) (128, 4) "every rank's tokens, a quarter of the experts"
        let bytes rows = Memory.bytesOf plan.Mesh rows slot / int64 width
        // 128 x 4 rows over 16 experts: 32 each, two blocks
        Expect.equal (bytes Memory.Rows.Balanced) (4L * 32L) "32 rows are two whole blocks"

        Expect.equal
            (bytes Memory.Rows.Headroom)
            (256L + 4L * 15L - 12L)
            "twice that, and 15 more an expert, cut to blocks"

        Expect.equal (bytes Memory.Rows.Worst) (512L + 4L * 15L - 12L) "every token to all four"

        // experts with 33 rows or 1: what the table says balanced rows come to holds for a multiple that 32 is not
        let odd = { slot with Padding = 24 }
        Expect.equal (Memory.bytesOf plan.Mesh Memory.Rows.Balanced odd / int64 width) (4L * 48L) "two blocks of 24"

        for a, b in Seq.zip (planOf (tiny.WithParallelism(2, 1, 4, 2))).Memory plan.Memory do
            Expect.isLessThan a.Headroom b.Headroom "blocks cost memory"
            Expect.isLessThanOrEqual a.Peak b.Peak "balanced rows fill their blocks here"

let private where =
    testCase "rows stand in blocks where experts are, and nowhere else"
    <| fun () ->
        let slots = padded (planOf (tiny.WithParallelism(2, 1, 4, 2).WithPermutePadding 16))
        Expect.isNonEmpty slots "padded"

        for s in slots do
            Expect.isTrue s.Routed s.Name
            Expect.equal s.Extents[2] 4 "by expert: a quarter of them"

        let plain = planOf (tiny.WithParallelism(2, 1, 4, 2))
        Expect.isEmpty (padded plain) "none by default"

let private refused =
    testCase "a multiple below 1 or beyond any product is refused"
    <| fun () ->
        for wrong in [ 0; 4097 ] do
            match Pipeline.run (tiny.WithPermutePadding wrong) (DeepSeekV3(Presets.Tiny).Declare(2, 32)) with
            | Ok _ -> failtestf "%i" wrong
            | Error found ->
                Expect.equal
                    [ for d in found -> d.Code, d.At ]
                    [ Codes.PermutePadding, "recipe.permute_padding" ]
                    "code"

let tests =
    testSequenced
    <| testList "padding" [
        where
        memory
        refused
        for index, (name, recipe) in List.indexed jobs do
            testCase $"%s{name}: blocks change no bit of losses, norms, gradients and parameters"
            <| fun () ->
                let losses, tensors = train small recipe

                let recipe = recipe.WithPermutePadding(if index % 2 = 0 then 4 else 16)
                Expect.isNonEmpty (padded ((DeepSeekV3 small).Compile recipe)) "rows stand in blocks"
                let losses', tensors' = train small recipe
                Expect.equal losses' losses "losses and norms"

                for KeyValue(name, expected) in tensors do
                    if tensors'[name] <> expected then
                        failtestf "%s differs" name
    ]

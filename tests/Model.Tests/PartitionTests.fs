/// Partition on the whole model: what must fall out, and partitioned = unpartitioned in float64.
module DeepSeekGraph.Models.Tests.PartitionTests

open System.Collections.Concurrent
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Models
open DeepSeekGraph.Reference
open DeepSeekGraph.Testing
open DeepSeekGraph.Models.Tests.Jobs

let private compiled (config: DeepSeekV3Config) (recipe: Recipe) : Compiled =
    let mesh = Compilation.Mesh recipe
    let graph = DeepSeekV3(config).Declare(recipe.MicroBatch * mesh.Data, recipe.SeqLength)

    match Pipeline.run recipe graph with
    | Ok c -> c
    | Error wrong -> failtestf "%A" wrong

/// Collectives of one unit and direction, as "kind axis-names last-axis", sorted.
let private traffic (c: Compiled) (part: ModelUnit) (forward: bool) =
    let graph = c.Local.Graph

    [
        for node in graph.Nodes do
            match node.Op with
            | Op.Collective(kind, axes, _) when node.Origin.Unit = part && node.Origin.Pass.IsForward = forward ->
                let names = axes |> List.map (fun m -> c.Plan.Mesh.Axes[m].Name) |> String.concat "+"
                let what = graph.Types[node.Inputs[0]].Names |> Array.tryLast |> Option.defaultValue "scalar"
                $"%s{Ops.Collective.name kind} %s{names} %s{what}"
            | _other -> ()
    ]
    |> List.sort

/// Tiny without multi-token prediction: one head, one loss.
let private withoutMtp =
    DeepSeekV3Config(
        VocabSize = 256,
        HiddenSize = 128,
        NumHiddenLayers = 2,
        NumAttentionHeads = 4,
        QLoraRank = 64,
        KvLoraRank = 32,
        QkNopeHeadDim = 32,
        QkRopeHeadDim = 16,
        VHeadDim = 32,
        IntermediateSize = 256,
        FirstKDenseReplace = 1,
        MoeIntermediateSize = 64,
        NRoutedExperts = 16,
        NumExpertsPerTok = 4,
        NGroup = 4,
        TopkGroup = 2,
        NumNextnPredictLayers = 0
    )

let private tiny = Recipe.Default.WithBatch(8, 1, 32)

/// DESIGN section 4, the table: one MoE layer, TP with sequence parallel and folded EP. Written by hand from the table.
let private moeForward ep = [
    // MLA: latents and rope key gathered, never the hidden state; o_proj scattered
    "all_gather tp kv_lora"
    "all_gather tp q_lora"
    "all_gather tp rope"
    // shared expert in; attention and shared expert out
    "all_gather tp hidden"
    "reduce_scatter tp hidden"
    "reduce_scatter tp hidden"
    // routed experts: rows and one-wide probabilities there, rows back; the row set travels once
    $"route_to_experts %s{ep} experts"
    $"rows_to_experts %s{ep} experts"
    $"rows_to_experts %s{ep} hidden"
    $"rows_to_tokens %s{ep} hidden"
    // sequence balance: how often each expert is chosen; its mean affinity stays partial
    "all_reduce tp experts"
]

let private moeBackward ep = [
    // dy of o_proj once for I and W; saved latents again for W; cotangents of latents and rope key scattered
    "all_gather tp hidden"
    "all_gather tp kv_lora"
    "all_gather tp q_lora"
    "reduce_scatter tp kv_lora"
    "reduce_scatter tp q_lora"
    "reduce_scatter tp rope"
    // shared expert: dy, saved input (W), one reduce-scatter for gate and up
    "all_gather tp hidden"
    "all_gather tp hidden"
    "reduce_scatter tp hidden"
    // routed experts: dy rows there; rows and one-wide probabilities back; no second count exchange
    $"rows_to_experts %s{ep} hidden"
    $"rows_to_tokens %s{ep} experts"
    $"rows_to_tokens %s{ep} hidden"
    // sequence balance
    "all_reduce tp experts"
]

/// What a plan starts for one layer: "phase kind module xTuples", sorted; neighbours of a group are one start.
let private starts (c: Compiled) (layer: string) =
    [
        for program in c.Plan.Stages[0].Programs do
            if not program.Phase.IsOnce then
                for step in program.Steps do
                    match step with
                    | Step.Start(_, kind, _, _, outputs, path) when path.StartsWith layer ->
                        let part = path.Substring(layer.Length).TrimStart '.'
                        $"%s{program.Phase.Word} %s{Ops.Collective.name kind} %s{part} x%i{outputs.Count}"
                    | Step.Start _
                    | Step.Launch _
                    | Step.Wait _
                    | Step.Free _ -> ()
    ]
    |> List.sort

/// The table's collectives as a plan starts them: 8 forward for 12 values moved, 7 backward for 13 (one stage: I is empty).
let private moeStarts = [
    "F all_gather mlp.shared_experts x1"
    "F all_gather self_attn x3"
    // the balance loss: tokens per expert, and its cotangent
    "F all_reduce mlp.gate.balance x1"
    "F reduce_scatter mlp x1"
    "F reduce_scatter self_attn x1"
    "F route_to_experts mlp.experts x1"
    "F rows_to_experts mlp.experts x2"
    "F rows_to_tokens mlp.experts x1"
    "W all_gather mlp.shared_experts x2"
    "W all_gather self_attn x3"
    "W all_reduce mlp.gate.balance x1"
    "W reduce_scatter  x1"
    "W reduce_scatter self_attn x3"
    "W rows_to_experts mlp.experts x1"
    "W rows_to_tokens mlp.experts x2"
]

let private fallsOut tp ep dp mesh =
    testCase $"a MoE layer on tp %i{tp}, ep %i{ep}, dp %i{dp} moves what the table says"
    <| fun () ->
        let c = compiled Presets.Tiny (tiny.WithParallelism(tp, 1, ep, dp))
        Expect.equal (traffic c (ModelUnit.Layer 1) true) (List.sort (moeForward mesh)) "forward"
        Expect.equal (traffic c (ModelUnit.Layer 1) false) (List.sort (moeBackward mesh)) "backward"

let private partialAxes (c: Compiled) (parameter: string) =
    let v = c.Local.Graph.Outputs |> Array.find (fun (n, _) -> n = $"grad:%s{parameter}") |> snd

    Layout.partials c.Local.Layouts[v]
    |> List.map (fun m -> c.Plan.Mesh.Axes[m].Name)
    |> String.concat "+"

let private table =
    testList "what must fall out" [
        fallsOut 2 2 2 "tp"
        fallsOut 2 2 1 "tp"
        fallsOut 2 4 2 "tp+dp"

        testCase "neighbours of a group are started together"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 2, 2))
            Expect.equal (starts c "model.layers.1") moeStarts "one MoE layer"
            let sums = starts c "loss" |> List.filter (fun s -> s.Contains "all_reduce ")
            Expect.equal sums [ "F all_reduce  x2"; "F all_reduce  x2" ] "the two sums of each cross-entropy"

        testCase "without TP only rows move"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(1, 1, 2, 2))
            let rows = List.filter (fun (s: string) -> s.Contains "rows" || s.Contains "route")
            Expect.equal (traffic c (ModelUnit.Layer 1) true) (List.sort (rows (moeForward "dp"))) "forward"
            Expect.equal (traffic c (ModelUnit.Layer 1) false) (List.sort (rows (moeBackward "dp"))) "backward"

        testCase "a dense MLP gathers its input and scatters its output, and backward gathers dy and the saved input"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 1, 1))
            let hidden kind = $"%s{kind} tp hidden"

            Expect.equal
                (traffic c (ModelUnit.Layer 0) true |> List.filter (fun s -> s.Contains "hidden") |> List.countBy id)
                [ hidden "all_gather", 1; hidden "reduce_scatter", 2 ]
                "forward: once in, out of attention and MLP"

            Expect.equal
                (traffic c (ModelUnit.Layer 0) false |> List.filter (fun s -> s.Contains "hidden") |> List.countBy id)
                [ hidden "all_gather", 3; hidden "reduce_scatter", 1 ]
                "backward: dy of attention; dy and saved input of the MLP"

        testCase
            "context parallel: the key's latent and its rope part are gathered, never keys and values; cotangents scattered"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(1, 1, 1, 1).WithContextParallel 2)

            for layer in 0..3 do
                // without what the balance loss sums
                let attention = List.filter (fun (s: string) -> not (s.Contains "experts" || s.StartsWith "all_reduce"))

                Expect.equal
                    (attention (traffic c (ModelUnit.Layer layer) true))
                    [ "all_gather cp kv_lora"; "all_gather cp rope" ]
                    "forward"

                Expect.equal
                    (attention (traffic c (ModelUnit.Layer layer) false))
                    [ "reduce_scatter cp kv_lora"; "reduce_scatter cp rope" ]
                    "backward"

        testCase "context and tensor parallel: the latent of keys over both at once, that of queries over tp"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 1, 1).WithContextParallel 2)
            let latents = List.filter (fun (s: string) -> s.Contains "lora" || s.Contains "rope")

            Expect.equal
                (latents (traffic c (ModelUnit.Layer 0) true))
                [ "all_gather tp q_lora"; "all_gather tp+cp kv_lora"; "all_gather tp+cp rope" ]
                "forward"

            Expect.equal
                (latents (traffic c (ModelUnit.Layer 0) false))
                [
                    "all_gather tp q_lora"
                    "reduce_scatter tp q_lora"
                    "reduce_scatter tp+cp kv_lora"
                    "reduce_scatter tp+cp rope"
                ]
                "backward"

        testCase "keys and values are gathered where the latent would be wider"
        <| fun () ->
            let wide =
                DeepSeekV3Config(
                    VocabSize = 256,
                    HiddenSize = 128,
                    NumHiddenLayers = 1,
                    NumAttentionHeads = 1,
                    QLoraRank = 0,
                    KvLoraRank = 1024,
                    QkNopeHeadDim = 8,
                    QkRopeHeadDim = 8,
                    VHeadDim = 8,
                    IntermediateSize = 256,
                    FirstKDenseReplace = 1,
                    NumNextnPredictLayers = 0
                )

            let c = compiled wide (tiny.WithParallelism(1, 1, 1, 1).WithContextParallel 2)

            Expect.equal
                (traffic c (ModelUnit.Layer 0) true)
                [ "all_gather cp qk_dim"; "all_gather cp v_dim" ]
                "one head of 16 features instead of a latent of 1024"

        testCase "expert tensor parallel: rows exchanged over ep, then gathered over etp, and back the other way round"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 2, 2).WithExpertTensorParallel 2)

            let routed =
                List.filter (fun (s: string) ->
                    not (s.StartsWith "all_reduce")
                    && (s.Contains "rows" || s.Contains "route" || s.Contains "experts"))

            let forward, backward = traffic c (ModelUnit.Layer 1) true, traffic c (ModelUnit.Layer 1) false

            Expect.equal
                (routed forward)
                [
                    // the row set and the one-wide probabilities
                    "all_gather tp experts"
                    "all_gather tp experts"
                    "route_to_experts dp experts"
                    "rows_to_experts dp experts"
                    "rows_to_experts dp hidden"
                    "rows_to_tokens dp hidden"
                ]
                "forward"

            Expect.equal
                (routed backward)
                [
                    // saved probabilities, gathered again
                    "all_gather tp experts"
                    "reduce_scatter tp experts"
                    "rows_to_experts dp hidden"
                    "rows_to_tokens dp experts"
                    "rows_to_tokens dp hidden"
                ]
                "backward"

            let wide (s: string) = s = "all_gather tp hidden" || s = "reduce_scatter tp hidden"
            let without = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 2, 2))
            let extra forward = (traffic c (ModelUnit.Layer 1) forward |> List.filter wide |> List.countBy id)
            let usual forward = (traffic without (ModelUnit.Layer 1) forward |> List.filter wide |> List.countBy id)

            Expect.equal (usual true) [ "all_gather tp hidden", 1; "reduce_scatter tp hidden", 2 ] "without, forward"

            Expect.equal
                (extra true)
                [ "all_gather tp hidden", 2; "reduce_scatter tp hidden", 3 ]
                "rows gathered, sums scattered"

            Expect.equal (usual false) [ "all_gather tp hidden", 3; "reduce_scatter tp hidden", 1 ] "without, backward"

            Expect.equal
                (extra false)
                [ "all_gather tp hidden", 5; "reduce_scatter tp hidden", 2 ]
                "dy rows and saved rows gathered"

        testCase "the all-gather dispatcher gathers tokens and scatters sums; of rows nothing moves"
        <| fun () ->
            let recipe = tiny.WithParallelism(1, 1, 2, 2).WithDispatcher Dispatcher.AllGather
            let c = compiled Presets.Tiny recipe

            Expect.equal
                (traffic c (ModelUnit.Layer 1) true |> List.filter (fun s -> not (s.StartsWith "all_to_all")))
                [ "all_gather dp hidden"; "reduce_scatter dp hidden" ]
                "forward"

            Expect.equal
                (traffic c (ModelUnit.Layer 1) false |> List.filter (fun s -> not (s.StartsWith "all_to_all")))
                [ "all_gather dp hidden"; "reduce_scatter dp hidden" ]
                "backward"

            Expect.equal
                (traffic c (ModelUnit.Layer 1) true |> List.filter (fun s -> s.StartsWith "all_to_all"))
                [ "all_to_all dp experts"; "all_to_all dp experts" ]
                "mask and probabilities go to the ranks of their experts"

        testCase "flex: one dispatch and one combine a layer and direction"
        <| fun () ->
            let recipe = tiny.WithParallelism(1, 1, 2, 2).WithDispatcher Dispatcher.Flex
            let c = compiled Presets.Tiny recipe

            Expect.equal
                (traffic c (ModelUnit.Layer 1) true)
                [ "combine dp hidden"; "dispatch dp hidden"; "route_to_experts dp experts" ]
                "forward"

            Expect.equal
                (traffic c (ModelUnit.Layer 1) false)
                [ "combine dp hidden"; "dispatch dp hidden" ]
                "backward: probabilities come back with the rows"

        testCase
            "without sequence parallelism the residual stream is whole over tp, and dispatch over tp is a free slice"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 2, 1).WithSequenceParallel false)
            let dense = traffic c (ModelUnit.Layer 0) true

            Expect.equal
                dense
                [ "all_reduce tp hidden"; "all_reduce tp hidden" ]
                "attention and MLP: Megatron's two all-reduces"

            Expect.equal
                (traffic c (ModelUnit.Layer 1) true
                 |> List.filter (fun s -> s.Contains "rows" || s.Contains "gather"))
                [
                    "all_gather tp hidden"
                    "rows_to_experts tp experts"
                    "rows_to_experts tp hidden"
                    "rows_to_tokens tp hidden"
                ]
                "rows; tokens come together again after the experts"

        testCase "embedding, head and loss: scatter; gather, maximum and two sums; gathers for the weight gradients"
        <| fun () ->
            let c = compiled withoutMtp (tiny.WithParallelism(2, 1, 1, 1))
            Expect.equal (traffic c ModelUnit.Embed true) [ "reduce_scatter tp hidden" ] "embedding"
            Expect.equal (traffic c ModelUnit.Embed false) [ "all_gather tp hidden" ] "its gradient"

            Expect.equal
                (traffic c ModelUnit.Head true)
                [
                    "all_gather tp hidden"
                    "all_reduce tp scalar"
                    "all_reduce tp seq"
                    "all_reduce tp seq"
                    "all_reduce_max tp seq"
                ]
                "head: and the balance term, added to what is differentiated; no plan keeps that sum, metrics do"

            Expect.equal
                (traffic c ModelUnit.Head false)
                [ "all_gather tp hidden"; "reduce_scatter tp hidden" ]
                "saved input again, cotangent scattered"

        testCase "weight gradients are partial over the axes the table says"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 2, 2))
            let layer = "model.layers.1."

            for name, axes in
                [
                    // replicated weights see only their rank's tokens: partial over tp too
                    "self_attn.q_a_proj.weight", "tp+dp"
                    "self_attn.kv_a_proj_with_mqa.weight", "tp+dp"
                    "self_attn.q_a_layernorm.weight", "tp+dp"
                    "input_layernorm.weight", "tp+dp"
                    "mlp.gate.weight", "tp+dp"
                    // split weights: data parallel only
                    "self_attn.q_b_proj.weight", "dp"
                    "self_attn.kv_b_proj.weight", "dp"
                    "self_attn.o_proj.weight", "dp"
                    "mlp.shared_experts.down_proj.weight", "dp"
                    // experts: over edp, which is dp here
                    "mlp.experts.gate_up_proj.weight", "dp"
                    "mlp.experts.down_proj.weight", "dp"
                ] do
                Expect.equal (partialAxes c (layer + name)) axes name

            let wide = compiled Presets.Tiny (tiny.WithParallelism(2, 1, 4, 2))
            Expect.equal (partialAxes wide (layer + "mlp.experts.down_proj.weight")) "" "edp 1: nothing to reduce"

        testCase "the default job's plan sends rows by all-to-all, in both directions"
        <| fun () ->
            let plan = Recipes.Tiny.Compile()

            let kinds =
                [
                    for stage in plan.Stages do
                        for program in stage.Programs do
                            for step in program.Steps do
                                match step with
                                | Step.Start(_, kind, _, _, _, _) -> Ops.Collective.name kind
                                | Step.Launch _
                                | Step.Wait _
                                | Step.Free _ -> ()
                ]
                |> List.countBy id
                |> Map.ofList

            for kind in [ "route_to_experts"; "rows_to_experts"; "rows_to_tokens" ] do
                Expect.isGreaterThan kinds[kind] 0 kind

            // three MoE layers and one MTP layer: row sets are exchanged once each, forward and backward together
            Expect.equal kinds["route_to_experts"] 4 "row sets"
    ]

/// What the random cases covered; extents of 1 never split, since axes of size 1 are dropped.
let private seen = ConcurrentDictionary<string, int>()

let private count name yes =
    if yes then
        seen.AddOrUpdate(name, 1, (fun _ n -> n + 1)) |> ignore

let private cover (job: Job) (c: Compiled) =
    let graph, layouts = c.Local.Graph, c.Local.Layouts
    count "cases" true
    count "context parallel" (job.Context > 1)
    count "expert tensor parallel" (job.ExpertTensor > 1)
    count "no sequence parallel" (not job.SequenceParallel && job.Tensor > 1)
    count "several stages, uneven" job.Uneven
    count "recomputed" (not job.Recompute.IsEmpty)
    count "not fused" job.Fusions.IsNone
    count "some rules fused, some not" (let n = (fused job).Length in n > 0 && n < Fusion.Rules.all.Length)
    count "bf16" job.Bf16
    let uses (isKind: Op -> bool) = c.Local.Graph.Nodes |> Array.exists (fun n -> isKind n.Op)
    count "loss and gradient in one op" (uses _.IsLinearCrossEntropyGrad && not (uses _.IsLinearCrossEntropy))
    count "loss over a split vocabulary" (uses _.IsLinearLogSumExp)
    count "fp8 over several ranks" (job.Fp8 > 0 && ranks job > 1)
    count "rows in blocks" (c.Plan.Stages |> Seq.exists (fun s -> s.Slots |> Seq.exists (fun slot -> slot.Padding > 1)))
    count "one group of experts" (job.Routing.Groups = 1)
    count "dropped groups score zero" (job.Routing.ZeroMasked && job.Routing.Keep < job.Routing.Groups)
    count "weights not normalised" (not job.Routing.Normalize)
    count "scores by softmax" job.Routing.Softmax
    count "groups by their best" (job.Routing.Method = TopkMethod.GroupLimitedGreedy)
    count "experts without bias or groups" (job.Routing.Method = TopkMethod.Greedy)
    count "several depths of MTP" (job.Mtp > 1)
    count "no balance loss" (not job.Balance)
    count "several sequences a rank" (job.Batch > 1)
    count "every rank its own optimizer state" (not job.DistributedOptimizer)

    count
        "gradients reduced beside the backward pass"
        (c.Plan.Stages |> Seq.exists (fun s -> s.Programs |> Seq.exists _.Phase.IsR))

    count
        "weight gradients in parts"
        (c.Plan.Stages |> Seq.exists (fun s -> s.Programs |> Seq.exists (fun p -> p.Phase.Part > 0)))

    let isTurn (a: Action, b: Action) =
        not a.Phase.IsOnce && not b.Phase.IsOnce && a.Microbatch <> b.Microbatch && b.Phase.Part > 0

    count
        "microbatches that take turns"
        (c.Plan.Stages |> Seq.exists (fun s -> s.Timetable |> Seq.pairwise |> Seq.exists isTurn))

    count "gradients and moments in bf16" job.NarrowStates
    count "masters as remainders" (job.Bf16 && job.Remainders)

    count
        "fused dispatch"
        (c.Local.Graph.Nodes
         |> Array.exists (fun n ->
             match n.Op with
             | Op.Collective(Collective.Dispatch _, _, _) -> true
             | _other -> false))

    count "rows by all-gather" (job.Dispatcher.IsAllGather && job.Expert > 1)
    count "two or more base axes" (c.Plan.Mesh.Axes.Count >= 2)

    count
        "routed rows split by expert"
        (graph.Types
         |> Array.indexed
         |> Array.exists (fun (v, t) -> t.Routed && layouts[v] |> Array.exists (fun s -> s = AxisState.Split 2)))

    count
        "a pending partial sum"
        (graph.Types
         |> Array.indexed
         |> Array.exists (fun (v, _) ->
             graph.NodeOf(v).Op.IsCollective |> not && layouts[v] |> Array.exists _.IsPartialSum))

/// Largest difference of two tensors, on the scale of the second. Some gradients are zero but for rounding (the router's where the
/// weight of one expert is divided by itself): of those, differences of 1e-15 are told.
let apart (a: DenseTensor) (b: DenseTensor) =
    let scale = b.Data |> Array.fold (fun m x -> max m (abs x)) 1e-7

    if a.Extents <> b.Extents then
        infinity
    else
        Array.fold2
            (fun most (x: float) y ->
                if x = y then most
                elif System.Double.IsNaN x || System.Double.IsNaN y then infinity
                else max most (abs (x - y) / scale))
            0.0
            a.Data
            b.Data

/// Forward and backward of the job's model on one rank, as declared: what any compilation must compute.
let private meaning (job: Job) : Graph =
    let recipe = job.Single.Recipe

    DeepSeekV3(job.Config).Declare(recipe.MicroBatch, recipe.SeqLength)
    |> Rewrite.prune
    |> Precision.run recipe.DType
    |> Autodiff.differentiate "loss"
    |> Result.map (Fp8.run recipe.Fp8Block)
    |> function
        | Ok joint -> joint
        | Error wrong -> failtestf "%A" wrong

let private partitioned (job: Job) =
    let c = compiled job.Config job.Recipe
    cover job c
    let sizes = c.Plan.Mesh.Axes |> Seq.map _.Size |> Array.ofSeq
    // the meaning: the same model for one rank, nothing fused, before any pass that knows of ranks
    let single = meaning job
    let whole = Feed.lookup 7 single
    let reference = Evaluator.run single whole whole
    let spmd = Spmd.runGlobal sizes c.Local.Layouts c.Local.Graph whole

    for name in reference.OutputNames do
        let distance = apart (spmd.Output name) (reference.Output name)

        if not (distance < 1e-8) then
            failtestf "%s differs by %g: %A" name distance job

let private fused (job: Job) =
    let graph recipe =
        let mesh = Compilation.Mesh job.Single.Recipe
        let declared = DeepSeekV3(job.Config).Declare(job.Single.Recipe.MicroBatch * mesh.Data, job.SeqLength)

        match Pipeline.run recipe declared with
        | Ok c -> c
        | Error wrong -> failtestf "%A" wrong

    let plain, fused = graph (job.Single.Recipe.WithFusion false), graph (job.Single.Recipe.WithFusion true)
    let hits = fused.Fusions |> List.sumBy snd
    Expect.isGreaterThan hits 0 "rules apply"
    let whole = Feed.lookup 7 plain.Joint
    let reference, result = Evaluator.run plain.Joint whole whole, Evaluator.run fused.Joint whole whole

    for name in reference.OutputNames do
        let distance = apart (result.Output name) (reference.Output name)

        // as for partition: 1e-15 at least, since a gradient that is zero but for rounding has no smaller differences in float64
        if not (distance < 1e-8) then
            failtestf "%s differs by %g: %A" name distance job

let private covered () =
    let total name =
        match seen.TryGetValue name with
        | true, n -> float n
        | false, _ -> 0.0

    for name, least in
        [
            "routed rows split by expert", 0.3
            "a pending partial sum", 0.3
            "two or more base axes", 0.3
            "context parallel", 0.1
            "expert tensor parallel", 0.05
            "no sequence parallel", 0.05
            "rows by all-gather", 0.1
            "fused dispatch", 0.05
            "several stages, uneven", 0.1
            "recomputed", 0.2
            "not fused", 0.1
            "some rules fused, some not", 0.2
            "bf16", 0.1
            "loss and gradient in one op", 0.03
            "loss over a split vocabulary", 0.1
            "fp8 over several ranks", 0.1
            "rows in blocks", 0.2
            "one group of experts", 0.1
            "dropped groups score zero", 0.05
            "weights not normalised", 0.1
            "scores by softmax", 0.1
            "groups by their best", 0.1
            "experts without bias or groups", 0.1
            "several depths of MTP", 0.05
            "no balance loss", 0.2
            "several sequences a rank", 0.1
            "every rank its own optimizer state", 0.1
            "gradients and moments in bf16", 0.2
            "microbatches that take turns", 0.05
        ] do
        let share = total name / total "cases"
        printfn $"coverage: %s{name} %.0f{100.0 * share} %%"
        Expect.isGreaterThanOrEqual share least name

let private few = {
    Properties.config [ typeof<OneStage> ] with
        maxTest = max 20 (Properties.cases / 5)
}

let tests =
    testSequenced
    <| testList "partition" [
        table
        Campaign.law [ typeof<AnyStages> ] "a partitioned model computes what the model computes" partitioned
        testCase "the models partitioned cover rows split by expert, pending sums and several mesh axes" covered
        testPropertyWithConfig few "a fused model computes what the model computes" fused

        testCase "every fusion rule applies to the model"
        <| fun () ->
            let c = compiled Presets.Tiny (tiny.WithParallelism(1, 1, 1, 1))
            let hits = Map.ofList c.Fusions
            Expect.equal hits["mla_rope_q"] 5 "one a layer"
            Expect.equal hits["mla_rope_kv"] 5 "one a layer"
            Expect.equal hits["permute_with_probs"] 4 "one a MoE layer"
            Expect.equal hits["unpermute"] 4 "one a MoE layer"
            Expect.equal hits["router"] 4 "one a MoE layer"
            Expect.equal hits["balance"] 4 "one a MoE layer"
            Expect.equal hits["linear_cross_entropy"] 2 "the head's loss and MTP's"
            // the other sum of a layer is normed in the next, where a stage may begin
            Expect.equal hits["add_rms_norm"] 7 "one a layer, one more where a norm ends the last layer and MTP's"

        testCase
            "what F sends, F receives: also hidden states that only a loss reads, in the backward pass with its gradient"
        <| fun () ->
            let config =
                {
                    plain with
                        Layers = 4
                        Mtp = 2
                        Yarn = false
                }
                    .Config

            // the last stage reads what it receives in I alone
            let plan =
                (compiled
                    config
                    (Recipe.Default.WithParallelism(1, 3, 1, 1).WithLayout("Ett|ttmm|L").WithBatch(3, 1, 8)))
                    .Plan

            let messages stage (phase: Phase) (isKind: Collective -> bool) = [
                for program in plan.Stages[stage].Programs do
                    if program.Phase = phase then
                        for step in program.Steps do
                            match step with
                            | Step.Start(_, kind, group, inputs, outputs, _) when isKind kind ->
                                plan.Groups[group].Name, inputs.Count + outputs.Count
                            | Step.Start _
                            | Step.Launch _
                            | Step.Wait _
                            | Step.Free _ -> ()
            ]

            let sent, received = messages 1 (Phase.F 0) _.IsSend, messages 2 (Phase.F 0) _.IsRecv
            Expect.equal (List.sumBy snd sent) 3 "the states of the last layer and of both depths"
            Expect.equal received sent "in the order of sending"
            Expect.isEmpty (messages 2 (Phase.I 0) _.IsRecv) "nothing later"

            let reads (stage: StagePlan) (phase: Phase) kernel = [
                for program in stage.Programs do
                    if program.Phase = phase then
                        for step in program.Steps do
                            match step with
                            | Step.Launch(k, _, inputs, _, _) when k = kernel -> inputs[0]
                            | Step.Launch _
                            | Step.Start _
                            | Step.Wait _
                            | Step.Free _ -> ()
            ]

            let losses = reads plan.Stages[2] (Phase.I 0) KernelId.LinearCrossEntropyGrad
            Expect.equal losses.Length 3 "three losses with their gradients"
            Expect.isEmpty (reads plan.Stages[2] (Phase.F 0) KernelId.LinearCrossEntropy) "none in F"

        testCase "recomputed attention is not kept: less is live, and nothing else changes"
        <| fun () ->
            let recipe = tiny.WithParallelism(1, 1, 1, 1)
            let peak (r: Recipe) = (compiled Presets.Tiny r).Plan.Memory[0].Activations
            Expect.isLessThan (peak (recipe.WithRecompute "core_attn")) (peak recipe) "activations"
    ]

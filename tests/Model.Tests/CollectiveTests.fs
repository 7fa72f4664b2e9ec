/// Every collective of the 671B plan beside what Megatron issues; docs/collectives.md has the same tables.
module DeepSeekGraph.Models.Tests.CollectiveTests

open System
open System.Globalization
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Testing

/// One purpose: the collectives of the plan that serve it, by program, kind, module and group; what Megatron issues for it, with
/// the bytes of each operand; where that stands in its code; and what differs, with the bytes that it makes.
type private Row = {
    What: string
    Here: string list
    There: (string * int64) list
    Source: string
    Why: (string * int64) list
}

let private c = Recipes.Pretrain.Config
let private plan = lazy Recipes.Pretrain.Compile()
let private lines = lazy (PlanExplanation(plan.Value, 8).Collectives |> List.ofSeq)

// sizes, from the configuration and the recipe's degrees alone
let private tp, private dp, private ep = 2L, 32L, 64L
let private seq = 4096L
let private hidden, private vocab = int64 c.HiddenSize, int64 c.VocabSize
let private qLora, private kvLora, private rope = int64 c.QLoraRank, int64 c.KvLoraRank, int64 c.QkRopeHeadDim
let private experts, private topK = int64 c.NRoutedExperts, int64 c.NumExpertsPerTok
let private bf16, private fp32, private i64 = 2L, 4L, 8L
/// Features of a rank's tokens, and of all tokens, in bf16.
let private shard features = seq / tp * features * bf16
let private whole features = seq * features * bf16
let private rows = seq / tp * topK
/// Megatron pads the vocabulary to a multiple of 1280 x TP.
let private padded = (vocab + 1280L * tp - 1L) / (1280L * tp) * (1280L * tp)

let private layers, private attention, private vocabulary =
    "tensor_parallel/layers.py", "transformer/multi_latent_attention.py", "tensor_parallel/cross_entropy.py"

let private dispatcher, private router = "transformer/moe/token_dispatcher.py", "transformer/moe/router.py"
let private finalize = "distributed/finalize_model_grads.py"

let private row what here there source why = {
    What = what
    Here = here
    There = there
    Source = source
    Why = why
}

/// What attention sends; stage 0 has I and W in one program.
let private attentionRows (i: string) = [
    row
        "latents of queries and of keys and values, rope key, before the up-projections"
        [ "F all_gather self_attn tp" ]
        [
            "all-gather tp", shard qLora
            "all-gather tp", shard kvLora
            "all-gather tp", shard rope
        ]
        attention
        [ "one bundle here", 0L ]
    row "output of `o_proj`" [ "F reduce_scatter self_attn tp" ] [ "reduce-scatter tp", whole hidden ] layers []
    row
        "gradient of that output; saved latents, for gradients of the up-projections"
        (List.distinct [ $"%s{i} all_gather self_attn tp"; "W all_gather self_attn tp" ])
        [
            "all-gather tp", shard hidden
            "all-gather tp", shard qLora
            "all-gather tp", shard kvLora
        ]
        layers
        []
    row
        "gradients of latents and rope key"
        [ $"%s{i} reduce_scatter self_attn tp" ]
        [
            "reduce-scatter tp", whole qLora
            "reduce-scatter tp", whole kvLora
            "reduce-scatter tp", whole rope
        ]
        attention
        [ "one bundle here", 0L ]
]

let private feedForwardRows what gather reduce backward grad = [
    row $"input of %s{what}" [ $"F all_gather %s{gather} tp" ] [ "all-gather tp", shard hidden ] layers []
    row $"output of %s{what}" [ $"F reduce_scatter %s{reduce} tp" ] [ "reduce-scatter tp", whole hidden ] layers []
    row
        "gradient of that output; saved input, for the weight gradient"
        backward
        [ "all-gather tp", shard hidden; "all-gather tp", shard hidden ]
        layers
        []
    row "gradient of that input" grad [ "reduce-scatter tp", whole hidden ] layers []
]

let private dense =
    attentionRows "W"
    @ feedForwardRows "the feed-forward" "mlp" "mlp" [ "W all_gather mlp tp" ] [ "W reduce_scatter mlp tp" ]

let private moe =
    attentionRows "I"
    @ [
        row
            "balance loss: tokens of each expert in a sequence"
            [ "F all_reduce mlp.gate.balance tp" ]
            [ "all-reduce tp", experts * i64 ]
            router
            [ "counts in fp32 here, in int64 there", experts * (fp32 - i64) ]
        row "balance loss: its gradient" [ "I all_reduce mlp.gate.balance tp" ] [] router [
            "Megatron keeps the counts summed; here the gradient multiplies a rank's own counts, and the product is summed",
            experts * fp32
        ]
        row
            "how many tokens each expert gets"
            [ "F route_to_experts mlp.experts tp+dp" ]
            [ "all-gather ep", experts * i64 ]
            dispatcher
            [
                "int32 here, int64 there", experts * (4L - i64)
                "a rank sends another one only the counts of that one's experts, a 64th of what an all-gather sends", 0L
            ]
        row
            "dispatch: rows and their probabilities"
            [ "F rows_to_experts mlp.experts tp+dp" ]
            [ "all-to-all ep", rows * hidden * bf16; "all-to-all ep", rows * fp32 ]
            dispatcher
            [ "one bundle here", 0L ]
        row
            "combine: rows"
            [ "F rows_to_tokens mlp.experts tp+dp" ]
            [ "all-to-all ep", rows * hidden * bf16 ]
            dispatcher
            []
        row
            "gradient of combine"
            [ "I rows_to_experts mlp.experts tp+dp" ]
            [ "all-to-all ep", rows * hidden * bf16 ]
            dispatcher
            []
        row
            "gradient of dispatch: rows and probabilities"
            [ "I rows_to_tokens mlp.experts tp+dp" ]
            [ "all-to-all ep", rows * hidden * bf16; "all-to-all ep", rows * fp32 ]
            dispatcher
            [ "one bundle here", 0L ]
    ]
    @ feedForwardRows "the shared expert" "mlp.shared_experts" "mlp" [
        "I all_gather mlp.shared_experts tp"
        "W all_gather mlp.shared_experts tp"
    ] [ "I reduce_scatter . tp" ]

let private mtp = [
    row
        "its transformer layer: a layer with experts"
        (moe |> List.collect _.Here)
        (moe |> List.collect _.There)
        "transformer/transformer_layer.py"
        [ "as above", moe |> List.collect _.Why |> List.sumBy snd ]
    row "embedding of the next tokens" [ "F reduce_scatter . tp" ] [ "reduce-scatter tp", whole hidden ] layers []
    row "its gradient" [ "W all_gather . tp" ] [ "all-gather tp", shard hidden ] layers []
    row
        "`eh_proj`, forward: input [embedding, hidden]; output, of which each rank made half the features"
        []
        [ "all-gather tp", shard (2L * hidden); "all-gather tp", whole (hidden / tp) ]
        "transformer/multi_token_prediction.py"
        [
            "whole on every rank here: a rank multiplies its own tokens, and the gradient is summed over tp at the end of the step",
            -(shard (2L * hidden) + whole (hidden / tp))
        ]
    row
        "`eh_proj`, backward: gradient of the output; saved input; gradient of the input"
        []
        [
            "all-gather tp", shard hidden
            "all-gather tp", shard (2L * hidden)
            "reduce-scatter tp", whole (2L * hidden)
        ]
        "transformer/multi_token_prediction.py"
        [ "as forward", -(shard hidden + shard (2L * hidden) + whole (2L * hidden)) ]
]

let private ends = [
    row "embedding" [ "F reduce_scatter model.embed_tokens tp" ] [ "reduce-scatter tp", whole hidden ] layers []
    row "its gradient" [ "W all_gather model.embed_tokens tp" ] [ "all-gather tp", shard hidden ] layers []
    row
        "input of the head, twice"
        [ "F all_gather loss tp" ]
        [ "all-gather tp", shard hidden; "all-gather tp", shard hidden ]
        layers
        []
    row
        "cross-entropy, twice: largest logit of each token"
        [ "F all_reduce_max loss tp" ]
        [ "all-reduce tp", seq * fp32; "all-reduce tp", seq * fp32 ]
        vocabulary
        []
    row
        "cross-entropy, twice: logit of the label, sum of exponentials"
        [ "F all_reduce loss tp" ]
        [ for _ in 1..4 -> "all-reduce tp", seq * fp32 ]
        vocabulary
        [ "bundles of two here", 0L ]
    row
        "saved input of the head, twice"
        [ "I all_gather loss tp" ]
        [ "all-gather tp", shard hidden; "all-gather tp", shard hidden ]
        layers
        [ "one bundle here", 0L ]
    row
        "gradient of that input, twice"
        [ "I reduce_scatter loss tp" ]
        [ "reduce-scatter tp", whole hidden; "reduce-scatter tp", whole hidden ]
        layers
        [ "one bundle here", 0L ]
]

let private pipeline =
    let message = "pipeline_parallel/p2p_communication.py"

    [
        row "activations from the stage before" [ "F recv" ] [ "receive", shard hidden ] message []
        row "activations to the stage after" [ "F send" ] [ "send", shard hidden ] message []
        row "gradients from the stage after" [ "I recv" ] [ "receive", shard hidden ] message []
        row "gradients to the stage before" [ "I send" ] [ "send", shard hidden ] message []
    ]

/// Numbers of a rank in dense parameters (all but experts): those split over tp, those whole.
let private attentionNumbers =
    let heads = int64 c.NumAttentionHeads
    let nope, v = int64 c.QkNopeHeadDim, int64 c.VHeadDim
    let split = heads * (nope + rope) * qLora + heads * (nope + v) * kvLora + hidden * heads * v
    split / tp, qLora * hidden + qLora + (kvLora + rope) * hidden + kvLora + 2L * hidden

let private plus (a, b) (c: int64, d: int64) : int64 * int64 = a + c, b + d
let private times n (a, b) : int64 * int64 = n * a, n * b
let private denseNumbers = attentionNumbers |> plus (3L * hidden * int64 c.IntermediateSize / tp, 0L)

let private moeNumbers =
    let shared = int64 c.NSharedExperts * 3L * hidden * int64 c.MoeIntermediateSize
    attentionNumbers |> plus (shared / tp, experts * hidden)

/// Megatron's stages 0, 1 and 15: its vocabulary is padded, its `eh_proj` split.
let private numbers =
    let table = padded / tp * hidden, 0L

    Map [
        0, table |> plus (times 3L denseNumbers) |> plus moeNumbers
        1, times 4L moeNumbers
        15,
        times 2L table
        |> plus (times 2L moeNumbers)
        // the final norm, and three norms and the projection of multi-token prediction
        |> plus (2L * hidden * hidden / tp, 4L * hidden)
    ]

/// What Megatron pads an embedding or head by, in numbers of a rank; what `eh_proj` is larger by here.
let private padding, private projection = (padded - vocab) / tp * hidden, 2L * hidden * hidden / tp

let private stageRows stage =
    let split, whole = numbers[stage]
    let tables = Map [ 0, 1L; 1, 0L; 15, 2L ]
    let routers = Map [ 0, 1L; 1, 4L; 15, 2L ]
    let buffer = "distributed/param_and_grad_buffer.py"
    let some reasons = reasons |> List.filter (fun (_, bytes) -> bytes <> 0L)

    let sizes bytes = [
        "Megatron pads the vocabulary to 130,560", -(tables[stage] * bytes padding)
        "`eh_proj` is split there, whole here", (if stage = 15 then bytes projection else 0L)
    ]

    [
        row
            $"stage %i{stage}: gradients of dense parameters"
            [ $"%i{stage} reduce_scatter optimizer.reduce dp" ]
            [ "reduce-scatter dp", (split + whole) * bf16 ]
            buffer
            (some (sizes (fun n -> n * bf16)))
        row
            $"stage %i{stage}: gradients of parameters that are whole on both tp ranks (norms, routers, `q_a_proj`, `kv_a_proj`)"
            [ $"%i{stage} all_reduce optimizer.reduce tp" ]
            [ "all-reduce tp", whole * bf16 ]
            finalize
            (some [
                "after the reduce-scatter here, a 32nd each; whole gradients there", -(whole * bf16 * 31L / 32L)
                "and of `eh_proj` here", (if stage = 15 then tp * projection * bf16 / dp else 0L)
            ])
        row
            $"stage %i{stage}: updated parameters"
            [ $"%i{stage} all_gather optimizer.gather dp" ]
            [ "all-gather dp", (split + whole) * bf16 / dp ]
            buffer
            (some (
                ("routers are fp32 here, bf16 there", routers[stage] * experts * hidden * (fp32 - bf16) / dp)
                :: sizes (fun n -> n * bf16 / dp)
            ))
    ]

let private epilogue =
    List.collect stageRows [ 0; 1; 15 ]
    @ [
        row
            "stages 0 and 15: gradient of the embedding, which both hold"
            [ "0 all_reduce optimizer.reduce pp.0-15" ]
            [ "all-reduce embedding group", padded / tp * hidden * bf16 ]
            finalize
            [
                "a 32nd each here, the whole gradient there", -(vocab / tp * hidden * bf16 * 31L / 32L)
                "Megatron pads the vocabulary to 130,560", -(padding * bf16)
            ]
        row
            "norm of gradients"
            [
                "1 all_reduce optimizer.clip tp+dp"
                "1 all_reduce optimizer.clip dp"
                "1 all_reduce optimizer.clip pp"
            ]
            [ "all-reduce world", fp32 ]
            "optimizer/clip_grads.py"
            [
                "three sums of one number here, group by group; one over all ranks there", 2L * fp32
            ]
        row
            "stage 1: tokens of each expert, for the router's bias"
            [ "1 all_reduce optimizer.router_bias tp+dp" ]
            [ "all-reduce tp+dp", 4L * experts * fp32 ]
            finalize
            [ "counts in int64 here, in fp32 there", 4L * experts * (i64 - fp32) ]
        row
            "metrics"
            [
                "1 all_reduce metrics tp+dp"
                "1 all_reduce metrics dp"
                "1 all_reduce metrics pp"
            ]
            (("all-reduce dp", 2L * fp32)
             :: [
                 for group in [ "pp"; "tp"; "dp" ] -> $"all-reduce %s{group}", int64 (c.NumHiddenLayers + 1) * fp32
             ])
            "transformer/moe/moe_logging.py"
            [
                "loss, MTP loss and balance loss here, one number each, group by group; loss and count of tokens there (`megatron/training/training.py`)",
                6L * fp32 - 2L * fp32
                "the balance loss is sent layer by layer there; what is logged of MTP is left out on that side",
                -3L * int64 (c.NumHiddenLayers + 1) * fp32
            ]
    ]

let private within (prefix: string) (line: CollectiveLine) =
    line.Path = prefix || line.Path.StartsWith(prefix + ".", StringComparison.Ordinal)

/// Gradients whose reduction begins beside the backward pass stand in the epilogue's table.
let private programOf (line: CollectiveLine) = if line.Program.StartsWith('R') then "epilogue" else line.Program

let private key (path: string) (line: CollectiveLine) =
    let group = if line.Group.StartsWith("pp.0-1-", StringComparison.Ordinal) then "pp" else line.Group
    $"%s{programOf line} %s{line.Kind} %s{path} %s{group}"

let private ofLayer stage layer =
    let prefix = $"model.layers.%i{layer}"

    [
        for line in lines.Value do
            if
                line.Stage = stage
                && programOf line <> "epilogue"
                && within prefix line
                && line.Kind <> "send"
                && line.Kind <> "recv"
            then
                let path = if line.Path = prefix then "." else line.Path.Substring(prefix.Length + 1)
                key path line, line
    ]

/// The tables: name, rows, and all collectives of the plan that they are about, each with its key.
let private tables =
    lazy
        [
            "dense", dense, ofLayer 0 1
            "moe", moe, ofLayer 1 5
            "mtp", mtp, ofLayer 15 61
            "ends",
            ends,
            [
                for line in lines.Value do
                    if within "model.embed_tokens" line || within "loss" line then
                        key line.Path line, line
            ]
            "pipeline",
            pipeline,
            [
                for line in lines.Value do
                    if line.Stage = 1 && (line.Kind = "send" || line.Kind = "recv") then
                        $"%s{programOf line} %s{line.Kind}", line
            ]
            "epilogue",
            epilogue,
            [
                for line in lines.Value do
                    let isTied = line.Group = "pp.0-15"

                    let ofStage =
                        line.Stage = 1
                        || List.contains line.Stage [ 0; 15 ]
                           && (line.Path = "optimizer.reduce" || line.Path = "optimizer.gather")

                    // both stages sum the embedding's gradient together
                    if programOf line = "epilogue" && ofStage && not (isTied && line.Stage = 15) then
                        (key line.Path line).Replace("epilogue", string line.Stage), line
            ]
        ]

let private number (n: int64) = n.ToString("N0", CultureInfo.InvariantCulture)

let private cells (found: (string * CollectiveLine) list) (r: Row) =
    let mine = found |> List.filter (fun (k, _) -> List.contains k r.Here) |> List.map snd
    let here = mine |> List.sumBy _.Bytes
    let there = r.There |> List.sumBy snd

    let named =
        mine
        |> List.countBy (fun l ->
            let group = if l.Group.StartsWith("pp.0-1-", StringComparison.Ordinal) then "pp" else l.Group
            let kind = l.Kind.Replace('_', '-')
            let group = if l.Kind = "send" || l.Kind = "recv" then "" else $" %s{group}"

            if programOf l = "epilogue" then
                $"%s{kind}%s{group}"
            else
                $"%s{programOf l} %s{kind}%s{group}")
        |> List.map (fun (name, n) -> if n = 1 then name else $"%s{name} x %i{n}")

    let theirs =
        r.There
        |> List.countBy fst
        |> List.map (fun (name, n) -> if n = 1 then name else $"%s{name} x %i{n}")

    let text names = if List.isEmpty names then "-" else String.concat ", " names

    let why =
        r.Why
        |> List.map (fun (reason, bytes) ->
            if bytes = 0L || r.Why.Length = 1 then reason else $"%s{reason} (%s{number bytes})")
        |> String.concat "; "

    here,
    there,
    $"| %s{r.What} | %s{text named} | %s{number here} | %s{text theirs} | %s{number there} | %s{number (here - there)} | `%s{r.Source}` | %s{why} |"

let private table (rows: Row list) found =
    let made = rows |> List.map (cells found)
    let sum part = made |> List.sumBy part
    let here, there = sum (fun (h, _, _) -> h), sum (fun (_, t, _) -> t)

    [
        "| for | here | bytes | Megatron | bytes | difference | there in | why |"
        "|---|---|---|---|---|---|---|---|"
        yield! made |> List.map (fun (_, _, line) -> line)
        $"| **sum** | | %s{number here} | | %s{number there} | %s{number (here - there)} | | |"
    ]
    |> String.concat "\n"

/// One layer with experts of the published width, experts over `expert` ranks of nodes of 8, TP 2.
let private exchanges expert (dispatcher: Dispatcher) =
    let config = DeepSeekV3Config(NumHiddenLayers = 2, FirstKDenseReplace = 1, NumNextnPredictLayers = 0)

    let recipe =
        Recipe.Default
            .WithParallelism(2, 1, expert, expert / 2)
            .WithBatch(expert / 2, 1, 4096)
            .WithDType(DType.BFloat16)
            .WithDispatcher(dispatcher)
            .WithRanksPerNode
            8

    PlanExplanation(DeepSeekV3(config).Compile recipe, 8).Collectives
    |> Seq.filter (fun l -> List.contains l.Kind [ "rows_to_experts"; "rows_to_tokens"; "dispatch"; "combine" ])
    |> List.ofSeq

let private beside expert = exchanges expert Dispatcher.AllToAll, exchanges expert Dispatcher.Flex
/// Over the recipe's 64 ranks, and over one node.
let private both, private inside = lazy (beside 64), lazy (beside 8)

let private share (a: int64) (b: int64) = (float b / float a).ToString("F2", CultureInfo.InvariantCulture)

let private lineByLine line (plain: CollectiveLine list, flex: CollectiveLine list) =
    List.zip3 [ "dispatch"; "combine"; "gradient of combine"; "gradient of dispatch" ] plain flex
    |> List.map (fun (what, a, b) -> line what a b)

let private flexTable () =
    let line what (a: CollectiveLine) (b: CollectiveLine) =
        $"| %s{what} | %s{number a.Sent} | %s{number a.InterNode} | %s{number b.Sent} | %s{number b.InterNode} | %s{share a.InterNode b.InterNode} |"

    [
        "| for | alltoall sends | to other nodes | flex sends | to other nodes | flex / alltoall between nodes |"
        "|---|---|---|---|---|---|"
        yield! lineByLine line both.Value
    ]
    |> String.concat "\n"

let private insideTable () =
    let line what (a: CollectiveLine) (b: CollectiveLine) =
        $"| %s{what} | %s{number a.Sent} | %s{number b.Sent} | %s{share a.Sent b.Sent} |"

    [
        "| for | alltoall sends | flex sends | flex / alltoall |"
        "|---|---|---|---|"
        yield! lineByLine line inside.Value
    ]
    |> String.concat "\n"

let tests =
    testList "collectives" [
        testCase "every collective stands in one row, and the reasons of a row make its difference to the byte"
        <| fun () ->
            for name, rows, found in tables.Value do
                Expect.isNonEmpty found name

                for key, _ in found do
                    let times = rows |> List.filter (fun r -> List.contains key r.Here) |> List.length
                    Expect.equal times 1 $"%s{name}: '%s{key}'"

                for r in rows do
                    for key in r.Here do
                        Expect.exists found (fun (k, _) -> k = key) $"%s{name}: no '%s{key}' for %s{r.What}"

                    let here, there, _ = cells found r

                    Expect.equal
                        (r.Why |> List.sumBy snd)
                        (here - there)
                        $"%s{name}, %s{r.What}: %i{here} against %i{there}"

        testCase "layers send what Megatron's send, but for counts and the balance loss"
        <| fun () ->
            let difference name =
                let _, rows, found = tables.Value |> List.find (fun (n, _, _) -> n = name)
                rows |> List.sumBy (fun r -> let h, t, _ = cells found r in h - t)

            Expect.equal (difference "dense") 0L "dense"
            // counts of the loss 2048 - 1024, of the exchange 2048 - 1024; the loss's gradient 1024
            Expect.equal (difference "moe") -1024L "with experts"
            Expect.equal (difference "ends") 0L "embedding, head and loss"
            Expect.equal (difference "pipeline") 0L "messages"

        testCase "all layers of a kind send alike"
        <| fun () ->
            let sends stage layer = ofLayer stage layer |> List.map (fun (k, l) -> k, l.Bytes, l.Runs) |> List.sort

            for layer in 4..7 do
                Expect.equal (sends 1 layer) (sends 1 5) $"layer %i{layer}"

            Expect.equal (sends 0 2) (sends 0 1) "dense"

        testCase "alltoall and flex send what the sizes and chances say"
        <| fun () ->
            let plain, flex = both.Value
            Expect.equal (plain.Length, flex.Length) (4, 4) "four exchanges"
            let tokens, row = float (seq / tp), float (hidden * bf16)

            let some n taken =
                Seq.init 8 (fun i -> float (n - taken - i) / float (n - i)) |> Seq.reduce (*) |> fun p -> 1.0 - p
            // half of the groups are kept; 8 of the 128 experts there
            let node, rank = 0.5 * some 128 32, 0.5 * some 128 4

            for i, (a, b) in List.indexed (List.zip plain flex) do
                // probabilities go with the dispatch, and come back with its gradient
                let one = if i = 0 || i = 3 then float fp32 else 0.0
                // with the first dispatch each row says which token it is of
                let more = if i = 0 then one + 4.0 else one

                let near what (said: int64) expected =
                    Expect.floatClose { absolute = 1.0; relative = 0.0 } (float said) expected $"%i{i}: %s{what}"

                near "alltoall" a.Sent (float rows * (row + one) * 63.0 / 64.0)
                near "alltoall between nodes" a.InterNode (float rows * (row + one) * 56.0 / 64.0)
                near "flex between nodes" b.InterNode (tokens * 7.0 * node * row + float rows * more * 7.0 / 8.0)

                near "flex" b.Sent (tokens * (7.0 * node + 8.0 * 7.0 * rank) * row + float rows * more * 63.0 / 64.0)

                // a rank of one node has a group of 32 experts
                let a, b = (fst inside.Value)[i], (snd inside.Value)[i]
                near "alltoall in one node" a.Sent (float rows * (row + one) * 7.0 / 8.0)
                near "flex in one node" b.Sent (tokens * 7.0 * node * row + float rows * more * 7.0 / 8.0)
                Expect.equal (a.InterNode, b.InterNode) (0L, 0L) "one node"

        Documents.agrees
            "collectives.md"
            (lazy
                (("flex", flexTable ())
                 :: ("inside", insideTable ())
                 :: [ for name, rows, found in tables.Value -> name, table rows found ]))
    ]

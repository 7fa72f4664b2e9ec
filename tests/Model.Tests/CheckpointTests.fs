/// What a published checkpoint says of itself: config.json both ways, and the table from tensors to parameters.
module DeepSeekGraph.Models.Tests.CheckpointTests

open System.IO
open System.Text.Json.Nodes
open Expecto
open FsCheck
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Models
open DeepSeekGraph.Models.HuggingFace
open DeepSeekGraph.Testing
open DeepSeekGraph.Models.Tests.Golden

/// Legal configurations; what only training knows is left as it is by default.
type Configurations =
    static member Config() : Arbitrary<DeepSeekV3Config> =
        let some (values: 'T list) = Gen.elements values

        let yarn = gen {
            let! factor = some [ 1.0; 4.0; 32.0; 40.0 ]
            let! slow = some [ 1.0; 0.5 ]
            let! fast = some [ 1.0; 32.0 ]
            let! mscale = some [ 0.0; 0.707; 1.0 ]
            let! all = some [ 0.0; 0.707; 1.0 ]
            let! original = some [ 64; 4096 ]

            return
                YarnScaling(
                    Factor = factor,
                    BetaSlow = slow,
                    BetaFast = fast,
                    Mscale = mscale,
                    MscaleAllDim = all,
                    OriginalMaxPositionEmbeddings = original
                )
        }

        gen {
            let! vocab = some [ 16; 129 ]
            let! hidden = some [ 8; 24 ]
            let! layers = some [ 1; 2; 5 ]
            let! heads = some [ 1; 2; 3 ]
            let! qLora = some [ 0; 6 ]
            let! kvLora = some [ 2; 5 ]
            let! nope = some [ 1; 4 ]
            let! rope = some [ 2; 6 ]
            let! value = some [ 1; 3 ]
            let! theta = some [ 10000.0; 50000.0; 1e6 + 0.1 ]
            let! scaling = Gen.optionOf yarn
            let! ffn = some [ 5; 12 ]
            let! dense = some [ 0; 1; 9 ]
            let! moe = some [ 3; 4 ]
            let! shared = some [ 0; 1; 2 ]
            let! groups = some [ 1; 2; 4 ]
            let! perGroup = some [ 1; 2; 3 ]
            let! keep = Gen.choose (1, groups)
            let! topK = Gen.choose (1, keep * perGroup)
            let! scoring = some [ ScoringFunc.Sigmoid; ScoringFunc.Softmax ]
            let! how = some [ TopkMethod.NoauxTc; TopkMethod.GroupLimitedGreedy; TopkMethod.Greedy ]
            let! normalize = some [ true; false ]
            let! factor = some [ 1.0; 2.446; 16.0 ]
            let! depths = some [ 0; 1; 2 ]
            let! eps = some [ 1e-6; 1e-5 ]
            let! std = some [ 0.006; 0.02 ]

            return
                DeepSeekV3Config(
                    VocabSize = vocab,
                    HiddenSize = hidden,
                    NumHiddenLayers = layers,
                    RmsNormEps = eps,
                    InitializerRange = std,
                    NumAttentionHeads = heads,
                    QLoraRank = qLora,
                    KvLoraRank = kvLora,
                    QkNopeHeadDim = nope,
                    QkRopeHeadDim = rope,
                    VHeadDim = value,
                    RopeTheta = theta,
                    RopeScaling = Option.toObj scaling,
                    IntermediateSize = ffn,
                    FirstKDenseReplace = dense,
                    MoeIntermediateSize = moe,
                    NSharedExperts = shared,
                    NRoutedExperts = groups * perGroup,
                    NumExpertsPerTok = topK,
                    ScoringFunc = scoring,
                    TopkMethod = how,
                    NGroup = groups,
                    TopkGroup = keep,
                    NormTopkProb = normalize,
                    RoutedScalingFactor = factor,
                    NumNextnPredictLayers = depths
                )
        }
        |> Arb.fromGen

let private over name law = Properties.propertyOver [ typeof<Configurations> ] name law

let private roundTrip =
    over "a configuration that is written reads back as itself"
    <| fun (c: DeepSeekV3Config) ->
        Expect.isEmpty (ConfigCheck.Check c) "legal"
        Expect.equal (ConfigJson.Parse(ConfigJson.Write c)) c "alone"

        // whatever stood there before
        let basis = (nonNull (JsonNode.Parse(File.ReadAllText(path "v3_tiny_yarn" "config.json")))).AsObject()

        let text = ConfigJson.Write(c, "float32", true, basis)

        Expect.equal (ConfigJson.Parse text) c "over another file"
        Expect.stringContains text "\"eos_token_id\": 1" "what it does not know stays"
        Expect.stringContains text "weight_block_size" "fp8"

let private training =
    testCase "what only training knows is not in config.json"
    <| fun () ->
        let c = DeepSeekV3Config()

        let other =
            DeepSeekV3Config(
                BiasUpdateSpeed = 0.5,
                SeqAuxLossAlpha = 0.0,
                MtpLossScalingFactor = 0.7,
                ZeroMaskedGroups = true
            )

        Expect.equal (ConfigJson.Write other) (ConfigJson.Write c) "text"

/// Fields of published files (deepseek-ai/DeepSeek-V3, -V2, -V2-Lite, moonshotai/Moonlight-16B-A3B, Kimi-K2-Instruct) that tell
/// them apart; sizes that all spell alike are V3's.
let private published (fields: (string * string) list) =
    let standard = [
        "vocab_size", "129280"
        "hidden_size", "7168"
        "intermediate_size", "18432"
        "moe_intermediate_size", "2048"
        "num_hidden_layers", "61"
        "num_attention_heads", "128"
        "num_key_value_heads", "128"
        "n_shared_experts", "1"
        "n_routed_experts", "256"
        "routed_scaling_factor", "2.5"
        "kv_lora_rank", "512"
        "q_lora_rank", "1536"
        "qk_rope_head_dim", "64"
        "v_head_dim", "128"
        "qk_nope_head_dim", "128"
        "num_experts_per_tok", "8"
        "moe_layer_freq", "1"
        "first_k_dense_replace", "3"
        "hidden_act", "\"silu\""
        "initializer_range", "0.02"
        "rms_norm_eps", "1e-06"
        "pretraining_tp", "1"
        "ep_size", "1"
        "aux_loss_alpha", "0.001"
        "seq_aux", "true"
        "tie_word_embeddings", "false"
        "attention_bias", "false"
        "auto_map", """{"AutoConfig": "configuration_deepseek.DeepseekV3Config"}"""
    ]

    let all = (Map.ofList standard, fields) ||> List.fold (fun m (k, v) -> Map.add k v m)
    let body = all |> Map.toList |> List.map (fun (k, v) -> $"\"%s{k}\": %s{v}") |> String.concat ", "
    ConfigJson.Parse("{" + body + "}")

let private yarn (factor: int) (mscale: string) (fast: int) =
    $"""{{"type": "yarn", "factor": %i{factor}, "mscale": %s{mscale}, "mscale_all_dim": %s{mscale}, "beta_fast": %i{fast}, "beta_slow": 1, "original_max_position_embeddings": 4096}}"""

let private families =
    testCase "V3, V2, V2-Lite, Moonlight and Kimi-K2 are read as what they are"
    <| fun () ->
        let v3 =
            published [
                "model_type", "\"deepseek_v3\""
                "architectures", "[\"DeepseekV3ForCausalLM\"]"
                "n_group", "8"
                "topk_group", "4"
                "norm_topk_prob", "true"
                "scoring_func", "\"sigmoid\""
                "topk_method", "\"noaux_tc\""
                "num_nextn_predict_layers", "1"
                "rope_scaling", yarn 40 "1.0" 32
                "quantization_config",
                """{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}"""
            ]

        Expect.equal v3 (DeepSeekV3Config(InitializerRange = 0.02)) "V3"

        let v2 =
            published [
                "model_type", "\"deepseek_v2\""
                "architectures", "[\"DeepseekV2ForCausalLM\"]"
                "vocab_size", "102400"
                "hidden_size", "5120"
                "num_hidden_layers", "60"
                "first_k_dense_replace", "1"
                "intermediate_size", "12288"
                "moe_intermediate_size", "1536"
                "n_shared_experts", "2"
                "n_routed_experts", "160"
                "num_experts_per_tok", "6"
                "n_group", "8"
                "topk_group", "3"
                "norm_topk_prob", "false"
                "routed_scaling_factor", "16.0"
                "scoring_func", "\"softmax\""
                "topk_method", "\"group_limited_greedy\""
                "rope_scaling", yarn 40 "0.707" 32
            ]

        Expect.equal (v2.ScoringFunc, v2.TopkMethod) (ScoringFunc.Softmax, TopkMethod.GroupLimitedGreedy) "V2"
        Expect.isFalse v2.NormTopkProb "V2's weights"
        // (0.1 x 0.707 x ln 40 + 1)^2 / sqrt 192
        Expect.floatClose { absolute = 1e-10; relative = 1e-9 } v2.SoftmaxScale 0.1147213867929261 "V2's scale"
        Expect.equal v2.Rotary.Mscale 1.0 "cos and sin"

        // as transformers 5 writes it: what its class has by default is unsaid
        let lite =
            published [
                "model_type", "\"deepseek_v2\""
                "q_lora_rank", "null"
                "n_group", "1"
                "topk_group", "1"
                "num_experts_per_tok", "6"
                "routed_scaling_factor", "1.0"
            ]

        Expect.equal (lite.ScoringFunc, lite.TopkMethod) (ScoringFunc.Softmax, TopkMethod.Greedy) "V2-Lite"
        Expect.equal (lite.QLoraRank, lite.NormTopkProb) (0, false) "V2-Lite"

        let moonlight =
            published [
                "model_type", "\"deepseek_v3\""
                "q_lora_rank", "null"
                "n_group", "1"
                "topk_group", "1"
                "n_routed_experts", "64"
                "num_experts_per_tok", "6"
                "rms_norm_eps", "1e-05"
                "rope_theta", "50000.0"
                "routed_scaling_factor", "2.446"
                "num_nextn_predict_layers", "0"
            ]

        Expect.equal (moonlight.ScoringFunc, moonlight.TopkMethod) (ScoringFunc.Sigmoid, TopkMethod.NoauxTc) "Moonlight"
        Expect.equal (moonlight.QLoraRank, moonlight.NormTopkProb) (0, true) "Moonlight"
        Expect.isNull moonlight.RopeScaling "Moonlight"

        let kimi =
            published [
                "model_type", "\"kimi_k2\""
                "architectures", "[\"DeepseekV3ForCausalLM\"]"
                "num_attention_heads", "64"
                "num_key_value_heads", "64"
                "n_routed_experts", "384"
                "n_group", "1"
                "topk_group", "1"
                "routed_scaling_factor", "2.827"
                "rope_theta", "50000.0"
                "rope_scaling", yarn 32 "1.0" 1
            ]

        Expect.equal (kimi.NRoutedExperts, kimi.NumAttentionHeads) (384, 64) "Kimi-K2"
        Expect.equal (kimi.ScoringFunc, kimi.TopkMethod) (ScoringFunc.Sigmoid, TopkMethod.NoauxTc) "Kimi-K2"

let private refused =
    testCase "other architectures and quantisations are refused, with what is supported"
    <| fun () ->
        let refusal fields =
            try
                published fields |> ignore
                failtest "was read"
            with :? DiagnosticException as e ->
                [ for d in e.Diagnostics -> d.Code ], (Seq.head e.Diagnostics).Help

        for fields in
            [
                [ "model_type", "\"llama\"" ]
                [ "architectures", "[\"Qwen3MoeForCausalLM\"]" ]
            ] do
            let codes, help = refusal fields
            Expect.equal codes [ Codes.ConfigUnsupported ] $"%A{fields}"

            for name in [ "deepseek_v2"; "deepseek_v3"; "kimi_k2"; "Moonlight"; "R1" ] do
                Expect.stringContains help name $"%A{fields}"

        for field in
            [
                "quantization_config", """{"quant_method": "compressed-tensors"}"""
                "quantization_config", """{"quant_method": "fp8", "weight_block_size": [64, 128]}"""
                "topk_method", "\"random\""
                "attention_bias", "true"
                "mlp_bias", "true"
                "tie_word_embeddings", "true"
                "moe_layer_freq", "2"
                "num_key_value_heads", "8"
                "hidden_act", "\"gelu\""
            ] do
            Expect.equal (fst (refusal [ field ])) [ Codes.ConfigUnsupported ] $"%A{field}"

let private product (extents: int seq) = Seq.fold (fun n e -> n * int64 e) 1L extents

/// Row-major element numbers of a box.
let private numbers (shape: int list) (start: int list) (extents: int list) =
    let strides = List.scanBack (fun e n -> int64 e * n) shape 1L |> List.tail

    (Seq.singleton 0L, List.zip3 strides start extents)
    ||> List.fold (fun at (stride, first, count) -> seq {
        for n in at do
            for i in first .. first + count - 1 do
                n + int64 i * stride
    })

let private bijection =
    over "tensors of a checkpoint and boxes of parameters are one to one, and fill every parameter"
    <| fun (c: DeepSeekV3Config) ->
        let graph = DeepSeekV3(c).Declare(1, 2)
        let map = WeightMap.Of graph
        let copies = set [ for struct (copy, _) in WeightMap.Copies c -> copy ]
        let tensors = List.ofSeq (map.Tensors c)
        let names = tensors |> List.map _.Name
        Expect.equal (List.distinct names).Length names.Length "names"

        let covered = [
            for tensor in tensors do
                match Option.ofObj (map.Find tensor.Name) with
                | None -> Expect.isTrue (copies.Contains tensor.Name && not (isNull tensor.Original)) tensor.Name
                | Some place ->
                    Expect.equal (List.ofSeq place.Piece.Shape) (List.ofSeq tensor.Shape) tensor.Name
                    Expect.equal (product place.Extents) (product tensor.Shape) tensor.Name

                    // the box is the run of elements that the piece names
                    let shape = List.ofSeq place.Entry.Shape
                    let box = numbers shape (List.ofSeq place.Start) (List.ofSeq place.Extents) |> List.ofSeq
                    let first = place.Piece.Offset
                    Expect.equal box [ first .. first + place.Piece.Elements - 1L ] tensor.Name

                    for n in box do
                        place.Entry.Parameter, n
        ]

        let all = [
            for p in ParameterList.Of graph do
                for n in 0L .. p.Type.Elements - 1L do
                    p.Name, n
        ]

        Expect.equal (List.sort covered) (List.sort all) "every element once"
        Expect.equal (Set.ofList names |> Set.intersect copies) copies "copies"
        Expect.equal (tensors |> List.exists _.Float32) (names |> List.exists _.EndsWith("_bias")) "biases in fp32"

        for tensor in tensors do
            if tensor.Blocks then
                Expect.equal (WeightMap.WeightOfScales(WeightMap.ScalesOf tensor.Name)) tensor.Name "scales"

            Expect.isNull (WeightMap.WeightOfScales tensor.Name) "no scales"

let private names =
    testCase "DeepSeek-V3's tensors have the published names, and those in blocks are the linear layers"
    <| fun () ->
        let tensors = WeightMap.Of(Presets.V3).Tensors(Presets.V3) |> List.ofSeq
        let find name = tensors |> List.find (fun t -> t.Name = name)
        let shape name = (find name).Shape |> List.ofSeq
        // 58 mixtures and one of MTP: 256 experts of 3 tensors
        Expect.equal (tensors |> List.filter _.Name.Contains(".experts.") |> List.length) (59 * 256 * 3) "experts"
        Expect.equal (shape "model.layers.60.mlp.experts.255.down_proj.weight") [ 7168; 2048 ] "last expert"
        Expect.equal (shape "model.layers.0.self_attn.kv_a_proj_with_mqa.weight") [ 576; 7168 ] "latent"
        Expect.equal (shape "model.layers.61.eh_proj.weight") [ 7168; 14336 ] "MTP"
        Expect.equal (shape "model.layers.61.shared_head.head.weight") [ 129280; 7168 ] "copy"
        let blocks name = (find name).Blocks

        Expect.equal
            (List.map blocks [
                "model.layers.0.self_attn.q_a_proj.weight"
                "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
                "model.layers.0.mlp.down_proj.weight"
                "model.layers.9.mlp.shared_experts.up_proj.weight"
                "model.layers.61.mlp.experts.0.gate_proj.weight"
                "model.embed_tokens.weight"
                "lm_head.weight"
                "model.layers.3.mlp.gate.weight"
                "model.layers.3.mlp.gate.e_score_correction_bias"
                "model.layers.3.self_attn.q_a_layernorm.weight"
                "model.layers.61.eh_proj.weight"
                "model.layers.61.shared_head.head.weight"
            ])
            [
                true
                true
                true
                true
                true
                false
                false
                false
                false
                false
                false
                false
            ]
            "blocks"

let tests = testList "checkpoints" [ roundTrip; training; families; refused; bijection; names ]

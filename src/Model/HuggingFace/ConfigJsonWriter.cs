// Writes config.json in the style of the published DeepSeek checkpoints.

using System.Text.Json;
using System.Text.Json.Nodes;

namespace DeepSeekGraph.Models.HuggingFace;

public static partial class ConfigJson
{
    private static readonly JsonSerializerOptions Indented = new() { WriteIndented = true };

    // transformers 5 says these in other words, which would contradict what is written
    private static readonly string[] Replaced = ["rope_parameters", "dtype", "head_dim", "qk_head_dim", "quantization_config"];

    /// The text of a config.json that reads back as `config`; what only training knows (speed of the bias, weights of the
    /// losses) is not in it. `torchDType` is the weights' type ("bfloat16", "float32"); `fp8`: linear weights are E4M3 in
    /// blocks of 128 x 128. Fields of `basis`, a checkpoint's own config.json, stay where they say nothing of this.
    public static string Write(
        DeepSeekV3Config config, string torchDType = "bfloat16", bool fp8 = false, JsonObject? basis = null)
    {
        var c = config;
        var v2 = c.TopkMethod != TopkMethod.NoauxTc;
        var json = basis?.DeepClone().AsObject() ?? new JsonObject
        {
            ["architectures"] = new JsonArray(v2 ? "DeepseekV2ForCausalLM" : "DeepseekV3ForCausalLM"),
            ["attention_bias"] = false,
            ["attention_dropout"] = 0.0,
            ["hidden_act"] = "silu",
            ["model_type"] = v2 ? "deepseek_v2" : "deepseek_v3",
            ["pretraining_tp"] = 1,
            ["tie_word_embeddings"] = false,
            ["use_cache"] = true,
        };
        foreach (var name in Replaced)
            json.Remove(name);

        json["vocab_size"] = c.VocabSize;
        json["hidden_size"] = c.HiddenSize;
        json["num_hidden_layers"] = c.NumHiddenLayers;
        json["rms_norm_eps"] = c.RmsNormEps;
        json["initializer_range"] = c.InitializerRange;
        json["num_attention_heads"] = c.NumAttentionHeads;
        json["num_key_value_heads"] = c.NumAttentionHeads;
        json["q_lora_rank"] = c.QLoraRank == 0 ? null : c.QLoraRank;
        json["kv_lora_rank"] = c.KvLoraRank;
        json["qk_nope_head_dim"] = c.QkNopeHeadDim;
        json["qk_rope_head_dim"] = c.QkRopeHeadDim;
        json["v_head_dim"] = c.VHeadDim;
        json["rope_theta"] = c.RopeTheta;
        json["rope_scaling"] = c.RopeScaling is { } yarn ? Scaling(yarn) : null;
        json["intermediate_size"] = c.IntermediateSize;
        json["first_k_dense_replace"] = c.FirstKDenseReplace;
        json["moe_intermediate_size"] = c.MoeIntermediateSize;
        json["moe_layer_freq"] = 1;
        json["n_shared_experts"] = c.NSharedExperts == 0 ? null : c.NSharedExperts;
        json["n_routed_experts"] = c.NRoutedExperts;
        json["num_experts_per_tok"] = c.NumExpertsPerTok;
        json["scoring_func"] = RecordFields.Snake(c.ScoringFunc.ToString());
        json["topk_method"] = RecordFields.Snake(c.TopkMethod.ToString());
        json["n_group"] = c.NGroup;
        json["topk_group"] = c.TopkGroup;
        json["norm_topk_prob"] = c.NormTopkProb;
        json["routed_scaling_factor"] = c.RoutedScalingFactor;
        json["num_nextn_predict_layers"] = c.NumNextnPredictLayers;
        json["torch_dtype"] = torchDType;
        if (fp8)
        {
            json["quantization_config"] = new JsonObject
            {
                ["activation_scheme"] = "dynamic",
                ["fmt"] = "e4m3",
                ["quant_method"] = "fp8",
                ["weight_block_size"] = new JsonArray(128, 128),
            };
        }

        return json.ToJsonString(Indented) + "\n";
    }

    private static JsonObject Scaling(YarnScaling yarn) => new()
    {
        ["beta_fast"] = yarn.BetaFast,
        ["beta_slow"] = yarn.BetaSlow,
        ["factor"] = yarn.Factor,
        ["mscale"] = yarn.Mscale,
        ["mscale_all_dim"] = yarn.MscaleAllDim,
        ["original_max_position_embeddings"] = yarn.OriginalMaxPositionEmbeddings,
        ["type"] = "yarn",
    };
}

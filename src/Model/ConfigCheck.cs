// What makes a configuration illegal: every mistake is found, named as in config.json, with both values.

namespace DeepSeekGraph.Models;

/// Checks of DeepSeekV3Config; DSG0701.
public static class ConfigCheck
{
    /// Every mistake of a configuration; empty for a legal one.
    public static IReadOnlyList<Diagnostic> Check(DeepSeekV3Config c, string source = "config")
    {
        var found = new List<Diagnostic>();
        void Require(bool legal, string field, string message, string help)
        {
            if (!legal)
                found.Add(new Diagnostic(Codes.ConfigIllegal, $"{source}, {field}", message, help));
        }

        void AtLeast(int least, int value, string field)
            => Require(value >= least, field, $"{field} is {value}", $"give {least} or more");

        AtLeast(1, c.VocabSize, "vocab_size");
        AtLeast(1, c.HiddenSize, "hidden_size");
        AtLeast(1, c.NumHiddenLayers, "num_hidden_layers");
        AtLeast(1, c.NumAttentionHeads, "num_attention_heads");
        AtLeast(0, c.QLoraRank, "q_lora_rank");
        AtLeast(1, c.KvLoraRank, "kv_lora_rank");
        AtLeast(1, c.QkNopeHeadDim, "qk_nope_head_dim");
        AtLeast(2, c.QkRopeHeadDim, "qk_rope_head_dim");
        AtLeast(1, c.VHeadDim, "v_head_dim");
        AtLeast(1, c.IntermediateSize, "intermediate_size");
        AtLeast(0, c.FirstKDenseReplace, "first_k_dense_replace");
        AtLeast(0, c.NumNextnPredictLayers, "num_nextn_predict_layers");
        Require(
            c.QkRopeHeadDim % 2 == 0,
            "qk_rope_head_dim",
            $"qk_rope_head_dim is {c.QkRopeHeadDim}; rotation takes features in pairs",
            "give an even number");
        Require(
            c.RopeTheta > 1 && double.IsFinite(c.RopeTheta),
            "rope_theta",
            $"rope_theta is {c.RopeTheta}",
            "give a number above 1, usually 10000");
        Require(
            c.RmsNormEps > 0 && c.InitializerRange > 0,
            "rms_norm_eps",
            $"rms_norm_eps is {c.RmsNormEps} and initializer_range is {c.InitializerRange}",
            "give positive numbers");
        if (c.RopeScaling is { } yarn)
        {
            Require(
                yarn.Factor >= 1 && yarn.OriginalMaxPositionEmbeddings >= 1,
                "rope_scaling",
                $"factor is {yarn.Factor} and original_max_position_embeddings is {yarn.OriginalMaxPositionEmbeddings}",
                "give 1 or more for both");
        }

        if (c.FirstKDenseReplace < c.NumHiddenLayers || c.NumNextnPredictLayers > 0)
        {
            AtLeast(1, c.MoeIntermediateSize, "moe_intermediate_size");
            AtLeast(0, c.NSharedExperts, "n_shared_experts");
            CheckRouter(c, AtLeast, Require);
        }

        return found;
    }

    private static void CheckRouter(
        DeepSeekV3Config c, Action<int, int, string> atLeast, Action<bool, string, string, string> require)
    {
        atLeast(1, c.NRoutedExperts, "n_routed_experts");
        atLeast(1, c.NGroup, "n_group");
        atLeast(1, c.TopkGroup, "topk_group");
        atLeast(1, c.NumExpertsPerTok, "num_experts_per_tok");
        if (c.NRoutedExperts < 1 || c.NGroup < 1)
            return;

        var divisors = Enumerable.Range(1, c.NRoutedExperts).Where(n => c.NRoutedExperts % n == 0);
        require(
            c.NRoutedExperts % c.NGroup == 0,
            "n_group",
            $"n_routed_experts {c.NRoutedExperts} do not fall into n_group {c.NGroup}",
            $"choose n_group from {string.Join(" ", divisors)}");
        require(
            c.TopkGroup <= c.NGroup,
            "topk_group",
            $"topk_group is {c.TopkGroup}, n_group is {c.NGroup}",
            $"choose topk_group from 1 to {c.NGroup}");
        var reachable = c.NRoutedExperts / c.NGroup * c.TopkGroup;
        require(
            c.NumExpertsPerTok <= reachable,
            "num_experts_per_tok",
            $"num_experts_per_tok is {c.NumExpertsPerTok}, the {c.TopkGroup} kept groups have {reachable} experts",
            $"choose num_experts_per_tok from 1 to {reachable}");
    }
}

// What makes a configuration illegal: every mistake is found, named as in config.json, with both values.

namespace DeepSeekGraph.Models;

/// Checks of DeepSeekV3Config; DSG0701.
public static class ConfigCheck
{
    // Far beyond any model, so that a damaged file neither overflows a product of two sizes nor declares for ever.
    private const int MostWide = 1 << 20;
    private const int MostNarrow = 1 << 14;
    private const int MostLayers = 1 << 10;

    /// Every mistake of a configuration; empty for a legal one.
    public static IReadOnlyList<Diagnostic> Check(DeepSeekV3Config c, string source = "config")
    {
        var found = new List<Diagnostic>();
        void Require(bool legal, string field, string message, string help)
        {
            if (!legal)
                found.Add(new Diagnostic(Codes.ConfigIllegal, $"{source}, {field}", message, help));
        }

        void Within(int least, int most, int value, string field)
            => Require(
                value >= least && value <= most, field, $"{field} is {value}", $"give a number from {least} to {most}");

        Within(1, MostWide, c.VocabSize, "vocab_size");
        Within(1, MostWide, c.HiddenSize, "hidden_size");
        Within(1, MostLayers, c.NumHiddenLayers, "num_hidden_layers");
        Within(1, MostNarrow, c.NumAttentionHeads, "num_attention_heads");
        Within(0, MostWide, c.QLoraRank, "q_lora_rank");
        Within(1, MostWide, c.KvLoraRank, "kv_lora_rank");
        Within(1, MostNarrow, c.QkNopeHeadDim, "qk_nope_head_dim");
        Within(2, MostNarrow, c.QkRopeHeadDim, "qk_rope_head_dim");
        Within(1, MostNarrow, c.VHeadDim, "v_head_dim");
        Within(1, MostWide, c.IntermediateSize, "intermediate_size");
        Within(0, int.MaxValue, c.FirstKDenseReplace, "first_k_dense_replace");
        Within(0, MostLayers, c.NumNextnPredictLayers, "num_nextn_predict_layers");
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
            IsPositive(c.RmsNormEps) && IsPositive(c.InitializerRange),
            "rms_norm_eps",
            $"rms_norm_eps is {c.RmsNormEps} and initializer_range is {c.InitializerRange}",
            "give positive numbers");
        Require(
            double.IsFinite(c.RoutedScalingFactor) && double.IsFinite(c.MtpLossScalingFactor)
                && double.IsFinite(c.BiasUpdateSpeed),
            "routed_scaling_factor",
            $"routed_scaling_factor is {c.RoutedScalingFactor}, the weight of multi-token losses "
                + $"{c.MtpLossScalingFactor}, the speed of the router's bias {c.BiasUpdateSpeed}",
            "give finite numbers");
        Require(
            c.SeqAuxLossAlpha >= 0 && double.IsFinite(c.SeqAuxLossAlpha),
            "seq_aux_loss_alpha",
            $"the weight of the balance loss is {c.SeqAuxLossAlpha}",
            "give 0 for none, usually 0.0001");
        if (c.RopeScaling is { } yarn)
        {
            Require(
                yarn.Factor >= 1 && double.IsFinite(yarn.Factor) && yarn.OriginalMaxPositionEmbeddings >= 1,
                "rope_scaling",
                $"factor is {yarn.Factor} and original_max_position_embeddings is {yarn.OriginalMaxPositionEmbeddings}",
                "give 1 or more for both");
            Require(
                IsPositive(yarn.BetaFast) && IsPositive(yarn.BetaSlow) && yarn.BetaSlow <= yarn.BetaFast,
                "rope_scaling",
                $"beta_slow is {yarn.BetaSlow}, beta_fast is {yarn.BetaFast}",
                "give positive numbers, the slow one no larger; usually 1 and 32");
            Require(
                yarn.Mscale >= 0 && double.IsFinite(yarn.Mscale)
                    && yarn.MscaleAllDim >= 0 && double.IsFinite(yarn.MscaleAllDim),
                "rope_scaling",
                $"mscale is {yarn.Mscale} and mscale_all_dim is {yarn.MscaleAllDim}",
                "give 0 or more for both; usually 1");
        }

        if (c.FirstKDenseReplace < c.NumHiddenLayers || c.NumNextnPredictLayers > 0)
        {
            Within(1, MostWide, c.MoeIntermediateSize, "moe_intermediate_size");
            Within(0, MostLayers, c.NSharedExperts, "n_shared_experts");
            CheckRouter(c, Within, Require);
        }

        return found;
    }

    private static bool IsPositive(double value) => value > 0 && double.IsFinite(value);

    private static void CheckRouter(
        DeepSeekV3Config c, Action<int, int, int, string> within, Action<bool, string, string, string> require)
    {
        within(1, MostNarrow, c.NRoutedExperts, "n_routed_experts");
        within(1, MostNarrow, c.NGroup, "n_group");
        within(1, MostNarrow, c.TopkGroup, "topk_group");
        within(1, MostNarrow, c.NumExpertsPerTok, "num_experts_per_tok");
        require(
            Enum.IsDefined(c.ScoringFunc) && Enum.IsDefined(c.TopkMethod),
            "topk_method",
            $"scoring_func is {c.ScoringFunc}, topk_method is {c.TopkMethod}",
            "choose from those that are named");
        if (c.NRoutedExperts is < 1 or > MostNarrow || c.NGroup is < 1 or > MostNarrow)
            return;
        if (c.TopkMethod == TopkMethod.Greedy)
        {
            require(
                c.NumExpertsPerTok <= c.NRoutedExperts,
                "num_experts_per_tok",
                $"num_experts_per_tok is {c.NumExpertsPerTok}, n_routed_experts is {c.NRoutedExperts}",
                $"choose num_experts_per_tok from 1 to {c.NRoutedExperts}");
            return;
        }

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

// DeepSeekMoE (arXiv 2412.19437, section 2.1.2): shared experts see every token, routed ones those that chose them.
// B batch, S seq, H hidden, E experts, F expert_ffn; rows: one for each token and each expert that it chose.

namespace DeepSeekGraph.Models;

/// Mixtures of experts.
public static class Experts
{
    /// Routed and shared experts; names the router's counts as an output, for the bias update, and adds to the balance
    /// loss where there is one. Tokens whose mask is 0, if there is one, see shared experts only.
    public static Tensor Moe(
        ModelScope m, Tensor x_BSH, DeepSeekV3Config c, BalanceTerms? balance = null, Tensor? mask_BS = null)
    {
        var (probs_BSE, mask_BSE) = m.Scope("gate", s => Route(s, x_BSH, c, balance, mask_BS));
        var routed_BSH = m.Scope("experts", s => Routed(s, x_BSH, probs_BSE, mask_BSE, c));
        return c.NSharedExperts == 0
            ? routed_BSH
            : routed_BSH + m.Scope("shared_experts", s => s.SwiGlu(x_BSH, c.NSharedExperts * c.MoeIntermediateSize));
    }

    /// The same, to be added to the residual stream: one group of experts; the hidden size is x's.
    public static Tensor Moe(ModelScope m, Tensor x_BSH, int experts, int topK, int ffn, int shared = 0)
        => Moe(m, x_BSH, new DeepSeekV3Config
        {
            NRoutedExperts = experts,
            NumExpertsPerTok = topK,
            MoeIntermediateSize = ffn,
            NSharedExperts = shared,
            NGroup = 1,
            TopkGroup = 1,
            RoutedScalingFactor = 1,
        }).Residual();

    /// The bias, free of gradients, decides who is chosen and never how much it counts; DeepSeek-V2 has none. A token whose
    /// mask is 0 goes to no expert and is not counted.
    /// The router's weights call the axis "router": every rank scores all experts, whoever holds them.
    private static (Tensor Probs, Tensor Mask) Route(
        ModelScope m, Tensor x_BSH, DeepSeekV3Config c, BalanceTerms? balance, Tensor? mask_BS)
    {
        var weight_EH = m.Parameter(
            "weight", m.Normal(), Update.NewAdamW(decay: true), keepFloat32: true,
            ("router", c.NRoutedExperts), ("hidden", x_BSH.Extent("hidden")));
        var biased = c.TopkMethod == TopkMethod.NoauxTc;
        var bias_E = biased
            ? m.Parameter(
                "e_score_correction_bias", Init.Zeros, Update.NewRouterBias(c.BiasUpdateSpeed), keepFloat32: true,
                ("router", c.NRoutedExperts)).Rename("router", "experts")
            : m.Constant(0, ("experts", c.NRoutedExperts));

        var logits_BSE = x_BSH.Cast(DType.Float32).MatMul(weight_EH).Rename("router", "experts");
        var scores_BSE = c.ScoringFunc == ScoringFunc.Softmax ? logits_BSE.Softmax("experts") : logits_BSE.Sigmoid();
        var best_BSE = (scores_BSE + bias_E).Apply(Op.NewGroupTopK(c.TopK));
        var chosen_BSE = mask_BS is null
            ? best_BSE
            : (best_BSE.Cast(DType.Float32) * mask_BS).Cast(DType.Bool);
        if (biased)
            m.Output($"count:{m.Path}.e_score_correction_bias", chosen_BSE.Cast(DType.Int64).Sum("batch", "seq"));

        balance?.Add(m, scores_BSE, c.NumExpertsPerTok);

        var probs_BSE = scores_BSE * best_BSE.Cast(DType.Float32);
        if (c.NormalizesWeights)
            probs_BSE /= probs_BSE.Sum("experts") + 1e-20;

        return (probs_BSE * c.WeightFactor, chosen_BSE);
    }

    /// Each expert's SwiGLU on the rows of its tokens; the probability is applied inside, so combining is a plain sum.
    private static Tensor Routed(ModelScope m, Tensor x_BSH, Tensor probs_BSE, Tensor mask_BSE, DeepSeekV3Config c)
    {
        (string, int) experts = ("experts", c.NRoutedExperts);
        (string, int) ffn = ("expert_ffn", c.MoeIntermediateSize);
        (string, int) hidden = ("hidden", x_BSH.Extent("hidden"));
        var gateUp_E2FH = m.Weight("gate_up_proj.weight", m.Normal(), experts, ("gate_up", 2), ffn, hidden);
        var down_EHF = m.Weight("down_proj.weight", m.Normal(), experts, hidden, ffn);

        var route = mask_BSE.Apply(Op.NewRoute(c.NumExpertsPerTok, c.NRoutedExperts));
        var rows_BSEH = x_BSH.Apply(Op.NewPermute(fused: false), route);
        var p_BSE = probs_BSE.Apply(Op.RouteProbs, route);
        var h_BSE2F = rows_BSEH.Apply(Op.NewGroupedMatMul(transposed: false), gateUp_E2FH, route);
        var a_BSEF = h_BSE2F.Apply(Op.SwiGluProbs, p_BSE);
        var y_BSEH = a_BSEF.Apply(Op.NewGroupedMatMul(transposed: false), down_EHF, route);
        return y_BSEH.Apply(Op.NewUnpermute(fused: false), route);
    }
}

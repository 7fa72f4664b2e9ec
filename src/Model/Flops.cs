// Floating-point operations of a training step, counted as Megatron counts them, so that throughputs compare.

namespace DeepSeekGraph.Models;

/// Model FLOPs: multiply and add, forward and twice that backward; causal attention halved; no recomputation.
public static class Flops
{
    /// For each token at a sequence length. The router, norms and rotation are left out.
    public static double PerToken(DeepSeekV3Config c, int seqLength) => Parts(c, seqLength).Sum(part => part.Flops);

    /// The same part by part: whole numbers below 2^53 for any legal model, so that sums are exact.
    public static IReadOnlyList<(string Part, double Flops)> Parts(DeepSeekV3Config c, int seqLength)
    {
        double hidden = c.HiddenSize;
        double heads = c.NumAttentionHeads;
        var depths = c.NumNextnPredictLayers;
        var layers = c.NumHiddenLayers + depths;
        var dense = Math.Min(c.FirstKDenseReplace, c.NumHiddenLayers);
        var sparse = layers - dense;

        double Expert(int width) => 3 * hidden * width;
        var queries = c.QLoraRank == 0
            ? hidden * heads * c.QkHeadDim
            : c.QLoraRank * (hidden + (heads * c.QkHeadDim));
        var projections = queries
            + (c.KvLoraRank * (hidden + (heads * (c.QkNopeHeadDim + c.VHeadDim))))
            + (hidden * c.QkRopeHeadDim)
            + (heads * c.VHeadDim * hidden);

        // the formula gives each latent, and each norm before a multi-token projection, one product a feature
        var norms = (layers * ((double)c.QLoraRank + c.KvLoraRank)) + (depths * 3 * hidden);
        return
        [
            (FlopsParts.Dense, 6 * dense * Expert(c.IntermediateSize)),
            (FlopsParts.Routed, 6 * sparse * (double)c.NumExpertsPerTok * Expert(c.MoeIntermediateSize)),
            (FlopsParts.Shared, 6 * sparse * (double)c.NSharedExperts * Expert(c.MoeIntermediateSize)),
            (FlopsParts.Projections, 6 * layers * projections),
            (FlopsParts.Core, 6 * layers * (seqLength * heads * (c.QkHeadDim + c.VHeadDim) / 2)),
            (FlopsParts.MultiToken, 6 * depths * 2 * hidden * hidden),
            (FlopsParts.Logits, 6 * hidden * c.VocabSize * (depths + 1)),
            (FlopsParts.Norms, 6 * norms),
        ];
    }

    /// For a step of `globalBatch` sequences.
    public static double PerStep(DeepSeekV3Config c, int globalBatch, int seqLength)
        => PerToken(c, seqLength) * seqLength * globalBatch;
}

/// Parts of a model that FLOPs are counted for, by formula or from a plan.
public static class FlopsParts
{
    public const string Dense = "dense feed-forward";
    public const string Routed = "routed experts";
    public const string Shared = "shared experts";
    public const string Projections = "attention projections";
    public const string Core = "attention core";
    public const string MultiToken = "multi-token projection";
    public const string Logits = "logits";
    public const string Norms = "norms";
    public const string Router = "router";
    public const string Balance = "balance loss";
    public const string Rotation = "rotation";
    public const string Activations = "activations";
    public const string Loss = "loss";
    public const string Additions = "additions and casts";
    public const string Optimizer = "optimizer";
    public const string Other = "other products";
}

// Floating-point operations of a training step, counted as Megatron counts them, so that throughputs compare.

namespace DeepSeekGraph.Models;

/// Model FLOPs: multiply and add, forward and twice that backward; causal attention halved; no recomputation.
public static class Flops
{
    /// For each token at a sequence length. The router, norms and rotation are left out.
    public static double PerToken(DeepSeekV3Config c, int seqLength)
    {
        double hidden = c.HiddenSize;
        double heads = c.NumAttentionHeads;
        var depths = c.NumNextnPredictLayers;
        var layers = c.NumHiddenLayers + depths;
        var dense = Math.Min(c.FirstKDenseReplace, c.NumHiddenLayers);
        var sparse = layers - dense;

        var experts = (c.NumExpertsPerTok + c.NSharedExperts) * (double)c.MoeIntermediateSize;
        var feedForward = 3 * hidden * ((dense * (double)c.IntermediateSize) + (sparse * experts));

        var queries = c.QLoraRank == 0
            ? hidden * heads * c.QkHeadDim
            : c.QLoraRank * (hidden + (heads * c.QkHeadDim) + 1);
        var attention = queries
            + (c.KvLoraRank * (hidden + (heads * (c.QkNopeHeadDim + c.VHeadDim)) + 1))
            + (hidden * c.QkRopeHeadDim)
            + (heads * c.VHeadDim * hidden)
            + (seqLength * heads * (c.QkHeadDim + c.VHeadDim) / 2);

        var multiToken = depths * ((3 * hidden) + (2 * hidden * hidden));
        var logits = hidden * c.VocabSize * (depths + 1);
        return 6 * (feedForward + (layers * attention) + multiToken + logits);
    }

    /// For a step of `globalBatch` sequences.
    public static double PerStep(DeepSeekV3Config c, int globalBatch, int seqLength)
        => PerToken(c, seqLength) * seqLength * globalBatch;
}

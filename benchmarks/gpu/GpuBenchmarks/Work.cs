// The floating-point operations that all programs are measured by, in the peers' convention.
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Benchmarks;

internal static class Work
{
    /// <summary>Forward and backward of one sequence: 6 x active parameters a token, attention causal (halved), 3 x forward.</summary>
    public static double FlopsOf(DeepSeekV3Config c, long seq)
    {
        double h = c.HiddenSize, heads = c.NumAttentionHeads, q = c.QLoraRank, kv = c.KvLoraRank;
        double nope = c.QkNopeHeadDim, rope = c.QkRopeHeadDim, v = c.VHeadDim, layers = c.NumHiddenLayers;
        double attention = (h * q) + (q * heads * (nope + rope)) + (h * (kv + rope)) + (kv * heads * (nope + v)) + (heads * v * h);
        double moe = layers - c.FirstKDenseReplace, ffn = c.MoeIntermediateSize;
        var active = (layers * attention) + (moe * (((c.NumExpertsPerTok + c.NSharedExperts) * 3 * h * ffn) + (h * c.NRoutedExperts)))
            + (c.FirstKDenseReplace * 3 * h * c.IntermediateSize) + (h * c.VocabSize);
        return (6 * active * seq) + (layers * 3 * 2 * heads * (nope + rope + v) * seq * seq / 2);
    }
}

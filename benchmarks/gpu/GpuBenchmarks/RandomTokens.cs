// Token ids drawn at random, the same for every program that is compared.
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Benchmarks;

/// <summary>
/// Id i of batch b is a hash of b * 2^32 + i, modulo the vocabulary; peer.py draws the same. The last position has no next token
/// in a peer that reads as many ids as it has positions, so it does not count here either.
/// </summary>
internal sealed class RandomTokens(int vocabulary, PlanSet plan, bool same) : IBatchSource
{
    public TrainingBatch Get(long step)
    {
        int rows = plan.Microbatches * plan.MicroBatch, columns = plan.Inputs.Single(i => i.Name == "tokens").Extents[1];
        var tokens = new long[rows * columns];
        var batch = same ? 0 : (ulong)step;
        for (var i = 0; i < tokens.Length; i++)
            tokens[i] = (long)(Mix((batch << 32) + (ulong)i) % (ulong)vocabulary);
        var mask = new float[rows * plan.SeqLength];
        Array.Fill(mask, 1f);
        for (var row = 0; row < rows; row++)
            mask[((row + 1) * plan.SeqLength) - 1] = 0;
        return new TrainingBatch(rows, columns, tokens, mask);
    }

    /// <summary>The finaliser of SplitMix64 (Steele, Lea and Flood 2014).</summary>
    private static ulong Mix(ulong z)
    {
        z += 0x9E3779B97F4A7C15UL;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9UL;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBUL;
        return z ^ (z >> 31);
    }
}

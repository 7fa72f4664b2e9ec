// Choice of experts: group-limited top-k, and the rows it yields.
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class RouterKernels
{
    /// <summary>scores[b s e] fp32 -> mask[b s e]; the rule of DeepSeek-V3 (arXiv 2412.19437, 2.1.2); ties: lowest index.</summary>
    public static void GroupTopK(in KernelCall call)
    {
        var scores = call.In(0);
        var experts = (int)scores.shape[^1];
        int topK = call.Int(0), groups = Math.Max(1, call.Int(1)), keep = call.Int(2);
        var zeroMasked = call.Int(3) != 0;
        var size = experts / groups;
        using var wide = Operand.Float(scores);
        var mask = call.Out().Fill();
        mask.zero_().On(mask);
        var chosen = (byte*)mask.Pointer();
        Span<float> groupScores = stackalloc float[groups];
        Span<int> keptGroups = stackalloc int[Math.Min(keep, groups)];
        Span<int> best = stackalloc int[Math.Min(topK, experts)];
        Span<float> row = new float[experts];
        var tokens = experts == 0 ? 0 : scores.numel() / experts;
        for (long t = 0; t < tokens; t++)
        {
            new ReadOnlySpan<float>(wide.Floats + (t * experts), experts).CopyTo(row);
            if (keptGroups.Length < groups)
            {
                for (var g = 0; g < groups; g++)
                    groupScores[g] = BestTwo(row.Slice(g * size, size));
                Top(groupScores, keptGroups);
                for (var g = 0; g < groups; g++)
                {
                    if (!keptGroups.Contains(g))
                        row.Slice(g * size, size).Fill(zeroMasked ? 0 : float.NegativeInfinity);
                }
            }

            Top(row, best);
            foreach (var e in best)
                chosen[(t * experts) + e] = 1;
        }
    }

    /// <summary>mask[b s e] -> route: rows ordered by expert, then by token.</summary>
    public static void Route(in KernelCall call)
    {
        var mask = call.In(0);
        var experts = (int)mask.shape[^1];
        var tokens = (int)(mask.numel() / experts);
        call.Out().Adopt(RowSet.FromMask(new ReadOnlySpan<byte>(mask.Pointer(), tokens * experts), tokens, experts));
    }

    /// <summary>The indices of the largest values, best first; the lower index wins a tie, and a NaN is the least.</summary>
    private static void Top(ReadOnlySpan<float> values, Span<int> best)
    {
        var found = 0;
        for (var i = 0; i < values.Length; i++)
        {
            var value = values[i];
            if (found == best.Length && !Above(value, values[best[^1]]))
                continue;
            var at = found < best.Length ? found++ : found - 1;
            while (at > 0 && Above(value, values[best[at - 1]]))
            {
                best[at] = best[at - 1];
                at--;
            }

            best[at] = i;
        }
    }

    private static bool Above(float a, float b) => a > b || (float.IsNaN(b) && !float.IsNaN(a));

    private static float BestTwo(ReadOnlySpan<float> values)
    {
        float first = float.NegativeInfinity, second = float.NegativeInfinity;
        foreach (var value in values)
        {
            if (value > first)
                (first, second) = (value, first);
            else if (value > second)
                second = value;
        }

        return values.Length == 1 ? first : first + second;
    }
}

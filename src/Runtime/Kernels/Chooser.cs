// One token's choice of experts, over buffers that serve all tokens of a launch.
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>Group-limited top-k (arXiv 2412.19437, 2.1.2); ties: lowest index.</summary>
internal readonly unsafe ref struct Chooser
{
    private readonly int _experts;
    private readonly bool _zeroMasked;
    private readonly float[] _groupScores;
    private readonly int[] _keptGroups;
    private readonly int[] _best;

    /// <summary>Attributes 0 to 3 of the launch: topK, groups, keepGroups, zeroMasked.</summary>
    public Chooser(in KernelCall call, int experts)
        : this(experts, call.Int(0), Math.Max(1, call.Int(1)), call.Int(2), call.Int(3) != 0)
    {
    }

    public Chooser(int experts, int topK, int groups, int keep, bool zeroMasked)
    {
        _experts = experts;
        _zeroMasked = zeroMasked;
        _groupScores = new float[groups];
        _keptGroups = new int[Math.Min(keep, groups)];
        _best = new int[Math.Min(topK, experts)];
        Row = (float*)NativeMemory.Alloc((nuint)Math.Max(1, experts), sizeof(float));
    }

    /// <summary>Scores of the token, to be filled before each choice; the choice overwrites groups that it loses.</summary>
    public float* Row { get; }

    /// <summary>Fills the row with the sigmoid of logits, plus a bias where there is one.</summary>
    public void Score(float* logits, float* bias)
    {
        Simd.Sigmoid(logits, Row, _experts);
        if (bias is null)
            return;
        var i = 0;
        for (; i <= _experts - 8; i += 8)
            (Vector256.Load(Row + i) + Vector256.Load(bias + i)).Store(Row + i);
        for (; i < _experts; i++)
            Row[i] += bias[i];
    }

    /// <summary>Ones for the chosen, zeros for the others.</summary>
    public void Choose(Span<byte> mask)
    {
        var row = new Span<float>(Row, _experts);
        var size = _experts / _groupScores.Length;
        if (_keptGroups.Length < _groupScores.Length)
        {
            for (var g = 0; g < _groupScores.Length; g++)
                _groupScores[g] = BestTwo(row.Slice(g * size, size));
            Top(_groupScores, _keptGroups);
            for (var g = 0; g < _groupScores.Length; g++)
            {
                if (!_keptGroups.AsSpan().Contains(g))
                    row.Slice(g * size, size).Fill(_zeroMasked ? 0 : float.NegativeInfinity);
            }
        }

        Top(row, _best);
        mask.Clear();
        foreach (var e in _best)
            mask[e] = 1;
    }

    public void Dispose() => NativeMemory.Free(Row);

    /// <summary>The indices of the largest values, best first; the lower index wins a tie, and a NaN is the least.</summary>
    private static void Top(ReadOnlySpan<float> values, Span<int> best)
    {
        var found = 0;
        for (var i = 0; i < values.Length; i++)
        {
            if (found == best.Length)
            {
                i = NextAbove(values, i, values[best[^1]]);
                if (i == values.Length)
                    return;
            }

            var value = values[i];
            var at = found < best.Length ? found++ : found - 1;
            while (at > 0 && Above(value, values[best[at - 1]]))
            {
                best[at] = best[at - 1];
                at--;
            }

            best[at] = i;
        }
    }

    /// <summary>The first index from `from` on whose value is above the threshold; eight at a time, since few are.</summary>
    private static int NextAbove(ReadOnlySpan<float> values, int from, float threshold)
    {
        var i = from;
        if (!float.IsNaN(threshold))
        {
            var limit = Vector256.Create(threshold);
            while (i <= values.Length - 8 && !Vector256.GreaterThanAny(Vector256.Create(values.Slice(i, 8)), limit))
                i += 8;
        }

        while (i < values.Length && !Above(values[i], threshold))
            i++;
        return i;
    }

    private static bool Above(float a, float b) => a > b || (float.IsNaN(b) && !float.IsNaN(a));

    /// <summary>The sum of the two largest values, or the only one.</summary>
    private static float BestTwo(ReadOnlySpan<float> values)
    {
        float first = float.NegativeInfinity, second = float.NegativeInfinity;
        var i = 0;
        if (values.Length >= 16)
        {
            // each lane keeps its two largest
            Vector256<float> firsts = Vector256.Create(first), seconds = firsts;
            for (; i <= values.Length - 8; i += 8)
            {
                var value = Vector256.Create(values.Slice(i, 8));
                var isFirst = Vector256.GreaterThan(value, firsts);
                var lesser = Vector256.ConditionalSelect(isFirst, firsts, value);
                firsts = Vector256.ConditionalSelect(isFirst, value, firsts);
                seconds = Vector256.ConditionalSelect(Vector256.GreaterThan(lesser, seconds), lesser, seconds);
            }

            for (var lane = 0; lane < 8; lane++)
            {
                Keep(firsts[lane], ref first, ref second);
                Keep(seconds[lane], ref first, ref second);
            }
        }

        for (; i < values.Length; i++)
            Keep(values[i], ref first, ref second);
        return values.Length == 1 ? first : first + second;
    }

    private static void Keep(float value, ref float first, ref float second)
    {
        if (value > first)
            (first, second) = (value, first);
        else if (value > second)
            second = value;
    }
}

// One token's choice of experts, over buffers that serve all tokens of a launch.
using System.Numerics;
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>Group-limited top-k (arXiv 2412.19437, 2.1.2; 2405.04434, 2.2.2); ties: lowest index, and a NaN is the least.</summary>
internal readonly unsafe ref struct Chooser
{
    private readonly int _experts;
    private readonly int _size;
    private readonly int _lost;
    private readonly bool _byBest;
    private readonly int[] _groups;
    private readonly int[] _best;
    private readonly int* _keys;
    private readonly int* _keptKeys;
    private readonly int* _groupKeys;
    private readonly int _groupCount;

    /// <summary>Attributes 0 to 4 of the launch: topK, groups, keepGroups, zeroMasked, best.</summary>
    public Chooser(in KernelCall call, int experts)
        : this(experts, call.Int(0), Math.Max(1, call.Int(1)), call.Int(2), call.Int(3) != 0, call.Int(4) != 0)
    {
    }

    /// <summary>`byBest`: a group scores its best expert, else the sum of its two best.</summary>
    public Chooser(int experts, int topK, int groups, int keep, bool zeroMasked, bool byBest)
    {
        _byBest = byBest;
        _experts = experts;
        _size = experts / groups;
        _groupCount = groups;
        _lost = Selection.Key(zeroMasked ? 0 : float.NegativeInfinity);
        _groups = new int[Math.Min(keep, groups)];
        _best = new int[Math.Min(topK, experts)];

        // in whole vectors: what is beyond the experts is NaN, and never chosen
        var (width, groupWidth) = (Selection.Padded(experts), Selection.Padded(groups));
        Row = (float*)NativeMemory.Alloc((nuint)((4 * width) + groupWidth), sizeof(float));
        Scores = Row + width;
        _keys = (int*)(Scores + width);
        _keptKeys = _keys + width;
        _groupKeys = _keptKeys + width;
        new Span<float>(Row, width).Fill(float.NaN);
        new Span<int>(_groupKeys, groupWidth).Fill(int.MinValue);
    }

    /// <summary>What is chosen by, to be filled before each choice.</summary>
    public float* Row { get; }

    /// <summary>Scores without bias, where Score filled the row.</summary>
    public float* Scores { get; }

    /// <summary>The chosen experts, in ascending order.</summary>
    public ReadOnlySpan<int> Best => _best;

    /// <summary>Fills the row with the sigmoid of logits, or their softmax, plus a bias where there is one.</summary>
    public void Score(float* logits, float* bias, bool softmax = false)
    {
        if (softmax)
            Simd.Softmax(logits, Scores, _experts);
        else
            Simd.Sigmoid(logits, Scores, _experts);
        var i = 0;
        if (bias is null)
            new ReadOnlySpan<float>(Scores, _experts).CopyTo(new Span<float>(Row, _experts));
        else
        {
            for (; i <= _experts - 8; i += 8)
                (Vector256.Load(Scores + i) + Vector256.Load(bias + i)).Store(Row + i);
            for (; i < _experts; i++)
                Row[i] = Scores[i] + bias[i];
        }
    }

    /// <summary>Ones for the chosen, zeros for the others.</summary>
    public void Choose(Span<byte> mask)
    {
        var width = Selection.Padded(_experts);
        Selection.Keys(Row, _keys, width);
        if (_groups.Length == _groupCount)
            Selection.Top(_keys, width, _best);
        else
        {
            for (var g = 0; g < _groupCount; g++)
                _groupKeys[g] = Selection.Key(_byBest ? Selection.Best(Row + (g * _size), _size) : Selection.BestTwo(Row + (g * _size), _size));
            Selection.Top(_groupKeys, Selection.Padded(_groupCount), _groups);
            if (!ChooseAmongKept())
            {
                for (var g = 0; g < _groupCount; g++)
                {
                    if (!_groups.AsSpan().Contains(g))
                        new Span<int>(_keys + (g * _size), _size).Fill(_lost);
                }

                Selection.Top(_keys, width, _best);
            }
        }

        mask.Clear();
        foreach (var e in _best)
            mask[e] = 1;
    }

    public void Dispose() => NativeMemory.Free(Row);

    /// <summary>The choice where all chosen score above what lost groups score, so that only kept groups need be looked at.</summary>
    private bool ChooseAmongKept()
    {
        var count = _groups.Length * _size;
        if (count < _best.Length || _groupCount * _size != _experts)
            return false;
        for (var i = 0; i < _groups.Length; i++)
            new ReadOnlySpan<int>(_keys + (_groups[i] * _size), _size).CopyTo(new Span<int>(_keptKeys + (i * _size), _size));
        var width = Selection.Padded(count);
        new Span<int>(_keptKeys + count, width - count).Fill(int.MinValue);
        if (Selection.Top(_keptKeys, width, _best) <= _lost)
            return false;

        // positions among the kept become experts; both ascend
        foreach (ref var at in _best.AsSpan())
        {
            var (group, place) = Math.DivRem(at, _size);
            at = (_groups[group] * _size) + place;
        }

        return true;
    }
}

/// <summary>The largest of some scores, as keys: integers in the order of the scores.</summary>
internal static unsafe class Selection
{
    /// <summary>The next multiple of a vector's width.</summary>
    public static int Padded(int n) => (n + 7) & ~7;

    /// <summary>An integer that orders as the score does: zeros of both signs are equal, and NaN is the least.</summary>
    public static int Key(float score) => Key(Vector256.Create(score))[0];

    /// <summary>Keys of n scores, whole vectors.</summary>
    public static void Keys(float* scores, int* keys, int n)
    {
        for (var i = 0; i < n; i += 8)
            Key(Vector256.Load(scores + i)).Store(keys + i);
    }

    /// <summary>Positions of the largest of n keys, ascending; the lower position wins a tie. Gives the least key among them.</summary>
    public static int Top(int* keys, int n, Span<int> best)
    {
        if (best.IsEmpty)
            return int.MaxValue;
        var least = Threshold(keys, n, best.Length, out var above);
        var (found, ties) = (0, best.Length - above);
        var limit = Vector256.Create(least);
        for (var i = 0; i < n && found < best.Length; i += 8)
        {
            var bits = Vector256.GreaterThanOrEqual(Vector256.Load(keys + i), limit).ExtractMostSignificantBits();
            for (; bits != 0; bits &= bits - 1)
            {
                var at = i + BitOperations.TrailingZeroCount(bits);
                if (keys[at] > least || ties-- > 0)
                    best[found++] = at;
            }
        }

        return least;
    }

    /// <summary>The largest score; NaN counts as none.</summary>
    public static float Best(float* scores, int n)
    {
        var best = float.NegativeInfinity;
        for (var i = 0; i < n; i++)
        {
            if (scores[i] > best)
                best = scores[i];
        }

        return best;
    }

    /// <summary>The sum of the two largest scores, or the only one; NaN counts as none.</summary>
    public static float BestTwo(float* scores, int n)
    {
        float first = float.NegativeInfinity, second = float.NegativeInfinity;
        var i = 0;
        if (n >= 8)
        {
            // each lane keeps its two largest
            var none = Vector256.Create(float.NegativeInfinity);
            Vector256<float> firsts = none, seconds = none;
            for (; i <= n - 8; i += 8)
            {
                var score = Vector256.Load(scores + i);
                score = Vector256.ConditionalSelect(Vector256.Equals(score, score), score, none);
                seconds = Vector256.MaxNative(seconds, Vector256.MinNative(firsts, score));
                firsts = Vector256.MaxNative(firsts, score);
            }

            var (a, b) = Join(firsts.GetLower(), seconds.GetLower(), firsts.GetUpper(), seconds.GetUpper());
            var far = Vector128.Create(2, 3, 0, 1);
            (a, b) = Join(a, b, Vector128.Shuffle(a, far), Vector128.Shuffle(b, far));
            var near = Vector128.Create(1, 0, 3, 2);
            (a, b) = Join(a, b, Vector128.Shuffle(a, near), Vector128.Shuffle(b, near));
            (first, second) = (a[0], b[0]);
        }

        for (; i < n; i++)
        {
            if (scores[i] > first)
                (first, second) = (scores[i], first);
            else if (scores[i] > second)
                second = scores[i];
        }

        return n == 1 ? first : first + second;
    }

    /// <summary>The two largest of two pairs, the larger first.</summary>
    private static (Vector128<float> First, Vector128<float> Second) Join(
        Vector128<float> a, Vector128<float> b, Vector128<float> c, Vector128<float> d)
        => (Vector128.MaxNative(a, c), Vector128.MaxNative(Vector128.MinNative(a, c), Vector128.MaxNative(b, d)));

    private static Vector256<int> Key(Vector256<float> scores)
    {
        // adding zero makes -0 a 0
        var bits = (scores + Vector256<float>.Zero).AsInt32();
        var key = bits ^ ((bits >> 31) & Vector256.Create(int.MaxValue));
        return Vector256.ConditionalSelect(Vector256.Equals(scores, scores).AsInt32(), key, Vector256.Create(int.MinValue));
    }

    /// <summary>The k-th largest key, and how many are above it.</summary>
    private static int Threshold(int* keys, int n, int k, out int above)
    {
        // the k-th largest of different keys; where keys above it are equal, it lies too low
        var least = LargestBelow(keys, n, int.MaxValue);
        for (var i = 1; i < k && least > int.MinValue; i++)
            least = LargestBelow(keys, n, least);
        above = CountAbove(keys, n, least);
        if (above < k)
            return least;
        least = LargestBelow(keys, n, int.MaxValue);
        above = 0;
        for (var up = CountAbove(keys, n, least - 1); up < k; up = CountAbove(keys, n, least - 1))
        {
            above = up;
            least = LargestBelow(keys, n, least);
        }

        return least;
    }

    /// <summary>The largest key below a limit, which no score's key reaches at first; int.MinValue when there is none.</summary>
    private static int LargestBelow(int* keys, int n, int limit)
    {
        Vector256<int> limits = Vector256.Create(limit), none = Vector256.Create(int.MinValue), largest = none;
        for (var i = 0; i < n; i += 8)
        {
            var key = Vector256.Load(keys + i);
            largest = Vector256.Max(largest, Vector256.ConditionalSelect(Vector256.LessThan(key, limits), key, none));
        }

        var half = Vector128.Max(largest.GetLower(), largest.GetUpper());
        half = Vector128.Max(half, Vector128.Shuffle(half, Vector128.Create(2, 3, 0, 1)));
        return Math.Max(half[0], half[1]);
    }

    private static int CountAbove(int* keys, int n, int limit)
    {
        var limits = Vector256.Create(limit);
        var counts = Vector256<int>.Zero;
        for (var i = 0; i < n; i += 8)
            counts -= Vector256.GreaterThan(Vector256.Load(keys + i), limits);
        return Vector256.Sum(counts);
    }
}

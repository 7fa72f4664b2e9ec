// Choice of experts: group-limited top-k, the router in one pass, its balance, and the rows it yields.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using TorchSharp;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class RouterKernels
{
    /// <summary>scores[b s e] fp32 -> mask[b s e]; the rules of Chooser.</summary>
    public static void GroupTopK(in KernelCall call)
    {
        var scores = call.In(0);
        var experts = (int)scores.shape[^1];
        using var wide = Operand.Float(scores);
        using var chooser = new Chooser(call, experts);
        var mask = call.Out().Fill();
        var tokens = experts == 0 ? 0 : scores.numel() / experts;
        for (long t = 0; t < tokens; t++)
        {
            new ReadOnlySpan<float>(wide.Floats + (t * experts), experts).CopyTo(new Span<float>(chooser.Row, experts));
            chooser.Choose(new Span<byte>((byte*)mask.Pointer() + (t * experts), experts));
        }
    }

    /// <summary>mask[b s e] -> route: rows ordered by expert, then by token.</summary>
    public static void Route(in KernelCall call)
    {
        var mask = call.In(0);
        var experts = (int)mask.shape[^1];
        var tokens = (int)(mask.numel() / experts);
        call.Out().Adopt(RowSet.FromMask(
            new ReadOnlySpan<byte>(mask.Pointer(), tokens * experts), tokens, experts, call.Out().Info.Padding));
    }

    /// <summary>logits[b s e], bias[e] -> p[b s e], mask[b s e], counts[e]: one pass over the tokens.</summary>
    public static void Router(in KernelCall call)
    {
        var experts = (int)call.In(0).shape[^1];
        using var logits = Operand.Float(call.In(0));
        using var bias = Operand.Float(call.In(1));
        using var probs = new Result(call.Out(0), torch.ScalarType.Float32);
        using var chooser = new Chooser(call, experts);
        var mask = (byte*)call.Out(1).Fill().Pointer();
        var count = Counts(call, experts);
        var weights = new Weights(call);
        for (long at = 0; at < probs.Count; at += experts)
        {
            chooser.Score(logits.Floats + at, bias.Floats, weights.Softmax);
            chooser.Choose(new Span<byte>(mask + at, experts));
            var p = new Span<float>(probs.Floats + at, experts);
            p.Clear();
            foreach (var e in chooser.Best)
            {
                count[e]++;
                p[e] = chooser.Scores[e];
            }

            weights.Of(chooser.Best, p);
        }
    }

    /// <summary>The results of Router that follow from its mask: p and counts.</summary>
    public static void Weigh(in KernelCall call)
    {
        var experts = (int)call.In(0).shape[^1];
        using var logits = Operand.Float(call.In(0));
        using var probs = new Result(call.Out(0), torch.ScalarType.Float32);
        var mask = (byte*)call.Out(1).Tensor.Pointer();
        var count = Counts(call, experts);
        var weights = new Weights(call);
        var chosen = new int[experts];
        var scores = stackalloc float[weights.Softmax ? experts : 0];
        for (long at = 0; at < probs.Count; at += experts)
        {
            var p = new Span<float>(probs.Floats + at, experts);
            p.Clear();
            if (weights.Softmax)
                Simd.Softmax(logits.Floats + at, scores, experts);
            var found = 0;
            foreach (var e in new Chosen(mask + at, experts))
            {
                count[e]++;
                p[e] = weights.Softmax ? scores[e] : Score(logits.Floats[at + e]);
                chosen[found++] = e;
            }

            weights.Of(chosen.AsSpan(0, found), p);
        }
    }

    private static long* Counts(in KernelCall call, int experts)
    {
        var count = (long*)call.Out(2).Fill().Pointer();
        new Span<long>(count, experts).Clear();
        return count;
    }

    /// <summary>Attributes 5 to 8 of a router: how scores of the chosen become weights, and logits scores.</summary>
    private readonly struct Weights(in KernelCall call)
    {
        private readonly bool _normalize = call.Int(5) != 0;
        private readonly float _eps = (float)call.Float(6);
        private readonly float _factor = (float)call.Float(7);

        public bool Softmax { get; } = call.Int(8) != 0;

        /// <summary>Turns the scores of the chosen, which ascend, into their weights.</summary>
        public void Of(ReadOnlySpan<int> chosen, Span<float> p)
        {
            var total = 0f;
            foreach (var e in chosen)
                total += p[e];
            foreach (var e in chosen)
                p[e] = _normalize ? p[e] / (total + _eps) * _factor : p[e] * _factor;
        }
    }

    /// <summary>dp[b s e], logits, mask -> dlogits: only scores of chosen experts have a gradient.</summary>
    public static void RouterGrad(in KernelCall call)
    {
        var experts = (int)call.In(1).shape[^1];
        var (normalize, softmax) = (call.Int(5) != 0, call.Int(8) != 0);
        float eps = (float)call.Float(6), factor = (float)call.Float(7);
        var scores = stackalloc float[softmax ? experts : 0];
        using var dp = Operand.Float(call.In(0));
        using var logits = Operand.Float(call.In(1));
        var mask = (byte*)call.In(2).Pointer();
        using var dx = new Result(call.Out(), torch.ScalarType.Float32);
        for (long at = 0; at < dx.Count; at += experts)
        {
            new Span<float>(dx.Floats + at, experts).Clear();
            if (softmax)
                Simd.Softmax(logits.Floats + at, scores, experts);
            float total = 0, dot = 0;
            foreach (var e in new Chosen(mask + at, experts))
            {
                var score = softmax ? scores[e] : Score(logits.Floats[at + e]);
                total += score;
                dot += dp.Floats[at + e] * score;
                dx.Floats[at + e] = score;
            }

            var whole = normalize ? total + eps : 1;
            var shared = normalize ? dot / whole : 0;
            var drawn = 0f;
            foreach (var e in new Chosen(mask + at, experts))
            {
                var score = dx.Floats[at + e];
                var slope = factor * (dp.Floats[at + e] - shared) / whole;
                dx.Floats[at + e] = softmax ? slope : slope * score * (1 - score);
                drawn += slope * score;
            }

            // what one expert gains, all lose by their shares
            for (var e = 0; softmax && e < experts; e++)
                dx.Floats[at + e] = scores[e] * (dx.Floats[at + e] - drawn);
        }
    }

    /// <summary>logits[b s e], w[b s] -> counts[b e], shares[b e]: sums over the sequence, fp64 inside.</summary>
    public static void Balance(in KernelCall call)
    {
        var shape = call.In(0).shape;
        int batch = (int)shape[0], seq = (int)shape[1], experts = (int)shape[2];
        var eps = (float)call.Float(1);
        using var logits = Operand.Float(call.In(0));
        using var w = Operand.Float(call.In(1));
        using var counts = new Result(call.Out(0), torch.ScalarType.Float32);
        using var shares = new Result(call.Out(1), torch.ScalarType.Float32);
        using var chooser = new Chooser(experts, call.Int(0), 1, 1, false, byBest: false);
        var mask = new byte[experts];
        double[] count = new double[experts], share = new double[experts];
        for (var b = 0; b < batch; b++)
        {
            count.AsSpan().Clear();
            share.AsSpan().Clear();
            for (long t = (long)b * seq; t < (b + 1L) * seq; t++)
            {
                chooser.Score(logits.Floats + (t * experts), null);
                var part = w.Floats[t] / (Simd.Sum(chooser.Row, experts) + eps);
                for (var e = 0; e < experts; e++)
                    share[e] += part * chooser.Row[e];
                chooser.Choose(mask);
                foreach (var e in chooser.Best)
                    count[e] += w.Floats[t];
            }

            for (var e = 0; e < experts; e++)
            {
                counts.Floats[(b * experts) + e] = (float)count[e];
                shares.Floats[(b * experts) + e] = (float)share[e];
            }
        }
    }

    /// <summary>dshares[b e], logits, w -> dlogits.</summary>
    public static void BalanceGrad(in KernelCall call)
    {
        var shape = call.In(1).shape;
        int seq = (int)shape[1], experts = (int)shape[2];
        var eps = (float)call.Float(0);
        using var d = Operand.Float(call.In(0));
        using var logits = Operand.Float(call.In(1));
        using var w = Operand.Float(call.In(2));
        using var dx = new Result(call.Out(), torch.ScalarType.Float32);
        var tokens = call.In(2).numel();
        for (long t = 0; t < tokens; t++)
        {
            float* to = dx.Floats + (t * experts), mine = d.Floats + (t / seq * experts);
            Simd.Sigmoid(logits.Floats + (t * experts), to, experts);
            var total = Simd.Sum(to, experts) + eps;
            var shared = Simd.Dot<F32, F32>(to, 0, mine, 0, experts) / total;
            var part = w.Floats[t] / total;
            var i = 0;
            for (; i <= experts - 8; i += 8)
            {
                var s = Vector256.Load(to + i);
                (part * (Vector256.Load(mine + i) - Vector256.Create(shared)) * s * (Vector256<float>.One - s)).Store(to + i);
            }

            for (; i < experts; i++)
                to[i] = part * (mine[i] - shared) * to[i] * (1 - to[i]);
        }
    }

    /// <summary>As the vector form computes it, bit for bit.</summary>
    private static float Score(float logit) => Simd.Sigmoid(Vector256.Create(logit))[0];

    /// <summary>The positions of ones in a mask, in order.</summary>
    private ref struct Chosen(byte* mask, int experts)
    {
        private int _at = -1;

        public readonly int Current => _at;

        public readonly Chosen GetEnumerator() => this;

        public bool MoveNext()
        {
            var next = new ReadOnlySpan<byte>(mask + _at + 1, experts - _at - 1).IndexOf((byte)1);
            _at += next + 1;
            return next >= 0;
        }
    }
}

// What each fused kernel replaces: the launches of the unfused plan, and the fused ones, on the same operands.
using DeepSeekGraph.Runtime.Memory;
using static DeepSeekGraph.Benchmarks.Values;

namespace DeepSeekGraph.Benchmarks;

/// A fused computation and the one it replaces.
internal sealed record Case(string Name, string Size, Action<Run> Unfused, Action<Run> Fused);

internal static class Cases
{
    private const double Eps = 1e-6;

    public static IEnumerable<Case> All()
        => [.. Norm(), .. Router(), .. Balance(), .. Rope(), .. Rows(), .. Gated(), Update(), Head(1024, 512), Head(2048, 512)];

    private static IEnumerable<Case> Norm()
    {
        const int T = 1024, H = 2048;
        SlotValue x = Normal(1, 1, T, H), r = Normal(1, 1, T, H), w = Ones(H), dy = Normal(1, 1, T, H);
        yield return new(
            "add_rms_norm",
            $"{T} x {H}",
            run => run.One(KernelId.RmsNorm, run.Floats(1, T, H), [Float(Eps)], run.One(KernelId.Add, run.Floats(1, T, H), [], x, r), w),
            run => run.All(KernelId.AddRmsNorm, [run.Floats(1, T, H), run.Floats(1, T, H)], [Float(Eps)], x, r, w));
        yield return new(
            "add_rms_norm, backward",
            $"{T} x {H}",
            run => run.One(KernelId.Add, run.Floats(1, T, H), [], r, run.One(KernelId.RmsNormGradX, run.Floats(1, T, H), [Float(Eps)], dy, x, w)),
            run => run.One(KernelId.RmsNormGradXAdd, run.Floats(1, T, H), [Float(Eps)], dy, x, w, r));
    }

    /// An fp32 master against a remainder; weights, gradients and moments of bf16. 4 M numbers, in place.
    private static Case Update()
    {
        const int N = 1 << 22;
        var kept = new Run();
        SlotValue Narrow(SlotValue value) => kept.One(KernelId.Cast, kept.Slot(DType.BFloat16, N), [], value);
        Attribute[] adam = [Float(0.9), Float(0.95), Float(1e-8), Float(0.1)];
        SlotValue grad = Narrow(Normal(1, N)), m = Narrow(Normal(0.1, N)), v = Narrow(Ones(N));
        SlotValue master = Normal(0.02, N), weight = Narrow(master), remainder = kept.Slot(DType.Int16, N);
        remainder.Fill().random_(-32768, 32768);
        SlotValue scale = Ones(), lr = Values.Slot(DType.Float32, false, null), step = Ones();
        lr.Fill().fill_(1e-4);
        return new(
            "adam_w, a remainder for the fp32 master",
            $"{N}",
            run => run.All(KernelId.AdamW, [master, m, v, weight], adam, grad, scale, lr, step),
            run => run.All(KernelId.AdamW, [remainder, m, v, weight], adam, grad, scale, lr, step, weight));
    }

    private static IEnumerable<Case> Router()
    {
        const int T = 2048, E = 256;
        var axes = Ints(0, 1, 2);
        SlotValue logits = Normal(1, 1, T, E), bias = Normal(0.01, E), dp = Normal(1, 1, T, E);
        Attribute[] choice = [Int(8), Int(8), Int(4), Int(0), Int(0)];
        Attribute[] routing = [.. choice, Int(1), Float(1e-20), Float(2.5), Int(0)];
        var kept = new Run();
        SlotValue scores = kept.One(KernelId.Sigmoid, kept.Floats(1, T, E), [], logits);
        SlotValue mask = kept.Slot(DType.Bool, 1, T, E), p = kept.Floats(1, T, E);
        kept.All(KernelId.Router, [p, mask, kept.Slot(DType.Int64, E)], routing, logits, bias);
        SlotValue weights = kept.One(KernelId.Cast, kept.Floats(1, T, E), [], mask);
        SlotValue raw = kept.One(KernelId.Mul, kept.Floats(1, T, E), [axes], scores, weights);
        SlotValue floor = kept.One(KernelId.Offset, kept.Floats(1, T), [Float(1e-20)], kept.One(KernelId.Sum, kept.Floats(1, T), [Ints(2)], raw));
        SlotValue share = kept.One(KernelId.Div, kept.Floats(1, T, E), [Ints(0, 1)], raw, floor);

        yield return new(
            "router",
            $"{T} x {E}, top 8 of 4 of 8 groups",
            run =>
            {
                var s = run.One(KernelId.Sigmoid, run.Floats(1, T, E), [], logits);
                var biased = run.One(KernelId.Add, run.Floats(1, T, E), [Ints(2)], s, bias);
                var m = run.One(KernelId.GroupTopK, run.Slot(DType.Bool, 1, T, E), choice, biased);
                biased.Dispose();
                var counted = run.One(KernelId.Cast, run.Slot(DType.Int64, 1, T, E), [], m);
                run.One(KernelId.Sum, run.Slot(DType.Int64, E), [Ints(0, 1)], counted);
                counted.Dispose();
                var chosen = run.One(KernelId.Cast, run.Floats(1, T, E), [], m);
                var product = run.One(KernelId.Mul, run.Floats(1, T, E), [axes], s, chosen);
                var sum = run.One(KernelId.Sum, run.Floats(1, T), [Ints(2)], product);
                var some = run.One(KernelId.Offset, run.Floats(1, T), [Float(1e-20)], sum);
                var part = run.One(KernelId.Div, run.Floats(1, T, E), [Ints(0, 1)], product, some);
                run.One(KernelId.Scale, run.Floats(1, T, E), [Float(2.5)], part);
            },
            run => run.All(KernelId.Router, [run.Floats(1, T, E), run.Slot(DType.Bool, 1, T, E), run.Slot(DType.Int64, E)], routing, logits, bias));
        yield return new(
            "router, backward",
            $"{T} x {E}",
            run =>
            {
                // the gradient rules of scale, div, sum, mul and sigmoid
                var dShare = run.One(KernelId.Scale, run.Floats(1, T, E), [Float(2.5)], dp);
                var dRaw = run.One(KernelId.Div, run.Floats(1, T, E), [Ints(0, 1)], dShare, floor);
                var slope = run.One(KernelId.Div, run.Floats(1, T, E), [Ints(0, 1)], share, floor);
                var back = run.One(KernelId.Mul, run.Floats(1, T, E), [axes], dShare, slope);
                dShare.Dispose();
                slope.Dispose();
                var dFloor = run.One(KernelId.Neg, run.Floats(1, T), [], run.One(KernelId.Sum, run.Floats(1, T), [Ints(2)], back));
                back.Dispose();
                var wide = run.One(KernelId.Broadcast, run.Floats(1, T, E), [Int(2), Int(E)], dFloor);
                var total = run.One(KernelId.Add, run.Floats(1, T, E), [], dRaw, wide);
                dRaw.Dispose();
                wide.Dispose();
                var dScores = run.One(KernelId.Mul, run.Floats(1, T, E), [axes], total, weights);
                total.Dispose();
                Slope(run, scores, dScores, T, E);
            },
            run => run.One(KernelId.RouterGrad, run.Floats(1, T, E), routing, dp, logits, mask));
    }

    private static IEnumerable<Case> Balance()
    {
        const int T = 2048, E = 256;
        var axes = Ints(0, 1, 2);
        SlotValue logits = Normal(1, 1, T, E), w = Ones(1, T), d = Normal(1, 1, E);
        var kept = new Run();
        SlotValue scores = kept.One(KernelId.Sigmoid, kept.Floats(1, T, E), [], logits);
        SlotValue floor = kept.One(KernelId.Offset, kept.Floats(1, T), [Float(1e-20)], kept.One(KernelId.Sum, kept.Floats(1, T), [Ints(2)], scores));
        SlotValue share = kept.One(KernelId.Div, kept.Floats(1, T, E), [Ints(0, 1)], scores, floor);
        yield return new(
            "balance",
            $"{T} x {E}, top 8",
            run =>
            {
                var s = run.One(KernelId.Sigmoid, run.Floats(1, T, E), [], logits);
                var m = run.One(KernelId.GroupTopK, run.Slot(DType.Bool, 1, T, E), [Int(8), Int(1), Int(1), Int(0), Int(0)], s);
                var chosen = run.One(KernelId.Cast, run.Floats(1, T, E), [], m);
                var counted = run.One(KernelId.Mul, run.Floats(1, T, E), [Ints(0, 1)], chosen, w);
                run.One(KernelId.Sum, run.Floats(1, E), [Ints(1)], counted);
                var some = run.One(KernelId.Offset, run.Floats(1, T), [Float(1e-20)], run.One(KernelId.Sum, run.Floats(1, T), [Ints(2)], s));
                var part = run.One(KernelId.Div, run.Floats(1, T, E), [Ints(0, 1)], s, some);
                var weighed = run.One(KernelId.Mul, run.Floats(1, T, E), [Ints(0, 1)], part, w);
                run.One(KernelId.Sum, run.Floats(1, E), [Ints(1)], weighed);
            },
            run => run.All(KernelId.Balance, [run.Floats(1, E), run.Floats(1, E)], [Int(8), Float(1e-20)], logits, w));
        yield return new(
            "balance, backward",
            $"{T} x {E}",
            run =>
            {
                var wide = run.One(KernelId.Broadcast, run.Floats(1, T, E), [Int(1), Int(T)], d);
                var dShare = run.One(KernelId.Mul, run.Floats(1, T, E), [Ints(0, 1)], wide, w);
                wide.Dispose();
                var own = run.One(KernelId.Div, run.Floats(1, T, E), [Ints(0, 1)], dShare, floor);
                var slope = run.One(KernelId.Div, run.Floats(1, T, E), [Ints(0, 1)], share, floor);
                var back = run.One(KernelId.Mul, run.Floats(1, T, E), [axes], dShare, slope);
                var dFloor = run.One(KernelId.Neg, run.Floats(1, T), [], run.One(KernelId.Sum, run.Floats(1, T), [Ints(2)], back));
                var shared = run.One(KernelId.Broadcast, run.Floats(1, T, E), [Int(2), Int(E)], dFloor);
                Slope(run, scores, run.One(KernelId.Add, run.Floats(1, T, E), [], own, shared), T, E);
            },
            run => run.One(KernelId.BalanceGrad, run.Floats(1, T, E), [Float(1e-20)], d, logits, w));
    }

    /// The gradient rule of sigmoid: dy (y - y^2).
    private static void Slope(Run run, SlotValue y, SlotValue dy, int t, int e)
    {
        var axes = Ints(0, 1, 2);
        var squared = run.One(KernelId.Mul, run.Floats(1, t, e), [axes], y, y);
        var slope = run.One(KernelId.Sub, run.Floats(1, t, e), [axes], y, squared);
        run.One(KernelId.Mul, run.Floats(1, t, e), [axes], dy, slope);
    }

    private static IEnumerable<Case> Rope()
    {
        const int S = 512, N = 16, Nope = 128, R = 64, V = 128;
        var kept = new Run();
        SlotValue q = Normal(1, 1, S, N, Nope + R), kv = Normal(1, 1, S, N, Nope + V), pe = Normal(1, 1, S, R);
        var table = kept.One(
            KernelId.RotaryTable,
            kept.Floats(S, R),
            [Int(R), Float(10_000), Float(40), Float(4096), Float(32), Float(1), Float(1)],
            Iota(S));
        yield return new(
            "mla_rope_q",
            $"{S} x {N} heads x {Nope + R}",
            run =>
            {
                var nope = run.One(KernelId.Slice, run.Floats(1, S, N, Nope), [Int(3), Int(0), Int(Nope)], q);
                var part = run.One(KernelId.Slice, run.Floats(1, S, N, R), [Int(3), Int(Nope), Int(R)], q);
                var turned = run.One(KernelId.Rope, run.Floats(1, S, N, R), [Int(0)], part, table);
                run.One(KernelId.Concat, run.Floats(1, S, N, Nope + R), [Int(3)], nope, turned);
            },
            run => run.One(KernelId.RopeQ, run.Floats(1, S, N, Nope + R), [Int(0)], q, table));
        yield return new(
            "mla_rope_kv",
            $"{S} x {N} heads x ({Nope + R} + {V})",
            run =>
            {
                var nope = run.One(KernelId.Slice, run.Floats(1, S, N, Nope), [Int(3), Int(0), Int(Nope)], kv);
                run.One(KernelId.Slice, run.Floats(1, S, N, V), [Int(3), Int(Nope), Int(V)], kv);
                var turned = run.One(KernelId.Rope, run.Floats(1, S, R), [Int(0)], pe, table);
                var wide = run.One(KernelId.Broadcast, run.Floats(1, S, N, R), [Int(2), Int(N)], turned);
                run.One(KernelId.Concat, run.Floats(1, S, N, Nope + R), [Int(3)], nope, wide);
            },
            run => run.All(KernelId.RopeKv, [run.Floats(1, S, N, Nope + R), run.Floats(1, S, N, V)], [Int(Nope)], kv, pe, table));
    }

    private static IEnumerable<Case> Rows()
    {
        const int T = 512, H = 2048, E = 32, K = 8;
        var kept = new Run();
        SlotValue x = Normal(1, 1, T, H), p = Normal(1, 1, T, E);
        var mask = kept.One(KernelId.GroupTopK, kept.Slot(DType.Bool, 1, T, E), [Int(K), Int(1), Int(1), Int(0), Int(0)], p);
        var route = kept.One(KernelId.Route, kept.Rows(1, T, E), [], mask);
        var rows = kept.One(KernelId.PermuteFused, kept.Rows(1, T, E, H), [], x, route);
        yield return new(
            "permute_with_probs",
            $"{T} x {H}, top {K} of {E}",
            run =>
            {
                run.One(KernelId.Permute, run.Rows(1, T, E, H), [], x, route);
                run.One(KernelId.RouteProbs, run.Rows(1, T, E), [], p, route);
            },
            run => run.All(KernelId.PermuteWithProbs, [run.Rows(1, T, E, H), run.Rows(1, T, E)], [], x, p, route));
        yield return new(
            "permute",
            $"{T} x {H}, top {K} of {E}",
            run => run.One(KernelId.Permute, run.Rows(1, T, E, H), [], x, route),
            run => run.One(KernelId.PermuteFused, run.Rows(1, T, E, H), [], x, route));
        yield return new(
            "unpermute",
            $"{T} x {H}, top {K} of {E}",
            run => run.One(KernelId.Unpermute, run.Floats(1, T, H), [], rows, route),
            run => run.One(KernelId.UnpermuteFused, run.Floats(1, T, H), [], rows, route));
    }

    private static IEnumerable<Case> Gated()
    {
        const int T = 2048, F = 1024;
        SlotValue x = Normal(1, 1, T, 2, F), p = Normal(1, 1, T), dy = Normal(1, 1, T, F);
        var axes = Ints(0, 1, 2);
        yield return new(
            "swiglu_probs",
            $"{T} x {F}",
            run => run.One(KernelId.Mul, run.Floats(1, T, F), [Ints(0, 1)], run.One(KernelId.SwiGlu, run.Floats(1, T, F), [], x), p),
            run => run.One(KernelId.SwiGluProbs, run.Floats(1, T, F), [], x, p));
        yield return new(
            "swiglu_probs, backward",
            $"{T} x {F}",
            run =>
            {
                // y is computed again, as the fused kernel does
                var y = run.One(KernelId.SwiGlu, run.Floats(1, T, F), [], x);
                run.One(KernelId.Sum, run.Floats(1, T), [Ints(2)], run.One(KernelId.Mul, run.Floats(1, T, F), [axes], dy, y));
                var weighed = run.One(KernelId.Mul, run.Floats(1, T, F), [Ints(0, 1)], dy, p);
                run.One(KernelId.SwiGluGrad, run.Floats(1, T, 2, F), [], weighed, x);
            },
            run => run.All(KernelId.SwiGluProbsGrad, [run.Floats(1, T, 2, F), run.Floats(1, T)], [], dy, x, p));
    }

    /// Forward and backward of head and cross-entropy; g is the cotangent of each token's loss.
    private static Case Head(int hidden, int tokens)
    {
        const int V = 32_768;
        int h = hidden, t = tokens;
        SlotValue x = Normal(1, 1, t, h), w = Normal(0.02, V, h), labels = Ids(V, 1, t), vocab = Iota(V), g = Ones(1, t);
        return new(
            "linear_cross_entropy, forward and backward",
            $"{t} x {h}, {V} ids",
            run =>
            {
                var z = run.One(KernelId.Contract, run.Floats(1, t, V), [Text("b s k+, v k+ -> b s v")], x, w);
                var top = run.One(KernelId.Max, run.Floats(1, t), [Ints(2)], z);
                var shifted = run.One(KernelId.Sub, run.Floats(1, t, V), [Ints(0, 1)], z, top);
                z.Dispose();
                var exp = run.One(KernelId.Exp, run.Floats(1, t, V), [], shifted);
                var sum = run.One(KernelId.Sum, run.Floats(1, t), [Ints(2)], exp);
                var log = run.One(KernelId.Log, run.Floats(1, t), [], sum);
                var at = run.One(KernelId.Pick, run.Floats(1, t), [], shifted, labels, vocab);
                shifted.Dispose();
                run.One(KernelId.Sub, run.Floats(1, t), [Ints(0, 1)], log, at);

                var dSum = run.One(KernelId.Div, run.Floats(1, t), [Ints(0, 1)], g, sum);
                var wide = run.One(KernelId.Broadcast, run.Floats(1, t, V), [Int(2), Int(V)], dSum);
                var dExp = run.One(KernelId.Mul, run.Floats(1, t, V), [Ints(0, 1, 2)], wide, exp);
                wide.Dispose();
                exp.Dispose();
                var picked = run.One(KernelId.PickGrad, run.Floats(1, t, V), [], run.One(KernelId.Neg, run.Floats(1, t), [], g), labels, vocab);
                var dz = run.One(KernelId.Add, run.Floats(1, t, V), [], picked, dExp);
                picked.Dispose();
                dExp.Dispose();
                run.One(KernelId.Contract, run.Floats(V, h), [Text("b+ s+ v, b+ s+ k -> v k")], dz, x);
                run.One(KernelId.Contract, run.Floats(1, t, h), [Text("b s v+, v+ k -> b s k")], dz, w);
            },
            run => run.All(
                KernelId.LinearCrossEntropyGrad, [run.Floats(1, t), run.Floats(1, t, h), run.Floats(V, h)], [], x, w, labels, vocab, g));
    }
}

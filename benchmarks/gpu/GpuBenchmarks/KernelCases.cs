// The kernels of a GPU at the proxy's sizes, each beside its ceiling: a copy's bandwidth, or FLOP/s for products and attention.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using Torch = TorchSharp.torch;

namespace DeepSeekGraph.Benchmarks;

/// <summary>A launch with operands of its own; Bytes and Flops are what it must move and compute at least.</summary>
internal sealed record KernelCase(string Name, KernelId Id, Attribute[] Attributes, SlotValue[] Inputs, SlotValue[] Outputs, double Bytes, double Flops = 0);

internal sealed class KernelCases(RankDevice device)
{
    private const int Tokens = 4096, Hidden = 7168, Heads = 128, Experts = 32, TopK = 8, Ffn = 2048, DenseFfn = 18432, Rows = Tokens * TopK, Vocab = 32768;
    private static readonly DType Wide = DType.Float32, Narrow = DType.BFloat16;
    private static readonly RankContext Alone = new(0, 0, [], []);

    /// <summary>Median seconds of one launch: many between two waits, so that the host is ahead.</summary>
    public double Seconds(KernelCase c, int repeats = 7, int launches = 20)
    {
        void Run() => device.Kernels[c.Id].Run(new KernelCall(c.Attributes, c.Inputs, c.Outputs, Alone));
        Run();
        device.Finish();
        var times = new double[repeats];
        for (var i = 0; i < repeats; i++)
        {
            var begin = Stopwatch.GetTimestamp();
            for (var k = 0; k < launches; k++)
                Run();
            device.Finish();
            times[i] = Stopwatch.GetElapsedTime(begin).TotalSeconds / launches;
        }

        Array.Sort(times);
        return times[repeats / 2];
    }

    /// <summary>Bytes a second that a copy reads and writes.</summary>
    public double Copy()
    {
        using var a = Torch.zeros(1L << 29, dtype: Torch.ScalarType.Float32, device: device.Torch);
        using var b = Torch.empty_like(a);
        b.copy_(a);
        device.Finish();
        var begin = Stopwatch.GetTimestamp();
        for (var i = 0; i < 20; i++)
            b.copy_(a);
        device.Finish();
        return 20 * 2 * 4.0 * (1L << 29) / Stopwatch.GetElapsedTime(begin).TotalSeconds;
    }

    /// <summary>One after the other; operands are freed behind each.</summary>
    public IEnumerable<KernelCase> All()
    {
        Attribute eps = Attribute.NewFloat(1e-6), one = Int(1), zero = Int(0), library = Attribute.NewText(KernelPath.Library.Name), exact = Attribute.NewText(KernelPath.Exact.Name);
        SlotValue X() => Dense(Narrow, 1, Tokens, Hidden);
        SlotValue W() => Dense(Narrow, Hidden);
        yield return Case("rms_norm", KernelId.RmsNorm, [eps], [X(), W()], [X()]);
        yield return Case("add_rms_norm", KernelId.AddRmsNorm, [eps], [X(), X(), W()], [X(), X()]);
        yield return Case("rms_norm_grad_x", KernelId.RmsNormGradX, [eps], [X(), X(), W()], [X()]);
        yield return Case("rms_norm_grad_x_add", KernelId.RmsNormGradXAdd, [eps], [X(), X(), W(), X()], [X()]);
        yield return Case("rms_norm_grad_w", KernelId.RmsNormGradW, [eps], [X(), X()], [W()]);
        var table = Dense(Wide, Tokens, 64);
        SlotValue Q() => Dense(Narrow, 1, Tokens, Heads, 192);
        SlotValue V() => Dense(Narrow, 1, Tokens, Heads, 128);
        yield return Case("rope_q", KernelId.RopeQ, [zero], [Q(), table], [Q()]);
        yield return Case("rope_kv", KernelId.RopeKv, [Int(128)], [Dense(Narrow, 1, Tokens, Heads, 256), Dense(Narrow, 1, Tokens, 64), table], [Q(), V()]);
        yield return Case("rope_kv_grad", KernelId.RopeKvGrad, [Int(128)], [Q(), V(), table], [Dense(Narrow, 1, Tokens, Heads, 256), Dense(Narrow, 1, Tokens, 64)]);
        yield return Case("swiglu", KernelId.SwiGlu, [], [Dense(Narrow, 1, Tokens, 2, DenseFfn)], [Dense(Narrow, 1, Tokens, DenseFfn)]);
        yield return Case("swiglu_grad", KernelId.SwiGluGrad, [], [Dense(Narrow, 1, Tokens, DenseFfn), Dense(Narrow, 1, Tokens, 2, DenseFfn)], [Dense(Narrow, 1, Tokens, 2, DenseFfn)]);
        var gates = Routed(Narrow, 2, Ffn);
        var p = Routed(Wide);
        yield return Case("swiglu_probs", KernelId.SwiGluProbs, [], [gates, p], [Routed(Narrow, Ffn)]);
        yield return Case("swiglu_probs_grad", KernelId.SwiGluProbsGrad, [], [Routed(Narrow, Ffn), gates, p], [Routed(Narrow, 2, Ffn), Routed(Wide)]);
        Attribute[] rules = [Int(TopK), Int(8), Int(4), zero, zero, one, Attribute.NewFloat(1e-20), Attribute.NewFloat(2.5), zero];
        SlotValue Scores(DType dtype, int experts) => Dense(dtype, 1, Tokens, experts);
        yield return Case("router, 256 experts", KernelId.Router, rules, [Scores(Wide, 256), Dense(Wide, 256)], [Scores(Wide, 256), Scores(DType.Bool, 256), Dense(DType.Int64, 256)]);
        yield return Case("router_grad, 256 experts", KernelId.RouterGrad, rules, [Scores(Wide, 256), Scores(Wide, 256), Scores(DType.Bool, 256)], [Scores(Wide, 256)]);
        var (mask, route) = Route();
        yield return Case("route, 32 experts", KernelId.Route, [Int(TopK), Int(Experts)], [mask], [Empty(DType.Bool, true, 1, Tokens, Experts)]);
        var rows = Routed(Narrow, Hidden);
        yield return Case("permute_with_probs", KernelId.PermuteWithProbs, [], [X(), Scores(Wide, Experts), route], [Routed(Narrow, Hidden), Routed(Wide)]);
        yield return Case("unpermute_with_probs", KernelId.UnpermuteWithProbs, [], [rows, p, route], [X(), Scores(Wide, Experts)]);
        yield return Case("unpermute", KernelId.UnpermuteFused, [], [rows, route], [X()]);
        yield return Case("add of three", KernelId.Add, [], [X(), X(), X()], [X()]);
        yield return Case("cast to fp32", KernelId.Cast, [], [X()], [Dense(Wide, 1, Tokens, Hidden)]);
        var weights = new[] { 4, Experts, Ffn, Hidden / 8 };
        yield return Case("sum_squares", KernelId.SumSquares, [], [Dense(Narrow, weights)], [Dense(Wide)]);
        var weight = Dense(Narrow, weights);
        yield return Case(
            "adam_w with remainders", KernelId.AdamW, [Attribute.NewFloat(0.9), Attribute.NewFloat(0.95), Attribute.NewFloat(1e-8), Attribute.NewFloat(0.1)],
            [Dense(Narrow, weights), Dense(Wide), Dense(Wide), Dense(Wide), weight], [Dense(DType.Int16, weights), Dense(Narrow, weights), Dense(Narrow, weights), weight],
            18.0 * weights.Aggregate(1L, (n, e) => n * e));
        yield return Product("dense product", "b s k+, n k+ -> b s n", X(), Dense(Narrow, DenseFfn, Hidden), Dense(Narrow, 1, Tokens, DenseFfn), DenseFfn);
        yield return Product("dense gradient", "b s n+, n+ k -> b s k", Dense(Narrow, 1, Tokens, DenseFfn), Dense(Narrow, DenseFfn, Hidden), X(), DenseFfn);
        yield return Product("dense weight gradient", "b+ s+ n, b+ s+ k -> n k", Dense(Narrow, 1, Tokens, DenseFfn), X(), Dense(Narrow, DenseFfn, Hidden), DenseFfn);
        var bank = Dense(Narrow, Experts, 2, Ffn, Hidden);
        var flops = 2.0 * Rows * Hidden * 2 * Ffn;
        yield return new KernelCase("grouped product", KernelId.GroupedMatMul, [zero, library], [rows, bank, route], [Routed(Narrow, 2, Ffn)], 0, flops);
        yield return new KernelCase("grouped gradient", KernelId.GroupedMatMul, [one, library], [gates, bank, route], [Routed(Narrow, Hidden)], 0, flops);
        yield return new KernelCase("grouped weight gradient", KernelId.GroupedWeightGrad, [library], [gates, rows, route], [Dense(Narrow, Experts, 2, Ffn, Hidden)], 0, flops);
        var scale = Attribute.NewFloat(1 / Math.Sqrt(192));
        SlotValue q = Q(), k = Q(), v = V(), y = V(), lse = Dense(Wide, 1, Heads, Tokens);
        var forward = 2.0 * Heads * (192 + 128) * Tokens * (double)Tokens / 2;
        var backward = forward * (192 + 192 + 192 + 128 + 128) / (192 + 128);
        foreach (var (name, path) in new[] { ("", library), (", exact", exact) })
        {
            yield return new KernelCase("attention" + name, KernelId.Attention, [scale, path], [q, k, v], [y, lse], 0, forward);
            yield return new KernelCase("attention_grad" + name, KernelId.AttentionGrad, [scale, path], [V(), q, k, v, y, lse], [Q(), Q(), V()], 0, backward);
        }

        yield return new KernelCase(
            "head, loss and gradients", KernelId.LinearCrossEntropyGrad, [],
            [X(), Dense(Narrow, Vocab, Hidden), Ids(Tokens, 1, Tokens), Ids(Vocab, Vocab), Dense(Wide, 1, Tokens)],
            [Dense(Wide, 1, Tokens), X(), Dense(Wide, Vocab, Hidden)], 0, 6.0 * Tokens * Hidden * Vocab);
    }

    private static KernelCase Product(string name, string spec, SlotValue a, SlotValue b, SlotValue result, double n)
        => new(name, KernelId.Contract, [Attribute.NewText(spec)], [a, b], [result], 0, 2.0 * Tokens * Hidden * n);

    /// <summary>Every operand and result once.</summary>
    private static KernelCase Case(string name, KernelId id, Attribute[] attributes, SlotValue[] inputs, SlotValue[] outputs, double bytes = 0)
        => new(name, id, attributes, inputs, outputs, bytes > 0 ? bytes : inputs.Concat(outputs).Where(s => !s.HoldsRows).Sum(BytesOf));

    private static double BytesOf(SlotValue slot)
        => (double)slot.Info.DType.Bytes * (slot.Info.Routed ? Rows : 1)
            * slot.Info.Extents.Skip(slot.Info.Routed ? 3 : 0).Aggregate(1L, (n, e) => n * e);

    private static Attribute Int(long value) => Attribute.NewInt(value);

    private SlotValue Empty(DType dtype, bool routed, params int[] extents)
        => new(
            new SlotInfo(0, "x", SlotKind.Temporary, dtype, [.. extents.Select((_, i) => $"d{i}")], extents, routed, routed ? (double)TopK / Experts : 1, 1, []), null, device.Torch);

    /// <summary>Random where it holds numbers, zero elsewhere.</summary>
    private SlotValue Dense(DType dtype, params int[] extents) => Filled(Empty(dtype, false, extents), -1);

    private SlotValue Routed(DType dtype, params int[] extents) => Filled(Empty(dtype, true, [1, Tokens, Experts, .. extents]), Rows);

    private static SlotValue Filled(SlotValue slot, int rows)
    {
        var tensor = slot.Fill(rows);
        if (tensor.is_floating_point())
            tensor.normal_(0, 0.5);
        else
            tensor.zero_();
        return slot;
    }

    private SlotValue Ids(int modulo, params int[] extents)
    {
        var slot = Empty(DType.Int64, false, extents);
        using var ids = Torch.arange(extents.Aggregate(1L, (n, e) => n * e), dtype: Torch.ScalarType.Int64);
        using var wrapped = ids.remainder(modulo);
        using var shaped = wrapped.reshape([.. extents.Select(e => (long)e)]);
        slot.Fill().copy_(shaped);
        return slot;
    }

    /// <summary>Eight experts a token, all as often.</summary>
    private (SlotValue Mask, SlotValue Route) Route()
    {
        var mask = Empty(DType.Bool, false, 1, Tokens, Experts);
        var chosen = new bool[Tokens * Experts];
        for (var t = 0; t < Tokens; t++)
        {
            for (var i = 0; i < TopK; i++)
                chosen[(t * Experts) + (((t * 5) + (i * 3)) % Experts)] = true;
        }

        using var host = Torch.tensor(chosen);
        using var shaped = host.reshape(1, Tokens, Experts);
        mask.Fill().copy_(shaped);
        var route = Empty(DType.Bool, true, 1, Tokens, Experts);
        device.Kernels[KernelId.Route].Run(new KernelCall([Int(TopK), Int(Experts)], [mask], [route], Alone));
        return (mask, route);
    }
}

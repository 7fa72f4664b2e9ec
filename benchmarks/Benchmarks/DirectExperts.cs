// The mixture of experts of the direct step: router, balance loss, and the experts' products.
using DeepSeekGraph;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;
using Attribute = DeepSeekGraph.Attribute;
using Tensor = TorchSharp.torch.Tensor;

namespace Benchmarks;

internal sealed partial class DirectStep
{
    private const float Tiny = 1e-20f;

    private Value Routed(string name, Value f, Value df, Value d, double inverse)
    {
        int e = _c.NRoutedExperts, h = _c.HiddenSize, width = _c.MoeIntermediateSize, rows = _seq * _c.NumExpertsPerTok;
        var mask = Value.Cell(DType.Bool, false, 1, _seq, e);
        mask.Fill();
        var (probs, dp) = (Value.Tokens(_seq, e), Scratch("dp", e));
        Router(name, f, df, mask, probs, dp, inverse);

        var route = Value.Cell(DType.Bool, true, 1, _seq, e);
        Calls(_forward, KernelId.Route, [], [mask], route);
        Value Rows(params int[] features) => Value.Rows(_seq, e, rows, features);
        Value Shared(string what, params int[] features)
            => _scratch.TryGetValue(what, out var value) ? value : _scratch[what] = Rows(features);

        var (x, r, gu, s, y) = (Rows(h), Rows(), Rows(2, width), Rows(width), Rows(h));
        var (dx, dr, dgu, ds, dy) = (Shared("rows dx", h), Shared("rows dr"), Shared("rows dgu", 2, width), Shared("rows ds", width), Shared("rows dy", h));
        var (up, down) = (_weights[$"{name}.experts.gate_up_proj.weight"], _weights[$"{name}.experts.down_proj.weight"]);
        var path = Attribute.NewText(KernelPath.Exact.Name);
        IReadOnlyList<Attribute> straight = [Attribute.NewInt(0), path], transposed = [Attribute.NewInt(1), path];
        var result = Value.Tokens(_seq, h);

        Calls(_forward, KernelId.PermuteWithProbs, [], [f.Slot, probs.Slot, route], x.Slot, r.Slot);
        Calls(_backward, KernelId.UnpermuteWithProbs, [], [dx.Slot, dr.Slot, route], df.Slot, dp.Slot);

        Calls(_forward, KernelId.GroupedMatMul, straight, [x.Slot, up.Slot, route], gu.Slot);
        Calls(_backward, KernelId.GroupedMatMul, transposed, [dgu.Slot, up.Slot, route], dx.Slot);
        _backward.Add(() => Accumulate(up, dgu, x, route.Rows));

        Calls(_forward, KernelId.SwiGluProbs, [], [gu.Slot, r.Slot], s.Slot);
        Calls(_backward, KernelId.SwiGluProbsGrad, [], [ds.Slot, gu.Slot, r.Slot], dgu.Slot, dr.Slot);

        Calls(_forward, KernelId.GroupedMatMul, straight, [s.Slot, down.Slot, route], y.Slot);
        Calls(_backward, KernelId.GroupedMatMul, transposed, [dy.Slot, down.Slot, route], ds.Slot);
        _backward.Add(() => Accumulate(down, dy, s, route.Rows));

        Calls(_forward, KernelId.UnpermuteFused, [], [y.Slot, route], result.Slot);
        Calls(_backward, KernelId.PermuteFused, [], [d.Slot, route], dy.Slot);
        return result;
    }

    /// <summary>Each expert's gradient += dy^T x over its rows.</summary>
    private static void Accumulate(Weight w, Value dy, Value x, RowSet route)
    {
        for (var i = 0; i < route.Experts; i++)
        {
            if (route.Counts[i] == 0)
                continue;
            using var columns = dy.Mt.narrow(1, route.Offsets[i], route.Counts[i]);
            using var rows = x.M.narrow(0, route.Offsets[i], route.Counts[i]);
            Product(w.Experts[i], columns, rows, 1);
        }
    }

    private void Router(string name, Value f, Value df, SlotValue mask, Value probs, Value dp, double inverse)
    {
        int e = _c.NRoutedExperts;
        var w = _weights[$"{name}.gate.weight"];
        var (bias, counts) = _biases[$"{name}.gate.e_score_correction_bias"];
        var (scores, biased, chosen, share) = (Value.Tokens(_seq, e), Scratch("biased", e), Value.Tokens(_seq, e), Value.Tokens(_seq, e));
        Tensor flat = mask.Tensor.view(_seq, e), sum = zeros(_seq, 1), all = zeros(_seq, 1), pull = zeros(1, e);
        var plain = Value.Cell(DType.Bool, false, 1, _seq, e);
        var flatPlain = plain.Fill().view(_seq, e);
        var scaling = (float)_c.RoutedScalingFactor;

        // alpha E / (K T) count_i, with what one sequence weighs in the global batch
        var balance = (float)(inverse * _c.SeqAuxLossAlpha * e / _c.NumExpertsPerTok / _seq);
        var choose = new Call(KernelId.GroupTopK, GroupedChoice(), [biased.Slot], [mask]);
        var chooseAny = new Call(KernelId.GroupTopK, PlainChoice(), [scores.Slot], [plain]);
        _forward.Add(() =>
        {
            Product(scores.M, f.M, w.Wt, 0);
            scores.M.sigmoid_().On(scores.M);
            biased.M.copy_(scores.M);
            Add(biased.M, bias.Tensor);
            choose.Run();
            chosen.M.copy_(flat);
            using (var count = flat.sum([0L], false, ScalarType.Int64))
                Add(counts.Tensor, count);
            probs.M.copy_(scores.M);
            probs.M.mul_(chosen.M).On(probs.M);
            using (var total = probs.M.sum([1L], true))
                sum.copy_(total);
            sum.add_(Tiny, One).On(sum);
            probs.M.div_(sum).On(probs.M);
            probs.M.mul_(scaling).On(probs.M);

            chooseAny.Run();
            using (var count = flatPlain.sum([0L], true, ScalarType.Float32))
                pull.copy_(count);
            pull.mul_(balance).On(pull);
            using (var total = scores.M.sum([1L], true))
                all.copy_(total);
            all.add_(Tiny, One).On(all);
            share.M.copy_(scores.M);
            share.M.div_(all).On(share.M);
        });
        _backward.Add(() =>
        {
            var t = dp.M;
            using (var product = t.mul(probs.M))
            using (var dot = product.sum([1L], true))
            {
                t.mul_(scaling).On(t);
                t.sub_(dot).On(t);
            }

            t.div_(sum).On(t);
            t.mul_(chosen.M).On(t);
            using (var product = share.M.mul(pull))
            using (var dot = product.sum([1L], true))
            using (var rest = pull.sub(dot))
            {
                rest.div_(all).On(rest);
                Add(t, rest);
            }

            t.mul_(scores.M).On(t);
            using (var other = scores.M.neg())
            {
                other.add_(1f, One).On(other);
                t.mul_(other).On(t);
            }

            Product(w.G, dp.Mt, f.M, 1);
            Product(df.M, t, w.W, 1);
        });
    }

    private IReadOnlyList<Attribute> GroupedChoice() => Choice(_c.NGroup, _c.TopkGroup);

    private IReadOnlyList<Attribute> PlainChoice() => Choice(1, 1);

    private IReadOnlyList<Attribute> Choice(int groups, int keep)
        =>
        [
            Attribute.NewInt(_c.NumExpertsPerTok),
            Attribute.NewInt(groups),
            Attribute.NewInt(keep),
            Attribute.NewInt(_c.ZeroMaskedGroups ? 1 : 0),
            Attribute.NewInt(0),
        ];
}

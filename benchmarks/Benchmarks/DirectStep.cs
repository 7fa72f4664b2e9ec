// The tiny DeepSeek-V3's training step by hand over TorchSharp: what a careful person would write without a compiler.
// S seq, H hidden, V vocab, E experts; one sequence a microbatch, fp32, no automatic differentiation.
using DeepSeekGraph;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Training;
using TorchSharp;
using static TorchSharp.torch;
using Attribute = DeepSeekGraph.Attribute;
using Tensor = TorchSharp.torch.Tensor;

namespace Benchmarks;

/// <summary>
/// Forward and backward as two lists of calls on buffers that never move. Matrix products write and add in place, weight
/// gradients accumulate in the product itself, one AdamW updates all matrices. Kernels of the product stand where TorchSharp
/// has no good form (norms, rotation, attention, routing, SwiGLU).
/// </summary>
internal sealed partial class DirectStep
{
    private readonly PlanSet _plan;
    private readonly DeepSeekV3Config _c;
    private readonly int _seq;
    private readonly List<System.Action> _forward = [];
    private readonly List<System.Action> _backward = [];
    private readonly Dictionary<string, Value> _scratch = [];
    private readonly Dictionary<string, Weight> _weights = [];
    private readonly List<System.Action> _update = [];
    private readonly List<Tensor> _zeroed = [];
    private readonly Tensor _loss = zeros([]);
    private readonly Tensor _mtpLoss = zeros([]);
    private readonly SlotValue _rate = Scalar();
    private readonly SlotValue _step = Scalar();
    private readonly SlotValue _norm = Scalar();
    private readonly SlotValue _vocab = Value.Cell(DType.Int64, false, 0);
    private readonly SlotValue[] _ids;
    private readonly Tensor[] _labels;
    private readonly Value _table;

    /// <summary>Takes the plan's constants and the initial values of its parameters.</summary>
    public DirectStep(PlanSet plan, DeepSeekV3Config config, IReadOnlyDictionary<string, Tensor> initial)
    {
        (_plan, _c, _seq) = (plan, config, plan.SeqLength);
        Weights(initial);
        _vocab = Value.Cell(DType.Int64, false, _c.VocabSize);
        using (var places = arange(_c.VocabSize, dtype: ScalarType.Int64))
            _vocab.AdoptCopy(places);
        _ids = [.. Enumerable.Range(0, 2).Select(_ => Value.Cell(DType.Int64, false, 1, _seq))];
        foreach (var ids in _ids)
            ids.Fill();
        _labels = [zeros([_seq, 1], dtype: ScalarType.Int64), zeros([_seq, 1], dtype: ScalarType.Int64)];

        var positions = Value.Cell(DType.Int64, false, _seq);
        using (var places = arange(_seq, dtype: ScalarType.Int64))
            positions.AdoptCopy(places);
        _table = Value.Tokens(_seq, _c.QkRopeHeadDim);
        var table = Value.Cell(DType.Float32, false, _seq, _c.QkRopeHeadDim);
        new Call(KernelId.RotaryTable, Attributes(KernelId.RotaryTable), [positions], [table]).Run();
        _table = new Value(table, _seq);
        Build();
        _backward.Reverse();
    }

    /// <summary>Main loss, loss of multi-token prediction and gradient norm of the last step.</summary>
    public (double Loss, double MtpLoss, double Norm) Metrics => (_loss.item<float>(), _mtpLoss.item<float>(), _norm.Tensor.item<float>());

    /// <summary>One optimizer step on a global batch.</summary>
    public void Run(TrainingBatch batch, long step, double rate)
    {
        foreach (var tensor in _zeroed)
            tensor.zero_();
        for (var row = 0; row < batch.Rows; row++)
        {
            var tokens = batch.Tokens.AsSpan(row * batch.Columns, batch.Columns);
            tokens[.._seq].CopyTo(Longs(_ids[0].Tensor));
            tokens.Slice(1, _seq).CopyTo(Longs(_ids[1].Tensor));
            tokens.Slice(1, _seq).CopyTo(Longs(_labels[0]));
            tokens.Slice(2, _seq).CopyTo(Longs(_labels[1]));
            foreach (var call in _forward)
                call();
            foreach (var call in _backward)
                call();
        }

        _rate.Tensor.fill_((float)rate);
        _step.Tensor.fill_((float)step);
        foreach (var call in _update)
            call();
    }

    private static SlotValue Scalar()
    {
        var cell = Value.Cell(DType.Float32, false);
        cell.Fill();
        return cell;
    }

    private static unsafe Span<long> Longs(Tensor tensor) => new(tensor.Pointer(), (int)tensor.numel());

    /// <summary>Attributes of the plan's launches of a kernel, so that constants are the same.</summary>
    private IReadOnlyList<Attribute> Attributes(KernelId kernel, int which = 0)
        => _plan.Stages[0].Programs.SelectMany(p => p.Steps).OfType<Step.Launch>().Where(s => s.Kernel == kernel)
            .Select(s => s.Attributes).DistinctBy(a => string.Join(" ", a)).ElementAt(which);

    private Value Scratch(string name, params int[] features)
    {
        if (!_scratch.TryGetValue(name, out var value))
            _scratch[name] = value = Value.Tokens(_seq, features);
        return value;
    }

    /// <summary>y = keep y + a b, in place.</summary>
    private static void Product(Tensor y, Tensor a, Tensor b, float keep) => y.addmm_(a, b, keep, 1f).On(y);

    private static void Add(Tensor y, Tensor x) => y.add_(x, One).On(y);

    private static readonly Scalar One = 1L;

    /// <summary>y = x W^T. Backward: W's gradient adds up; dx is written, or added to where it `adds`.</summary>
    private Value Linear(string name, Value x, Value dx, bool adds, Value dy, params int[] features)
    {
        var (w, y) = (_weights[$"{name}.weight"], Value.Tokens(_seq, features));
        _forward.Add(() => Product(y.M, x.M, w.Wt, 0));
        _backward.Add(() =>
        {
            Product(w.G, dy.Mt, x.M, 1);
            Product(dx.M, dy.M, w.W, adds ? 1 : 0);
        });
        return y;
    }

    /// <summary>RMSNorm. Backward: dx is written, or added to where it `adds`.</summary>
    private Value Norm(string name, Value x, Value dx, bool adds, Value dy, int features)
    {
        var (w, y) = (_weights[$"{name}.weight"], Value.Tokens(_seq, features));
        var eps = Attributes(KernelId.RmsNorm);
        var part = adds ? Scratch("norm", features) : dx;
        var grad = Value.Cell(DType.Float32, false, features);
        grad.Fill();
        var forward = new Call(KernelId.RmsNorm, eps, [x.Slot, w.Slot], [y.Slot]);
        var ofX = new Call(KernelId.RmsNormGradX, eps, [dy.Slot, x.Slot, w.Slot], [part.Slot]);
        var ofW = new Call(KernelId.RmsNormGradW, eps, [dy.Slot, x.Slot], [grad]);
        _forward.Add(forward.Run);
        _backward.Add(() =>
        {
            ofW.Run();
            Add(w.G, grad.Tensor);
            ofX.Run();
            if (adds)
                Add(dx.M, part.M);
        });
        return y;
    }

    private void Calls(List<System.Action> to, KernelId id, IReadOnlyList<Attribute> attributes, SlotValue[] inputs, params SlotValue[] outputs)
        => to.Add(new Call(id, attributes, inputs, outputs).Run);

    /// <summary>x + y W^T. The gradient of the residual stream is one buffer, which stays.</summary>
    private Value Residual(string name, Value x, Value y, Value dy, Value d, Value? more = null)
    {
        var (w, sum) = (_weights[$"{name}.weight"], Value.Tokens(_seq, _c.HiddenSize));
        _forward.Add(() =>
        {
            sum.M.copy_(x.M);
            if (more is not null)
                Add(sum.M, more.M);
            Product(sum.M, y.M, w.Wt, 1);
        });
        _backward.Add(() =>
        {
            Product(w.G, d.Mt, y.M, 1);
            Product(dy.M, d.M, w.W, 0);
        });
        return sum;
    }

    private void Weights(IReadOnlyDictionary<string, Tensor> initial)
    {
        foreach (var group in _plan.Parameters.Where(p => p.Update.IsAdamW).GroupBy(p => p.Update))
        {
            long size = group.Sum(p => p.Extents.Aggregate(1L, (n, e) => n * e)), at = 0;
            Tensor value = zeros(size), grad = zeros(size);
            foreach (var p in group)
            {
                var count = p.Extents.Aggregate(1L, (n, e) => n * e);
                var inputs = p.Name.EndsWith("o_proj.weight", StringComparison.Ordinal) ? count / p.Extents[0] : p.Extents[^1];
                var (mine, its) = (value.narrow(0, at, count), grad.narrow(0, at, count));
                using var flat = initial[p.Name].view(-1);
                mine.copy_(flat);
                _weights[p.Name] = new Weight(mine, its, [.. p.Extents], inputs);
                at += count;
            }

            _zeroed.Add(grad);
            _groups.Add((Cell(value), Cell(grad), Cell(zeros(size)), Cell(zeros(size)), ((Update.AdamW)group.Key).Decay));
        }

        _zeroed.Add(_loss);
        _zeroed.Add(_mtpLoss);
        foreach (var p in _plan.Parameters.Where(p => p.Update.IsRouterBias))
        {
            var counts = Value.Cell(DType.Int64, false, p.Extents[0]);
            var bias = Value.Cell(DType.Float32, false, p.Extents[0]);
            bias.AdoptCopy(initial[p.Name]);
            _zeroed.Add(counts.Fill());
            counts.Tensor.zero_();
            _biases[p.Name] = (bias, counts);
        }

        var (sum, scale) = (Scalar(), Scalar());
        Calls(_update, KernelId.SumSquares, [], [.. _groups.Select(g => g.Grad)], sum);
        Calls(_update, KernelId.ClipScale, Attributes(KernelId.ClipScale), [sum], _norm, scale);
        foreach (var g in _groups)
        {
            IReadOnlyList<Attribute> constants = [.. Attributes(KernelId.AdamW).Take(3), g.Decay ? Decay() : Attribute.NewFloat(0)];
            Calls(_update, KernelId.AdamW, constants, [g.Grad, scale, _rate, _step], g.Value, g.M, g.V, g.Value);
        }

        foreach (var (bias, counts) in _biases.Values)
            Calls(_update, KernelId.RouterBias, Attributes(KernelId.RouterBias), [counts], bias);

        static SlotValue Cell(Tensor flat)
        {
            var cell = Value.Cell(DType.Float32, false, (int)flat.numel());
            cell.Adopt(flat);
            return cell;
        }
    }

    private Attribute Decay()
        => Enumerable.Range(0, 2).Select(i => Attributes(KernelId.AdamW, i)[3]).First(a => ((Attribute.Float)a).Value != 0);

    private readonly List<(SlotValue Value, SlotValue Grad, SlotValue M, SlotValue V, bool Decay)> _groups = [];
    private readonly Dictionary<string, (SlotValue Bias, SlotValue Counts)> _biases = [];
}

// What the direct step computes on: buffers that are allocated once, weights in one flat tensor, kernels made ready to call.
using DeepSeekGraph;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using Attribute = DeepSeekGraph.Attribute;
using Tensor = TorchSharp.torch.Tensor;

namespace Benchmarks;

/// <summary>An activation or gradient of fixed size: a slot for the product's kernels, a matrix [rows, features] for TorchSharp.</summary>
internal sealed class Value
{
    public Value(SlotValue slot, long rows)
    {
        Slot = slot;
        M = slot.Tensor.view(rows, -1);
        Mt = M.t();
    }

    public SlotValue Slot { get; }

    public Tensor M { get; }

    /// <summary>The same memory as [features, rows].</summary>
    public Tensor Mt { get; }

    /// <summary>[1, seq, features...].</summary>
    public static Value Tokens(int seq, params int[] features) => Of(DType.Float32, false, [1, seq, .. features], seq, -1);

    /// <summary>[rows, features...] of routed tokens; each token has `rows / seq` of them.</summary>
    public static Value Rows(int seq, int experts, int rows, params int[] features)
        => Of(DType.Float32, true, [1, seq, experts, .. features], rows, rows);

    /// <summary>[1, heads, seq].</summary>
    public static Value Heads(int heads, int seq) => Of(DType.Float32, false, [1, heads, seq], heads, -1);

    /// <summary>An empty cell.</summary>
    public static SlotValue Cell(DType type, bool routed, params int[] extents)
        => new(new SlotInfo(
            0, "direct", SlotKind.Temporary, type, [.. extents.Select((_, i) => $"d{i}")], extents, routed, 1, 1, []));

    private static Value Of(DType type, bool routed, int[] extents, long rows, int stored)
    {
        var slot = Cell(type, routed, extents);
        slot.Fill(stored);
        return new Value(slot, rows);
    }
}

/// <summary>A weight and its gradient, views of flat tensors.</summary>
internal sealed class Weight
{
    public Weight(Tensor value, Tensor grad, int[] extents, long inputs)
    {
        Slot = Value.Cell(DType.Float32, false, extents);
        Slot.Adopt(value.view([.. extents.Select(e => (long)e)]));
        W = value.view(-1, inputs);
        Wt = W.t();
        G = grad.view(-1, inputs);
        var experts = extents[0];
        Experts = [.. Enumerable.Range(0, experts).Select(e => extents.Length > 2 ? grad.view(experts, -1, inputs).select(0, e) : G)];
    }

    public SlotValue Slot { get; }

    /// <summary>[outputs, inputs], and as [inputs, outputs].</summary>
    public Tensor W { get; }

    public Tensor Wt { get; }

    /// <summary>The gradient as [outputs, inputs]; of weights of experts, also one by one.</summary>
    public Tensor G { get; }

    public Tensor[] Experts { get; }
}

/// <summary>A kernel of the product with its operands, ready to call again and again.</summary>
internal sealed class Call(KernelId id, IReadOnlyList<Attribute> attributes, SlotValue[] inputs, SlotValue[] outputs)
{
    private static readonly RankContext Alone = new(0, 0, [], []);
    private readonly Kernel _kernel = KernelTable.Cpu[id].Run;

    public void Run() => _kernel(new KernelCall(attributes, inputs, outputs, Alone));
}

// Operands of the benchmarks: normal numbers by a fixed seed, and attributes.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Benchmarks;

internal static class Values
{
    public static SlotValue Slot(DType dtype, bool routed, MemoryMeter? meter, params int[] extents)
        => new(
            new SlotInfo(
                0,
                "value",
                SlotKind.Temporary,
                dtype,
                [.. Enumerable.Range(0, extents.Length).Select(d => $"d{d}")],
                extents,
                routed,
                1,
                1,
                []),
            meter);

    public static SlotValue Normal(double deviation, params int[] extents)
    {
        var slot = Slot(DType.Float32, false, null, extents);
        slot.Fill().normal_(0, deviation);
        return slot;
    }

    public static SlotValue Ids(int below, params int[] extents)
    {
        var slot = Slot(DType.Int64, false, null, extents);
        slot.Fill().random_(0, below);
        return slot;
    }

    public static SlotValue Iota(int extent)
    {
        var slot = Slot(DType.Int64, false, null, extent);
        KernelTable.Run(KernelId.Iota, [Ints()], [], [slot], new RankContext(0, 0, [], []));
        return slot;
    }

    public static SlotValue Ones(params int[] extents)
    {
        var slot = Slot(DType.Float32, false, null, extents);
        slot.Fill().fill_(1);
        return slot;
    }

    public static Attribute Int(long value) => Attribute.NewInt(value);

    public static Attribute Float(double value) => Attribute.NewFloat(value);

    public static Attribute Text(string value) => Attribute.NewText(value);

    public static Attribute Ints(params long[] values) => Attribute.NewInts(values);
}

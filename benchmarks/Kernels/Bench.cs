// Slots and launches as a plan has them, outside a plan: results are allocated where they are made and freed when read.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Benchmarks;

/// One way to compute something: kernels in order. Slots made inside are freed at the end at the latest.
internal sealed class Run : IDisposable
{
    private static readonly RankContext Alone = new(0, 0, [], []);
    private readonly List<SlotValue> _slots = [];

    /// Bytes of the slots made inside; what kernels allocate and free again is not counted.
    public MemoryMeter Meter { get; } = new();

    public SlotValue Slot(DType dtype, params int[] extents)
    {
        var slot = Values.Slot(dtype, false, Meter, extents);
        _slots.Add(slot);
        return slot;
    }

    public SlotValue Floats(params int[] extents) => Slot(DType.Float32, extents);

    public SlotValue Rows(params int[] extents)
    {
        var slot = Values.Slot(DType.Float32, true, Meter, extents);
        _slots.Add(slot);
        return slot;
    }

    /// Launches a kernel with one result.
    public SlotValue One(KernelId id, SlotValue result, Attribute[] attributes, params SlotValue[] inputs)
    {
        KernelTable.Run(id, attributes, inputs, [result], Alone);
        return result;
    }

    public void All(KernelId id, SlotValue[] results, Attribute[] attributes, params SlotValue[] inputs)
        => KernelTable.Run(id, attributes, inputs, results, Alone);

    public void Dispose()
    {
        foreach (var slot in _slots)
            slot.Dispose();
    }
}

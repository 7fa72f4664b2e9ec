// A copy of what one rank stores of its state, taken between two steps and written during the next ones.

using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// Holds as much memory as the rank's file has bytes, until Dispose.
internal sealed unsafe class StateCopy : IDisposable
{
    private readonly Dictionary<string, (long At, long Bytes)> _places = new(StringComparer.Ordinal);
    private byte* _memory;

    public StateCopy(IEnumerable<StateSlot> slots)
    {
        var at = 0L;
        foreach (var slot in slots)
        {
            var bytes = slot.Block.Aggregate((long)slot.DType.Bytes, (n, extent) => n * extent);
            _places.Add(slot.Name, (at, bytes));
            at += bytes;
        }

        _memory = (byte*)NativeMemory.Alloc((nuint)at);
    }

    /// Copies a slot's elements.
    public void Take(string name, SlotValue value)
    {
        var (at, bytes) = _places[name];
        using var host = value.Tensor.OnHost();
        Buffer.MemoryCopy(host.Pointer(), _memory + at, bytes, bytes);
    }

    /// Where a slot's elements lie, in the processor's memory.
    public static nint MemoryOf(SlotValue value) => (nint)value.Tensor.Pointer();

    /// The copy of a slot.
    public nint Of(string name) => (nint)(_memory + _places[name].At);

    public void Dispose()
    {
        NativeMemory.Free(_memory);
        _memory = null;
    }
}

// Typed pointers to what a kernel reads and writes, converted on the way where element types differ.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>An input as a pointer of the wanted element type; a converted copy is freed on Dispose.</summary>
internal readonly unsafe ref struct Operand
{
    public readonly void* P;
    private readonly Tensor? _copy;

    public Operand(Tensor tensor, ScalarType type)
    {
        _copy = tensor.dtype == type ? null : tensor.to_type(type);
        P = (_copy ?? tensor).Pointer();
    }

    /// <summary>As fp32.</summary>
    public static Operand Float(Tensor tensor) => new(tensor, ScalarType.Float32);

    public float* Floats => (float*)P;

    public void Dispose() => _copy?.Dispose();
}

/// <summary>An output as a pointer of the wanted element type; converted into the slot on Dispose where they differ.</summary>
internal readonly unsafe ref struct Result
{
    public readonly void* P;
    private readonly SlotValue _slot;
    private readonly Tensor? _copy;

    public Result(SlotValue slot, ScalarType type, int rows = -1)
    {
        _slot = slot;
        var tensor = slot.Fill(rows);
        Count = tensor.numel();
        _copy = tensor.dtype == type ? null : empty(tensor.shape, dtype: type);
        P = (_copy ?? tensor).Pointer();
    }

    /// <summary>Elements.</summary>
    public long Count { get; }

    public float* Floats => (float*)P;

    public void Dispose()
    {
        if (_copy is null)
            return;
        _slot.AdoptCopy(_copy);
        _copy.Dispose();
    }
}

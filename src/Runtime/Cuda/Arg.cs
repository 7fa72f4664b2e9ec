// Arguments of our kernels, and their launch on the device that the calling thread has entered.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>One argument of a kernel: a pointer, an integer or a number, in the first bytes of eight.</summary>
internal readonly struct Arg
{
    private readonly ulong _bits;

    private Arg(ulong bits) => _bits = bits;

    public static unsafe implicit operator Arg(Tensor? tensor) => new(tensor is null ? 0 : (ulong)tensor.Pointer());

    public static implicit operator Arg(long value) => new((ulong)value);

    public static implicit operator Arg(int value) => new((uint)value);

    public static implicit operator Arg(bool value) => new(value ? 1u : 0u);

    public static implicit operator Arg(float value) => new(BitConverter.SingleToUInt32Bits(value));

    public static implicit operator Arg(double value) => new(BitConverter.DoubleToUInt64Bits(value));

    /// <summary>As the driver takes it.</summary>
    public ulong Bits => _bits;
}

/// <summary>Launches by source and name.</summary>
internal static class Gpu
{
    private const long MostBlocks = 1 << 20;

    [ThreadStatic]
    private static int current;

    /// <summary>The device that the calling thread has entered.</summary>
    public static int Current
    {
        get => current - 1;
        set => current = value + 1;
    }

    /// <summary>A block of `threads` for each piece of work; kernels loop where there are more pieces than blocks.</summary>
    public static void Launch(string source, string name, long blocks, int threads, params ReadOnlySpan<Arg> arguments)
        => LaunchGrid(source, name, blocks, 1, threads, 0, arguments);

    /// <summary>The same on a stream beside stream 0.</summary>
    public static void LaunchOn(nint stream, string source, string name, long blocks, int threads, params ReadOnlySpan<Arg> arguments)
        => LaunchOn(stream, source, name, blocks, 1, threads, 0, arguments);

    /// <summary>A grid of blocks by rows, each with some shared memory.</summary>
    public static void LaunchGrid(string source, string name, long blocks, long rows, int threads, int shared, params ReadOnlySpan<Arg> arguments)
        => LaunchOn(0, source, name, blocks, rows, threads, shared, arguments);

    private static void LaunchOn(
        nint stream, string source, string name, long blocks, long rows, int threads, int shared, ReadOnlySpan<Arg> arguments)
    {
        if (blocks <= 0 || rows <= 0)
            return;
        Span<ulong> bits = stackalloc ulong[arguments.Length];
        for (var i = 0; i < bits.Length; i++)
            bits[i] = arguments[i].Bits;
        var function = DeviceModule.Kernel(Current, source, name);
        if (shared > 48 << 10)
            Driver.AllowShared(function, shared);
        Driver.Launch(function, (uint)Math.Min(blocks, MostBlocks), (uint)rows, (uint)threads, (uint)shared, stream, bits);
    }

    /// <summary>Blocks of 256 threads for n elements, eight a thread if `vector`.</summary>
    public static long Blocks(long n, bool vector = false) => ((vector ? n / 8 : n) + 255) / 256;

    /// <summary>Threads for a row of n elements, eight a thread if `vector`.</summary>
    public static int Threads(long n, bool vector) => (int)Math.Clamp(((vector ? n / 8 : n) + 31) / 32 * 32, 32, 256);

    /// <summary>f32 or bf16, as kernels are named.</summary>
    public static string Type(Tensor tensor) => Type(tensor.dtype);

    /// <summary>f32 or bf16, as kernels are named.</summary>
    public static string Type(ScalarType type)
        => type switch
        {
            ScalarType.Float32 => "f32",
            ScalarType.BFloat16 => "bf16",
            _ => throw new InvalidOperationException($"no GPU kernel for elements of type {type}"),
        };

    public static bool IsBFloat16(Tensor tensor) => tensor.dtype == ScalarType.BFloat16;

    /// <summary>The tensor in a type: itself under another handle, or a converted copy; the caller disposes it.</summary>
    public static Tensor As(Tensor tensor, ScalarType type) => tensor.dtype == type ? tensor.alias() : tensor.to_type(type);

    /// <summary>In fp32.</summary>
    public static Tensor Float(Tensor tensor) => As(tensor, ScalarType.Float32);

    /// <summary>A tensor beside another one on its device.</summary>
    public static Tensor Empty(Tensor beside, ScalarType type, params ReadOnlySpan<long> shape) => empty([.. shape], dtype: type, device: beside.device);
}

/// <summary>An output as a tensor of the wanted type; converted into the slot on Dispose where they differ.</summary>
internal readonly ref struct Target
{
    private readonly SlotValue _slot;
    private readonly Tensor? _copy;
    private readonly Tensor _own;

    public Target(SlotValue slot, ScalarType type, int rows = -1)
    {
        _slot = slot;
        _own = slot.Fill(rows);
        _copy = _own.dtype == type ? null : empty(_own.shape, dtype: type, device: _own.device);
    }

    public Tensor Tensor => _copy ?? _own;

    public void Dispose()
    {
        if (_copy is null)
            return;
        _own.copy_(_copy).On(_own);
        _copy.Dispose();
    }
}

// The element type in which matrix products run on this machine.
using System.Runtime.Intrinsics.X86;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static class Products
{
    /// <summary>True where the processor multiplies bf16 itself; elsewhere the library's bf16 products are 20 to 60 times slower than fp32.</summary>
    public static readonly bool MultipliesBFloat16 = HasBFloat16();

    /// <summary>bf16 where all three are bf16 and the machine multiplies it, else fp32 with one rounding at the end.</summary>
    public static ScalarType TypeOf(ScalarType a, ScalarType b, ScalarType result)
        => a == ScalarType.BFloat16 && b == a && result == a && MultipliesBFloat16 ? a : ScalarType.Float32;

    /// <summary>A copy in the wanted type, or null when the tensor has it.</summary>
    public static Tensor? Wide(Tensor tensor, ScalarType type) => tensor.dtype == type ? null : tensor.to_type(type);

    /// <summary>Some rows of a matrix in fp32: a view, or a copy; the caller disposes it.</summary>
    public static Tensor WideRows(Tensor matrix, long first, long count)
    {
        var rows = matrix.narrow(0, first, count);
        if (rows.dtype == ScalarType.Float32)
            return rows;
        using var narrow = rows;
        return narrow.to_type(ScalarType.Float32);
    }

    /// <summary>AVX512-BF16 or AMX-BF16.</summary>
    private static bool HasBFloat16()
    {
        if (!Avx512F.IsSupported)
            return false;
        var (avx, _, _, _) = X86Base.CpuId(7, 1);
        var (_, _, _, amx) = X86Base.CpuId(7, 0);
        return (avx & (1 << 5)) != 0 || (amx & (1 << 22)) != 0;
    }
}

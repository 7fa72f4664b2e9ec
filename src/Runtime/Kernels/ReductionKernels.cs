// Sums and maxima over dims.
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static class ReductionKernels
{
    /// <summary>a -> out: fp32 inside for floats, i64 for integers and bools.</summary>
    public static void Sum(in KernelCall call)
    {
        var a = call.In(0);
        var dims = Dims(call);
        if (dims.Length == 0)
        {
            call.Out().AdoptCopy(a);
            return;
        }

        var inside = a.dtype is ScalarType.Float32 or ScalarType.BFloat16 ? ScalarType.Float32 : ScalarType.Int64;
        call.Out().Adopt(a.sum(dims, false, inside));
    }

    /// <summary>a -> out: the largest element; minus infinity over nothing.</summary>
    public static void Max(in KernelCall call)
    {
        var dims = Dims(call);
        if (dims.Length == 0)
            call.Out().AdoptCopy(call.In(0));
        else
            call.Out().Adopt(call.In(0).amax(dims));
    }

    private static long[] Dims(in KernelCall call)
    {
        var a = call.Inputs[0];
        var dims = new SortedSet<long>();
        foreach (var dim in call.Ints(0))
            dims.Add(a.StorageDim((int)dim));
        return [.. dims];
    }
}

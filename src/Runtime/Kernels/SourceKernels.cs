// Kernels without operands: constants and indices.
using DeepSeekGraph.Runtime.Memory;
using TorchSharp;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class SourceKernels
{
    /// <summary>-> out, every element the same.</summary>
    public static void Full(in KernelCall call)
    {
        var tensor = call.Out().Fill();
        using var value = (Scalar)call.Float(0);
        tensor.fill_(value).On(tensor);
    }

    /// <summary>-> out[n] i64: this rank's consecutive global indices.</summary>
    public static void Iota(in KernelCall call)
    {
        var tensor = call.Out().Fill();
        var n = tensor.numel();
        var first = call.Rank.BlockOf(call.Ints(0)) * n;
        var p = (long*)tensor.Pointer();
        for (long i = 0; i < n; i++)
            p[i] = first + i;
    }
}

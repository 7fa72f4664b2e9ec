// SwiGLU on a GPU; CUDA C++ in Gated.cu.
using DeepSeekGraph.Runtime.Kernels;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaGated
{
    /// <summary>x[... 2 f] -> y[... f].</summary>
    public static void SwiGlu(in KernelCall call) => Forward(call, null);

    /// <summary>x[... 2 f], p[...] -> y[... f].</summary>
    public static void SwiGluProbs(in KernelCall call)
    {
        using var p = Gpu.Float(call.In(1));
        Forward(call, p);
    }

    /// <summary>dy[... f], x[... 2 f] -> dx[... 2 f].</summary>
    public static void SwiGluGrad(in KernelCall call) => Backward(call, null, null);

    /// <summary>dy[... f], x[... 2 f], p[...] -> dx[... 2 f], dp[...].</summary>
    public static void SwiGluProbsGrad(in KernelCall call)
    {
        using var p = Gpu.Float(call.In(2));
        using var dp = new Target(call.Out(1), ScalarType.Float32, ElementwiseKernels.Rows(call.Inputs[1]));
        Backward(call, p, dp.Tensor);
    }

    private static void Forward(in KernelCall call, Tensor? p)
    {
        var x = call.In(0);
        var f = call.Out().Info.Extents[^1];
        using var y = new Target(call.Out(), x.dtype, ElementwiseKernels.Rows(call.Inputs[0]));
        var vector = f % 8 == 0;
        var rows = y.Tensor.numel() / f;
        Gpu.Launch("Gated", "swiglu_" + Gpu.Type(x), rows, Gpu.Threads(f, vector), x, p, y.Tensor, rows, f, vector);
    }

    private static void Backward(in KernelCall call, Tensor? p, Tensor? dp)
    {
        var x = call.In(1);
        var f = call.Inputs[0].Info.Extents[^1];
        using var dy = Gpu.As(call.In(0), x.dtype);
        using var dx = new Target(call.Out(0), x.dtype, ElementwiseKernels.Rows(call.Inputs[1]));
        var vector = f % 8 == 0;
        var rows = dx.Tensor.numel() / (2 * f);
        Gpu.Launch("Gated", "swiglu_grad_" + Gpu.Type(x), rows, Gpu.Threads(f, vector), dy, x, p, dx.Tensor, dp, rows, f, vector);
    }
}

// RMSNorm and its gradients on a GPU; CUDA C++ in Norm.cu.
using DeepSeekGraph.Runtime.Kernels;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaNorm
{
    /// <summary>Rows whose products one block of the weight's gradient sums.</summary>
    private const int Chunk = 128;

    /// <summary>x, w -> y.</summary>
    public static void RmsNorm(in KernelCall call)
    {
        using var y = new Target(call.Out(), call.In(0).dtype, ElementwiseKernels.Rows(call.Inputs[0]));
        Forward(call, null, call.In(1), null, y.Tensor);
    }

    /// <summary>x, r, w -> x + r, its norm.</summary>
    public static void AddRmsNorm(in KernelCall call)
    {
        var x = call.In(0);
        using var r = Gpu.As(call.In(1), x.dtype);
        using var sum = new Target(call.Out(0), x.dtype, ElementwiseKernels.Rows(call.Inputs[0]));
        using var y = new Target(call.Out(1), x.dtype, ElementwiseKernels.Rows(call.Inputs[0]));
        Forward(call, r, call.In(2), sum.Tensor, y.Tensor);
    }

    /// <summary>dy, x, w -> dx.</summary>
    public static void RmsNormGradX(in KernelCall call) => GradX(call, null);

    /// <summary>dy, x, w, c -> dx + c, rounded once.</summary>
    public static void RmsNormGradXAdd(in KernelCall call)
    {
        using var c = Gpu.As(call.In(3), call.In(1).dtype);
        GradX(call, c);
    }

    /// <summary>dy, x -> dw: rows are summed in chunks, and chunks in order.</summary>
    public static void RmsNormGradW(in KernelCall call)
    {
        var x = call.In(1);
        var n = (int)x.shape[^1];
        var rows = n == 0 ? 0 : x.numel() / n;
        var dw = call.Out().Fill();
        using var dy = Gpu.As(call.In(0), x.dtype);
        var vector = n % 8 == 0;
        var chunks = (int)Math.Max(1, (rows + Chunk - 1) / Chunk);
        using var rates = Gpu.Empty(x, ScalarType.Float32, Math.Max(1, rows));
        using var part = Gpu.Empty(x, ScalarType.Float32, chunks, n);
        Gpu.Launch("Norm", "norm_rates_" + Gpu.Type(x), rows, Gpu.Threads(n, vector), x, rates, rows, n, (float)call.Float(0), vector);
        Gpu.LaunchGrid("Norm", "norm_grad_w_" + Gpu.Type(x), (n + 31) / 32, chunks, 256, 0, dy, x, rates, part, rows, n, Chunk);
        Gpu.Launch("Norm", "columns", Gpu.Blocks(n), 256, part, dw, Gpu.IsBFloat16(dw), chunks, n);
    }

    private static void Forward(in KernelCall call, Tensor? r, Tensor w, Tensor? sum, Tensor y)
    {
        var x = call.In(0);
        var n = (int)x.shape[^1];
        var rows = n == 0 ? 0 : x.numel() / n;
        var vector = n % 8 == 0;
        Gpu.Launch(
            "Norm", "norm_" + Gpu.Type(x), rows, Gpu.Threads(n, vector), x, r, w, !Gpu.IsBFloat16(w), sum, y, rows, n, (float)call.Float(0), vector);
    }

    private static void GradX(in KernelCall call, Tensor? c)
    {
        Tensor x = call.In(1), w = call.In(2);
        var n = (int)x.shape[^1];
        var rows = n == 0 ? 0 : x.numel() / n;
        var vector = n % 8 == 0;
        using var dy = Gpu.As(call.In(0), x.dtype);
        using var dx = new Target(call.Out(), x.dtype, ElementwiseKernels.Rows(call.Inputs[1]));
        Gpu.Launch(
            "Norm", "norm_grad_x_" + Gpu.Type(x), rows, Gpu.Threads(n, vector), dy, x, w, !Gpu.IsBFloat16(w), c, dx.Tensor, rows, n, (float)call.Float(0), vector);
    }
}

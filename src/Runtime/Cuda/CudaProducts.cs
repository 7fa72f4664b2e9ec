// Matrix products on a GPU: bf16 with fp32 sums inside, fp32 exact. Grouped ones, as the plan says, by the library or by Grouped.cu.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaProducts
{
    /// <summary>a, b -> out by a spec; two bf16 operands are multiplied as such, whatever the result's type.</summary>
    public static void Contract(in KernelCall call)
    {
        var narrow = Gpu.IsBFloat16(call.In(0)) && Gpu.IsBFloat16(call.In(1));
        if (narrow && call.Out().ScalarType == ScalarType.Float32)
            ContractionKernels.Contract(call, ScalarType.BFloat16, static (a, b) => a.dim() == 2 ? Aten.MmWide(a, b) : Batched(a, b));
        else
            ContractionKernels.Contract(call, narrow ? ScalarType.BFloat16 : ScalarType.Float32, static (a, b) => a.dim() == 2 ? a.mm(b) : a.bmm(b));
    }

    /// <summary>x[rows k], w[E n k], route -> out[rows n]; transposed: w[E k n]. Trailing dims are merged. The library multiplies no matrix without rows.</summary>
    public static void GroupedMatMul(in KernelCall call)
    {
        var route = call.Inputs[2].DeviceRows;
        var transposed = call.Int(0) != 0;
        var slot = call.Out();
        using var x = Matrix(call.In(0), route);
        using var w = Bank(call.In(1), route.Experts, transposed ? -1 : x.shape[1], transposed ? x.shape[1] : -1);
        long k = x.shape[1], n = transposed ? w.shape[2] : w.shape[1];
        if (CudaPath.IsLibrary(call, KernelId.GroupedMatMul, 1))
        {
            if (route.Rows == 0)
            {
                slot.Fill(0);
                return;
            }

            using var turned = transposed ? w.alias() : w.transpose(1, 2);
            using var result = Aten.GroupedMm(x, turned, route.Ends);
            slot.Adopt(result.view([route.Rows, .. slot.Info.Extents.Skip(3).Select(e => (long)e)]));
            return;
        }

        var target = slot.Fill(route.Rows);
        var (left, right) = Alike(x, w);
        using (left)
        using (right)
        {
            Gpu.LaunchGrid(
                "Grouped", "grouped_" + Gpu.Type(left), (n + 31) / 32, Math.Clamp((route.Rows + 31) / 32, 1, 256), 256, 0, left, right, route.Offsets, target,
                Gpu.IsBFloat16(target), route.Experts, (int)n, (int)k, transposed);
        }

        if (route.Padding > 1)
            Gpu.Launch("Grouped", "clear_padding", route.Experts, 256, target, route.Counts, route.Offsets, n * TensorMemory.Width(target.dtype));
    }

    /// <summary>dy[rows n], x[rows k], route -> dw[E n k]; zero for experts without rows.</summary>
    public static void GroupedWeightGrad(in KernelCall call)
    {
        var route = call.Inputs[2].DeviceRows;
        var slot = call.Out();
        using var dy = Matrix(call.In(0), route);
        using var x = Matrix(call.In(1), route);
        long n = dy.shape[1], k = x.shape[1];
        if (CudaPath.IsLibrary(call, KernelId.GroupedWeightGrad, 0))
        {
            if (route.Rows == 0)
            {
                var zeros = slot.Fill();
                zeros.zero_().On(zeros);
                return;
            }

            using var turned = dy.t();
            using var result = Aten.GroupedMm(turned, x, route.Ends);
            slot.Adopt(result.view([.. slot.Info.Extents.Select(e => (long)e)]));
            return;
        }

        var target = slot.Fill();
        var (left, right) = Alike(dy, x);
        using (left)
        using (right)
        {
            Gpu.LaunchGrid(
                "Grouped", "grouped_grad_" + Gpu.Type(left), (n + 31) / 32 * ((k + 31) / 32), route.Experts, 256, 0, left, right, route.Offsets, target,
                Gpu.IsBFloat16(target), (int)n, (int)k, false);
        }
    }

    private static Tensor Batched(Tensor a, Tensor b)
    {
        using var wideA = a.to_type(ScalarType.Float32);
        using var wideB = b.to_type(ScalarType.Float32);
        return wideA.bmm(wideB);
    }

    private static Tensor Matrix(Tensor rows, DeviceRows route)
        => rows.shape[0] == route.Rows
            ? rows.view(route.Rows, rows.shape.AsSpan(1).ToArray().Aggregate(1L, (n, e) => n * e))
            : throw new InvalidOperationException($"{rows.shape[0]} rows, but the row set says {route.Rows}");

    /// <summary>[E n k] with trailing or middle dims merged: the given one is known, the other follows.</summary>
    private static Tensor Bank(Tensor w, int experts, long last, long middle)
        => last >= 0 ? w.view(experts, -1, last) : w.view(experts, middle, -1);

    /// <summary>Both in one type; the caller disposes them.</summary>
    private static (Tensor Left, Tensor Right) Alike(Tensor a, Tensor b)
    {
        var type = Gpu.IsBFloat16(a) && Gpu.IsBFloat16(b) ? ScalarType.BFloat16 : ScalarType.Float32;
        return (Gpu.As(a, type), Gpu.As(b, type));
    }
}

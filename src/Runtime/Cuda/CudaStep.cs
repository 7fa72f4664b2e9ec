// Once-a-step kernels on a GPU; CUDA C++ in Elementwise.cu and Optimizer.cu. Nothing of them is read by the host.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaStep
{
    /// <summary>Blocks that sum squares: a fixed number, so that the order of sums is.</summary>
    private const int Parts = 1024;

    /// <summary>-> out: zeros; a gradient only counts as zero until the first sum overwrites it.</summary>
    public static void Zero(in KernelCall call)
    {
        if (call.Out().Info.Kind.IsGradient)
        {
            call.Out().SetZero();
            return;
        }

        var target = call.Out().Fill();
        target.zero_().On(target);
    }

    /// <summary>a -> out: out += a in fp32. The first sum of a gradient takes over the storage of a value that nobody reads again.</summary>
    public static void Accumulate(in KernelCall call)
    {
        var (from, slot) = (call.Inputs[0], call.Out());
        if (slot.TakeFirst(from))
            return;
        Tensor a = from.Tensor, target = slot.ToAddTo(out var fresh);
        if (!a.is_floating_point())
        {
            if (fresh)
                target.zero_().On(target);
            target.add_(a, Scalars.One).On(target);
            return;
        }

        var n = target.numel();
        if (a.numel() != n)
            throw new InvalidOperationException($"{a.numel()} elements do not add to {n}");
        var vector = n % 8 == 0;
        Gpu.Launch("Elementwise", $"accumulate_{Gpu.Type(a)}_{Gpu.Type(target)}", Gpu.Blocks(n, vector), 256, a, target, n, fresh, vector);
    }

    /// <summary>g1, ..., gn -> out[]: sum of squares, fp64 from run to run.</summary>
    public static void SumSquares(in KernelCall call)
    {
        using var result = new Target(call.Out(), ScalarType.Float32);
        var count = call.Inputs.Length;
        using var parts = Gpu.Empty(result.Tensor, ScalarType.Float64, count, Parts);
        parts.zero_().On(parts);
        for (var i = 0; i < count; i++)
        {
            var g = call.In(i);
            using var part = parts.select(0, i);
            var n = g.numel();
            var vector = n % 8 == 0;
            Gpu.Launch("Optimizer", "squares", Math.Min(Parts, Gpu.Blocks(n, vector)), 256, g, Gpu.IsBFloat16(g), n, part, vector);
        }

        Gpu.Launch("Optimizer", "squares_total", 1, 256, parts, (long)count * Parts, result.Tensor);
    }

    /// <summary>sumsq[] -> norm[], scale[] = min(1, maxNorm / (norm + 1e-6)).</summary>
    public static void ClipScale(in KernelCall call)
    {
        using var squares = Gpu.Float(call.In(0));
        using var norm = new Target(call.Out(0), ScalarType.Float32);
        using var scale = new Target(call.Out(1), ScalarType.Float32);
        Gpu.Launch("Optimizer", "clip_scale", 1, 1, squares, norm.Tensor, scale.Tensor, call.Float(0));
    }

    /// <summary>grad, scale[], lr[], step[] (, weight) -> master or remainder, m, v, param; one pass.</summary>
    public static void AdamW(in KernelCall call)
    {
        var param = call.Out(3).Fill();
        Tensor g = call.In(0), master = call.Out(0).Tensor, m = call.Out(1).Tensor, v = call.Out(2).Tensor;
        using var scale = Gpu.Float(call.In(1));
        using var rate = Gpu.Float(call.In(2));
        using var step = Gpu.Float(call.In(3));
        var n = master.numel();
        var weight = call.Inputs.Length == 5 ? call.In(4) : null;
        if (g.numel() != n || master.dtype != (weight is null ? ScalarType.Float32 : ScalarType.Int16) || (weight is not null && weight.numel() != n))
            throw new InvalidOperationException("AdamW needs a master, and a weight beside a remainder, of its gradient's size");
        var vector = n % 8 == 0;
        var states = string.Concat("adam_", Letter(g), Letter(m), Letter(v));
        if (weight is not null)
        {
            Gpu.Launch(
                "Optimizer", states + "h", Gpu.Blocks(n, vector), 256, g, master, m, v, weight, param, scale, rate, step, call.Float(0), call.Float(1),
                call.Float(2), call.Float(3), n, vector);
            return;
        }

        Gpu.Launch(
            "Optimizer", states + Letter(param), Gpu.Blocks(n, vector), 256, g, master, m, v, param, scale, rate, step, call.Float(0), call.Float(1), call.Float(2), call.Float(3), n,
            vector);
    }

    /// <summary>counts[e] -> bias[e] in place.</summary>
    public static void RouterBias(in KernelCall call)
    {
        var experts = (int)call.In(0).numel();
        Gpu.Launch("Optimizer", "router_bias", Gpu.Blocks(experts), 256, call.In(0), call.Out().Tensor, experts, (float)call.Float(0));
    }

    private static string Letter(Tensor tensor) => Gpu.IsBFloat16(tensor) ? "b" : "f";
}

// Rotary position embedding on a GPU; CUDA C++ in Rotary.cu.
using DeepSeekGraph.Runtime.Kernels;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaRotary
{
    /// <summary>positions[s] or [b s] -> table[..., rope]; frequencies are those of the processor's kernel.</summary>
    public static void RotaryTable(in KernelCall call)
    {
        var positions = call.In(0);
        var half = call.Int(0) / 2;
        float[] values = RotaryKernels.Frequencies(call.Int(0), call.Float(1), call.Float(2), call.Float(3), call.Float(4), call.Float(5));
        using var here = tensor(values);
        using var frequencies = here.to(positions.device);
        using var table = new Target(call.Out(), ScalarType.Float32);
        var n = positions.numel();
        Gpu.Launch("Rotary", "rotary_table", Gpu.Blocks(n * half), 256, positions, frequencies, table.Tensor, n, half, call.Float(6));
    }

    /// <summary>x[b s ... d], table -> x with the last `rope` features turned; Int inverse.</summary>
    public static void RotateLast(in KernelCall call)
    {
        Tensor x = call.In(0);
        using var table = Gpu.Float(call.In(1));
        var shape = x.shape;
        int d = (int)shape[^1], rope = (int)table.shape[^1];
        long tokens = shape[0] * shape[1], positions = table.shape.Length == 3 ? tokens : shape[1];
        var heads = tokens == 0 ? 0 : (int)(x.numel() / (tokens * d));
        // features that are not turned stay where they are, if the storage may
        var inPlace = call.Out().TakeOver(call.Inputs[0]);
        using var y = new Target(call.Out(), x.dtype);
        var vector = d % 8 == 0 && rope % 8 == 0;
        Gpu.Launch(
            "Rotary", "rope_last_" + Gpu.Type(x), tokens, Gpu.Threads((long)heads * d, vector), x, table, y.Tensor, tokens, heads, d, rope, positions,
            call.Int(0) != 0, inPlace, vector);
    }

    /// <summary>kv[b s n nope+v], kPe[b s rope], table -> k[b s n nope+rope], v[b s n v].</summary>
    public static void RopeKv(in KernelCall call)
    {
        var kv = call.In(0);
        using var kPe = Gpu.As(call.In(1), kv.dtype);
        using var table = Gpu.Float(call.In(2));
        using var k = new Target(call.Out(0), kv.dtype);
        using var v = new Target(call.Out(1), kv.dtype);
        var shape = kv.shape;
        int heads = (int)shape[2], rope = (int)table.shape[^1], nope = call.Int(0), value = (int)shape[3] - nope;
        var tokens = shape[0] * shape[1];
        var positions = table.shape.Length == 3 ? tokens : shape[1];
        var vector = nope % 8 == 0 && rope % 8 == 0 && value % 8 == 0;
        Gpu.LaunchGrid(
            "Rotary", "rope_kv_" + Gpu.Type(kv), tokens, 1, 256, rope * sizeof(float), kv, kPe, table, k.Tensor, v.Tensor, tokens, heads, nope, rope, value,
            positions, vector);
    }

    /// <summary>dk[b s n nope+rope], dv[b s n v], table -> dkv[b s n nope+v], dkPe[b s rope] summed over heads.</summary>
    public static void RopeKvGrad(in KernelCall call)
    {
        var dk = call.In(0);
        using var dv = Gpu.As(call.In(1), dk.dtype);
        using var table = Gpu.Float(call.In(2));
        using var dkv = new Target(call.Out(0), dk.dtype);
        using var dkPe = new Target(call.Out(1), dk.dtype);
        var shape = dk.shape;
        int heads = (int)shape[2], rope = (int)table.shape[^1], nope = call.Int(0), value = (int)dv.shape[3];
        var tokens = shape[0] * shape[1];
        var positions = table.shape.Length == 3 ? tokens : shape[1];
        var vector = nope % 8 == 0 && rope % 8 == 0 && value % 8 == 0;
        var parts = Math.Max(1, 256 / rope);
        Gpu.LaunchGrid(
            "Rotary", "rope_kv_grad_" + Gpu.Type(dk), tokens, 1, 256, rope * parts * sizeof(float), dk, dv, table, dkv.Tensor, dkPe.Tensor, tokens, heads, nope,
            rope, value, positions, vector);
    }
}

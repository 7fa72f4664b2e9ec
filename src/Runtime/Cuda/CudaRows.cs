// Routed rows on a GPU: their order, tokens to rows and back; CUDA C++ in Rows.cu. The host never learns how many rows there are.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaRows
{
    /// <summary>mask[b s e] -> route; Int topK: rows of a token at most. Without attributes (outside plans) the host waits for the count.</summary>
    public static void Route(in KernelCall call)
    {
        var mask = call.In(0);
        var experts = (int)mask.shape[^1];
        var tokens = (int)(mask.numel() / experts);
        var padding = call.Out().Info.Padding;
        var width = call.AttributeCount > 0 ? Math.Min(call.Int(0), experts) : experts;
        var counts = Gpu.Empty(mask, ScalarType.Int32, experts);
        var offsets = Gpu.Empty(mask, ScalarType.Int32, experts + 1);
        using var place = Gpu.Empty(mask, ScalarType.Int32, tokens, experts);
        Gpu.Launch("Rows", "route_places", experts, 256, mask, place, counts, tokens, experts);
        Gpu.Launch("Rows", "route_offsets", 1, 1, counts, offsets, experts, padding);
        var rows = padding == 1 ? checked(tokens * width) : checked(((tokens * width) + (experts * (padding - 1))) / padding * padding);
        if (call.AttributeCount == 0)
        {
            using var last = offsets.narrow(0, experts, 1);
            rows = last.item<int>();
        }

        var flat = Gpu.Empty(mask, ScalarType.Int32, rows);
        using (var none = (TorchSharp.Scalar)(-1L))
            flat.fill_(none).On(flat);
        var rowOf = Gpu.Empty(mask, ScalarType.Int32, tokens, width);
        Gpu.Launch("Rows", "route_rows", Gpu.Blocks(tokens), 256, mask, place, offsets, flat, rowOf, tokens, experts, width);
        call.Out().Adopt(new DeviceRows(rows, tokens, experts, width, padding, counts, offsets, flat, rowOf));
    }

    /// <summary>x[b s h], route -> rows[rows h].</summary>
    public static void Permute(in KernelCall call) => Gather(call, call.Inputs[1].DeviceRows);

    /// <summary>rows[rows h], route -> y[b s h]: each token gathers its rows.</summary>
    public static void Unpermute(in KernelCall call) => Combine(call, call.Inputs[1].DeviceRows);

    /// <summary>p[b s e], route -> rows[rows].</summary>
    public static void RouteProbs(in KernelCall call) => GatherProbs(call, call.Inputs[1].DeviceRows, 0, 0);

    /// <summary>r[rows], route -> p[b s e], zero where nothing is routed.</summary>
    public static void UnrouteProbs(in KernelCall call) => ScatterProbs(call, call.Inputs[1].DeviceRows, 0, 0);

    /// <summary>x[b s h], p[b s e], route -> rows[rows h], r[rows].</summary>
    public static void PermuteWithProbs(in KernelCall call)
    {
        Gather(call, call.Inputs[2].DeviceRows);
        GatherProbs(call, call.Inputs[2].DeviceRows, 1, 1);
    }

    /// <summary>rows[rows h], r[rows], route -> y[b s h], p[b s e].</summary>
    public static void UnpermuteWithProbs(in KernelCall call)
    {
        Combine(call, call.Inputs[2].DeviceRows);
        ScatterProbs(call, call.Inputs[2].DeviceRows, 1, 1);
    }

    private static void Gather(in KernelCall call, DeviceRows route)
    {
        var x = call.In(0);
        using var rows = new Target(call.Out(0), x.dtype, route.Rows);
        var bytes = route.Tokens == 0 ? 0 : x.ByteCount() / route.Tokens;
        var unit = bytes % 16 == 0 ? 16 : 2;
        var h = (int)(bytes / unit);
        Gpu.Launch("Rows", unit == 16 ? "permute16" : "permute2", route.Rows, Gpu.Threads(h, false), x, route.Flat, rows.Tensor, (long)route.Rows, h, route.Experts);
    }

    private static void Combine(in KernelCall call, DeviceRows route)
    {
        var rows = call.In(0);
        using var y = new Target(call.Out(0), rows.dtype);
        var h = route.Tokens == 0 ? 0 : (int)(y.Tensor.numel() / route.Tokens);
        var vector = h % 8 == 0;
        Gpu.Launch(
            "Rows", "unpermute_" + Gpu.Type(rows), route.Tokens, Gpu.Threads(h, vector), rows, route.RowOf, y.Tensor, (long)route.Tokens, h, route.Width, vector);
    }

    private static void GatherProbs(in KernelCall call, DeviceRows route, int input, int output)
    {
        using var p = Gpu.Float(call.In(input));
        using var rows = new Target(call.Out(output), ScalarType.Float32, route.Rows);
        Gpu.Launch("Rows", "route_probs", Gpu.Blocks(route.Rows), 256, p, route.Flat, rows.Tensor, (long)route.Rows);
    }

    private static void ScatterProbs(in KernelCall call, DeviceRows route, int input, int output)
    {
        using var rows = Gpu.Float(call.In(input));
        using var p = new Target(call.Out(output), ScalarType.Float32);
        p.Tensor.zero_().On(p.Tensor);
        Gpu.Launch("Rows", "unroute_probs", Gpu.Blocks(route.Rows), 256, rows, route.Flat, p.Tensor, (long)route.Rows);
    }
}

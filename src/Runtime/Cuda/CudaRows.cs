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
        var isInPlan = call.AttributeCount > 0;
        call.Out().Adopt(RowsOf(mask, isInPlan ? Math.Min(call.Int(0), experts) : experts, call.Out().Info.Padding, !isInPlan));
    }

    /// <summary>The rows of a mask [..., experts] in blocks of `padding`, as many as there may be, or (`exact`) as there are, for which the host waits.</summary>
    public static DeviceRows RowsOf(Tensor mask, int width, int padding, bool exact = false)
    {
        var experts = (int)mask.shape[^1];
        var tokens = (int)(mask.numel() / experts);
        var counts = Gpu.Empty(mask, ScalarType.Int32, experts);
        var offsets = Gpu.Empty(mask, ScalarType.Int32, experts + 1);
        using var place = Gpu.Empty(mask, ScalarType.Int32, tokens, experts);
        Gpu.Launch("Rows", "route_places", experts, 256, mask, place, counts, tokens, experts);
        Gpu.Launch("Rows", "route_offsets", 1, 1, counts, offsets, experts, padding);
        var rows = MostRows(tokens, experts, width, padding);
        if (exact)
        {
            using var last = offsets.narrow(0, experts, 1);
            rows = last.item<int>();
        }

        var flat = Gpu.Empty(mask, ScalarType.Int32, rows);
        using (var none = (TorchSharp.Scalar)(-1L))
            flat.fill_(none).On(flat);
        var rowOf = Gpu.Empty(mask, ScalarType.Int32, tokens, width);
        Gpu.Launch("Rows", "route_rows", Gpu.Blocks(tokens), 256, mask, place, offsets, flat, rowOf, tokens, experts, width);
        return new DeviceRows(rows, tokens, experts, width, padding, counts, offsets, flat, rowOf);
    }

    /// <summary>The rows of experts [first, first + count), in blocks of `padding`.</summary>
    public static DeviceRows Slice(DeviceRows route, int first, int count, int padding)
    {
        var known = route.Host?.SliceExperts(first, count, padding);
        if (!route.ByToken)
            return DeviceRows.ByExpert(Counted(known), route.Flat.device, static (values, tensor) => new CudaRowWork().FromHost(values, NcclLaunch.Address(tensor)));
        using var mask = zeros([route.Tokens, count], dtype: ScalarType.Byte, device: route.Flat.device);
        Gpu.Launch("Rows", "mask_of", Gpu.Blocks(route.Rows), 256, route.Flat, mask, (long)route.Rows, route.Experts, first, count);
        var made = RowsOf(mask, Math.Min(route.Width, count), padding);
        made.Host = known;
        return made;
    }

    /// <summary>The values of those rows, of which there are as many as their set has; zero where blocks are filled up.</summary>
    public static void Slice(Tensor rows, DeviceRows route, int first, int count, SlotValue output)
    {
        var padding = output.Info.Padding;
        var size = route.ByToken
            ? MostRows(route.Tokens, count, Math.Min(route.Width, count), padding)
            : Counted(route.Host).SliceExperts(first, count, padding).Rows;
        using var target = new Target(output, rows.dtype, size);
        using var counts = route.Counts.narrow(0, first, count);
        using var offsets = route.Offsets.narrow(0, first, count);
        using var into = Gpu.Empty(counts, ScalarType.Int32, count + 1);
        Gpu.Launch("Rows", "route_offsets", 1, 1, counts, into, count, padding);
        var bytes = Collectives.RowExchange.Width(rows);
        var unit = bytes % 16 == 0 ? 16 : 2;
        var h = (int)(bytes / unit);
        Gpu.LaunchGrid(
            "Rows", unit == 16 ? "slice16" : "slice2", count, Math.Clamp(size / count, 1, 1024), Gpu.Threads(h, false), 0, rows, counts, offsets, into,
            target.Tensor, h);
    }

    private static RowSet Counted(RowSet? known) => known ?? throw new InvalidOperationException("rows of other ranks that nobody counted");

    /// <summary>How many rows there may be, with those that fill up.</summary>
    public static int MostRows(int tokens, int experts, int width, int padding)
        => padding == 1 ? checked(tokens * width) : checked(((tokens * width) + (experts * (padding - 1))) / padding * padding);

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

    /// <summary>tokens[tokens h] -> rows[rows h] by flat = token * per + something; zero where it is -1.</summary>
    public static void Gather(Tensor tokens, Tensor flat, int per, Tensor rows)
    {
        var bytes = Collectives.RowExchange.Width(rows);
        var unit = bytes % 16 == 0 ? 16 : 2;
        var h = (int)(bytes / unit);
        var count = rows.shape[0];
        Gpu.Launch("Rows", unit == 16 ? "permute16" : "permute2", count, Gpu.Threads(h, false), tokens, flat, rows, count, h, per);
    }

    /// <summary>rows[rows h] -> tokens[... h] by rowOf[tokens width], which ends a token's rows with -1.</summary>
    public static void Sum(Tensor rows, Tensor rowOf, Tensor tokens)
    {
        var count = rowOf.shape[0];
        var h = count == 0 ? 0 : (int)(tokens.numel() / count);
        var vector = h % 8 == 0;
        Gpu.Launch(
            "Rows", "unpermute_" + Gpu.Type(rows), count, Gpu.Threads(h, vector), rows, rowOf, tokens, count, h, (int)rowOf.shape[1], vector);
    }

    /// <summary>p[tokens experts] -> rows[rows], fp32.</summary>
    public static void GatherOne(Tensor p, Tensor flat, Tensor rows)
        => Gpu.Launch("Rows", "route_probs", Gpu.Blocks(rows.numel()), 256, p, flat, rows, rows.numel());

    /// <summary>rows[rows] -> p[tokens experts], fp32, zero where nothing is routed.</summary>
    public static void ScatterOne(Tensor rows, Tensor flat, Tensor p)
    {
        p.zero_().On(p);
        Gpu.Launch("Rows", "unroute_probs", Gpu.Blocks(rows.numel()), 256, rows, flat, p, rows.numel());
    }

    private static void Gather(in KernelCall call, DeviceRows route)
    {
        using var rows = new Target(call.Out(0), call.In(0).dtype, route.Rows);
        Gather(call.In(0), route.Flat, route.Experts, rows.Tensor);
    }

    private static void Combine(in KernelCall call, DeviceRows route)
    {
        using var y = new Target(call.Out(0), call.In(0).dtype);
        Sum(call.In(0), route.RowOf, y.Tensor);
    }

    private static void GatherProbs(in KernelCall call, DeviceRows route, int input, int output)
    {
        using var p = Gpu.Float(call.In(input));
        using var rows = new Target(call.Out(output), ScalarType.Float32, route.Rows);
        GatherOne(p, route.Flat, rows.Tensor);
    }

    private static void ScatterProbs(in KernelCall call, DeviceRows route, int input, int output)
    {
        using var rows = Gpu.Float(call.In(input));
        using var p = new Target(call.Out(output), ScalarType.Float32);
        ScatterOne(rows, route.Flat, p.Tensor);
    }
}

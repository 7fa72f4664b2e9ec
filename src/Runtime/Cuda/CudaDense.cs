// Element by element on a GPU: sums of several operands, indices, blocks of a rank, rounding to fp8.
using DeepSeekGraph.Runtime.Kernels;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaDense
{
    private const int MostOperands = 8;

    /// <summary>-> out[n] i64: this rank's consecutive global indices.</summary>
    public static void Iota(in KernelCall call)
    {
        var target = call.Out().Fill();
        var n = target.numel();
        Gpu.Launch("Elementwise", "iota", Gpu.Blocks(n), 256, target, n, call.Rank.BlockOf(call.Ints(0)) * n);
    }

    /// <summary>a1, ..., an -> out; operands that lie alike are summed in fp32, in order, and rounded once.</summary>
    public static void Add(in KernelCall call)
    {
        var a = call.In(0);
        if (call.Inputs.Length is 1 or > MostOperands || !ElementwiseKernels.LieAlike(call) || a.dtype is not (ScalarType.Float32 or ScalarType.BFloat16))
        {
            ElementwiseKernels.AddWhole(call);
            return;
        }

        using var result = new Target(call.Out(), a.dtype, ElementwiseKernels.Rows(call.Inputs[0]));
        var n = result.Tensor.numel();
        var vector = n % 8 == 0;
        var operands = new Tensor[MostOperands];
        for (var i = 0; i < MostOperands; i++)
            operands[i] = Gpu.As(call.In(Math.Min(i, call.Inputs.Length - 1)), a.dtype);
        Gpu.Launch(
            "Elementwise", "add_" + Gpu.Type(a), Gpu.Blocks(n, vector), 256, result.Tensor, n, call.Inputs.Length, vector,
            operands[0], operands[1], operands[2], operands[3], operands[4], operands[5], operands[6], operands[7]);
        foreach (var operand in operands)
            operand.Dispose();
    }

    /// <summary>a -> out in the slot's element type.</summary>
    public static void Cast(in KernelCall call)
    {
        var (a, slot) = (call.In(0), call.Out());
        if (a.dtype == slot.ScalarType || !a.is_floating_point() || slot.ScalarType is not (ScalarType.Float32 or ScalarType.BFloat16))
        {
            ElementwiseKernels.Cast(call);
            return;
        }

        var target = slot.Fill(ElementwiseKernels.Rows(call.Inputs[0]));
        var n = a.numel();
        var vector = n % 8 == 0;
        Gpu.Launch("Elementwise", $"accumulate_{Gpu.Type(a)}_{Gpu.Type(target)}", Gpu.Blocks(n, vector), 256, a, target, n, true, vector);
    }

    /// <summary>a -> this rank's block of a dim; a route, or rows with their route as second operand, by experts (dim 2).</summary>
    public static void LocalSlice(in KernelCall call)
    {
        var isSet = call.Inputs[0].HoldsRows;
        if (!isSet && (!call.Inputs[0].Info.Routed || call.Int(0) > 2))
        {
            MovementKernels.LocalSlice(call);
            return;
        }

        MovementKernels.RequireExperts(call.Int(0));
        var experts = call.Out().Info.Extents[2];
        var first = call.Rank.BlockOf(call.Ints(1)) * experts;
        if (isSet)
            call.Out().Adopt(CudaRows.Slice(call.Inputs[0].DeviceRows, first, experts, call.Out().Info.Padding));
        else
            CudaRows.Slice(call.In(0), call.Inputs[1].DeviceRows, first, experts, call.Out());
    }

    /// <summary>a -> out: E4M3 and back, by blocks.</summary>
    public static void Fp8Quantize(in KernelCall call)
    {
        var source = call.In(0);
        using var result = new Target(call.Out(), source.dtype, ElementwiseKernels.Rows(call.Inputs[0]));
        var blocks = call.Ints(0);
        var skip = call.Inputs[0].Info.Routed ? 2 : 0;
        var shape = source.shape;
        if (blocks.Count - skip != shape.Length)
            throw new InvalidOperationException($"{blocks.Count} block extents for [{string.Join(", ", shape)}]");

        // dims that are whole, or single blocks, on both sides are one
        List<(long Extent, long Block)> dims = [];
        for (var d = 0; d < shape.Length; d++)
        {
            var (extent, block) = (shape[d], Math.Min(blocks[d + skip], Math.Max(1, shape[d])));
            if (dims.Count > 0 && ((block == 1 && dims[^1].Block == 1) || (block == extent && dims[^1].Block == dims[^1].Extent)))
                dims[^1] = (dims[^1].Extent * extent, dims[^1].Block * block);
            else
                dims.Add((extent, block));
        }

        if (dims.Count > 4)
            throw Unsupported(call, $"blocks over {dims.Count} dims", "leave --device out");
        while (dims.Count < 4)
            dims.Insert(0, (1, 1));
        var count = dims.Aggregate(1L, (n, d) => n * ((d.Extent + d.Block - 1) / d.Block));
        var threads = (int)Math.Clamp((dims.Aggregate(1L, (n, d) => n * d.Block) + 31) / 32 * 32, 32, 256);
        Gpu.Launch(
            "Quantization", "fp8_" + Gpu.Type(source), source.numel() == 0 ? 0 : count, threads, source, result.Tensor,
            (int)dims[0].Extent, (int)dims[1].Extent, (int)dims[2].Extent, (int)dims[3].Extent,
            (int)dims[0].Block, (int)dims[1].Block, (int)dims[2].Block, (int)dims[3].Block);
    }

    /// <summary>DSG0854, at the slot that would be written.</summary>
    public static DiagnosticException Unsupported(in KernelCall call, string what, string help)
        => DiagnosticException.Of(Codes.DeviceUnsupported, call.Out().Info.Name, $"no kernel on a GPU makes {what}", help);
}

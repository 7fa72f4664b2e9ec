// Kernels that move elements without changing them. Dims are logical: a routed value stores its first three as one.
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Kernels;

internal static class MovementKernels
{
    /// <summary>a -> out: [start, start + length) of a dim.</summary>
    public static void Slice(in KernelCall call)
    {
        using var view = call.In(0).narrow(call.Inputs[0].StorageDim(call.Int(0)), call.Int(1), call.Int(2));
        call.Out().AdoptCopy(view);
    }

    /// <summary>a -> out: zeros around a; Int dim, before, total.</summary>
    public static void Pad(in KernelCall call)
    {
        var a = call.In(0);
        var dim = call.Inputs[0].StorageDim(call.Int(0));
        var target = call.Out().Fill(ElementwiseKernels.Rows(call.Inputs[0]));
        target.zero_().On(target);
        using var inside = target.narrow(dim, call.Int(1), a.shape[dim]);
        inside.copy_(a).On(inside);
    }

    /// <summary>a1, ..., an -> out, joined along a dim.</summary>
    public static void Concat(in KernelCall call)
    {
        var dim = call.Inputs[0].StorageDim(call.Int(0));
        var target = call.Out().Fill(ElementwiseKernels.Rows(call.Inputs[0]));
        long at = 0;
        foreach (var input in call.Inputs)
        {
            var part = input.Tensor;
            using var place = target.narrow(dim, at, part.shape[dim]);
            place.copy_(part).On(place);
            at += part.shape[dim];
        }
    }

    /// <summary>a -> out: 2R blocks of a dim in the order 0, 2R-1, 1, 2R-2, ..., or back; Int dim, ranks, inverse.</summary>
    public static void Zigzag(in KernelCall call)
    {
        var a = call.In(0);
        var dim = call.Inputs[0].StorageDim(call.Int(0));
        var blocks = 2 * call.Int(1);
        var length = a.shape[dim] / blocks;
        var target = call.Out().Fill(ElementwiseKernels.Rows(call.Inputs[0]));
        for (var i = 0; i < blocks; i++)
        {
            var natural = ZigzagOrder.naturalBlock(blocks, i);
            var (from, to) = call.Int(2) == 0 ? (natural, i) : (i, natural);
            using var part = a.narrow(dim, from * length, length);
            using var place = target.narrow(dim, to * length, length);
            place.copy_(part).On(place);
        }
    }

    /// <summary>a -> out with a new dim, repeated.</summary>
    public static void Broadcast(in KernelCall call)
    {
        using var one = call.In(0).unsqueeze(call.Out().StorageDim(call.Int(0)));
        var shape = one.shape;
        shape[call.Out().StorageDim(call.Int(0))] = call.Out().Info.Extents[call.Int(0)];
        using var wide = one.expand(shape);
        call.Out().AdoptCopy(wide);
    }

    /// <summary>a -> this rank's block of a dim; a route, or rows with their route as second operand, by experts (dim 2).</summary>
    public static void LocalSlice(in KernelCall call)
    {
        var dim = call.Int(0);
        var block = call.Rank.BlockOf(call.Ints(1));
        var extent = call.Out().Info.Extents[dim];
        if (call.Inputs[0].HoldsRows)
        {
            RequireExperts(dim);
            call.Out().Adopt(call.Route(0).SliceExperts(block * extent, extent, call.Out().Info.Padding));
            return;
        }

        if (call.Inputs[0].Info.Routed && dim < 3)
        {
            RequireExperts(dim);
            SliceRows(call, block * extent, extent);
            return;
        }

        using var view = call.In(0).narrow(call.Inputs[0].StorageDim(dim), (long)block * extent, extent);
        call.Out().AdoptCopy(view);
    }

    /// <summary>a -> out: out dim i is a's dim p[i].</summary>
    public static void Transpose(in KernelCall call)
    {
        var a = call.Inputs[0];
        var storage = new List<long>();
        foreach (var dim in call.Ints(0))
        {
            if (!storage.Contains(a.StorageDim((int)dim)))
                storage.Add(a.StorageDim((int)dim));
        }

        using var view = a.Tensor.permute([.. storage]);
        call.Out().AdoptCopy(view);
    }

    /// <summary>The rows of some experts, in the blocks of the slice.</summary>
    private static unsafe void SliceRows(in KernelCall call, int first, int count)
    {
        var from = call.Route(1);
        var into = from.SliceExperts(first, count, call.Out().Info.Padding);
        var target = call.Out().Fill(into.Rows);
        var width = into.Rows == 0 ? 0 : target.ByteCount() / into.Rows;
        byte* source = (byte*)call.In(0).Pointer(), rows = (byte*)target.Pointer();
        for (var e = 0; e < count; e++)
        {
            var bytes = into.Counts[e] * width;
            Buffer.MemoryCopy(source + (from.Offsets[first + e] * width), rows + (into.Offsets[e] * width), bytes, bytes);
        }

        into.ClearPadding(rows, width);
    }

    /// <summary>Rows lie by expert, so that experts are the only dim of theirs that a range of rows is a block of.</summary>
    internal static void RequireExperts(int dim)
    {
        if (dim != 2)
            throw new InvalidOperationException($"routed rows can be sliced by experts (dim 2), not by dim {dim}");
    }
}

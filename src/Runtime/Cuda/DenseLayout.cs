// Tensors as blocks that lie one behind the other, which is what NCCL cuts and joins.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class DenseLayout
{
    /// <summary>Do `n` blocks of a dim lie one behind the other already? So it is where all dims before it have extent 1.</summary>
    public static bool IsOutermost(ReadOnlySpan<long> shape, int dim)
    {
        foreach (var extent in shape[..dim])
        {
            if (extent != 1)
                return false;
        }

        return true;
    }

    /// <summary>The n blocks of a dim, [n, outer, block * inner], one behind the other: the value itself or a copy; the caller disposes it.</summary>
    public static Tensor Blocks(Tensor value, int dim, int n)
    {
        var extent = value.shape[dim];
        if (extent % n != 0)
            throw new InvalidOperationException($"{extent} elements do not split over {n} ranks");
        var outer = Outer(value.shape, dim);
        if (outer == 1)
            return value.view(n, 1, value.numel() / n);
        using var cut = value.view(outer, n, value.numel() / outer / n);
        using var turned = cut.transpose(0, 1);
        return turned.contiguous();
    }

    /// <summary>Writes n blocks, one behind the other, so that they stand side by side along a dim of `target`.</summary>
    public static void Join(Tensor blocks, Tensor target, int dim, int n)
    {
        var outer = Outer(target.shape, dim);
        using var from = blocks.view(n, outer, target.numel() / outer / n);
        using var turned = from.transpose(0, 1);
        using var to = target.view(outer, n, target.numel() / outer / n);
        to.copy_(turned).On(to);
    }

    private static long Outer(ReadOnlySpan<long> shape, int dim)
    {
        var outer = 1L;
        foreach (var extent in shape[..dim])
            outer *= extent;
        return outer;
    }
}

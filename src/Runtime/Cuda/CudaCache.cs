// What generation keeps of the tokens it has seen, on a GPU.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaCache
{
    /// <summary>cache[b c w], rows[b s w], positions[b s] -> cache, in place; positions outside the cache are not written.</summary>
    public static void CacheWrite(in KernelCall call)
    {
        var cache = call.Out().Tensor;
        using var rows = Gpu.As(call.In(1), cache.dtype);
        var positions = call.In(2);
        var units = (int)(cache.shape[2] * TensorMemory.Width(cache.dtype) / 2);
        Gpu.Launch("Cache", "cache_write", positions.numel(), Gpu.Threads(units, false), rows, positions, cache, positions.numel(), positions.shape[1], cache.shape[1], units);
    }

    /// <summary>q[b s n w], cache[b c w], positions[b s] -> out[b s n v]; Float scale, Int v. fp32 inside; zero where the position is below zero.</summary>
    public static void CacheAttention(in KernelCall call)
    {
        using var q = Gpu.Float(call.In(0));
        using var cache = Gpu.Float(call.In(1));
        var positions = call.In(2);
        long b = q.shape[0], s = q.shape[1], n = q.shape[2], w = q.shape[3], places = cache.shape[1];
        using var queries = q.view(b, s * n, w);
        using var keys = cache.transpose(1, 2);
        using var scores = queries.bmm(keys);
        using var factor = (TorchSharp.Scalar)call.Float(0);
        scores.mul_(factor).On(scores);
        using var shaped = scores.view(b, s, n, places);
        using var index = arange(places, dtype: ScalarType.Int64, device: q.device);
        using var flat = positions.view(b, s, 1, 1);
        using var hidden = index.gt(flat);
        using var none = (TorchSharp.Scalar)float.NegativeInfinity;
        shaped.masked_fill_(hidden, none).On(shaped);
        using var p = shaped.softmax(-1);

        // a position below zero sees nothing: its softmax is no number
        using var zero = (TorchSharp.Scalar)0L;
        using var nowhere = flat.lt(zero);
        using var nothing = (TorchSharp.Scalar)0f;
        p.masked_fill_(nowhere, nothing).On(p);
        using var weights = p.view(b, s * n, places);

        // rows that nobody of the sequence sees may hold anything, also no numbers
        using var last = positions.amax([1]);
        using var end = last.view(b, 1);
        using var behind = index.gt(end);
        using var unseen = behind.unsqueeze(-1);
        using var seen = cache.masked_fill(unseen, nothing);
        using var values = seen.narrow(2, 0, call.Int(1));
        using var sum = weights.bmm(values);
        using var result = sum.view(b, s, n, call.Int(1));
        call.Out().AdoptCopy(result);
    }
}

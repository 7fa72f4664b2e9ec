// What generation keeps of the tokens it has seen: rows written by position, and attention of new tokens over them.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

// b batch, s new tokens, c places of the cache, n heads, w features of a row, v of them that are summed.
internal static unsafe class CacheKernels
{
    /// <summary>cache[b c w], rows[b s w], positions[b s] -> cache, in place; positions outside the cache are not written.</summary>
    public static void CacheWrite(in KernelCall call)
    {
        var cache = call.Out().Tensor;
        using var rows = new Operand(call.In(1), cache.dtype);
        var (shape, given) = (cache.shape, call.In(1).shape);
        long places = shape[1], bytes = shape[2] * cache.ElementSize, tokens = given[0] * given[1];
        var positions = (long*)call.In(2).Pointer();
        byte* from = (byte*)rows.P, into = (byte*)cache.Pointer();
        for (long t = 0; t < tokens; t++)
        {
            var place = positions[t];
            if (place >= 0 && place < places)
                Buffer.MemoryCopy(from + (t * bytes), into + (((t / given[1] * places) + place) * bytes), bytes, bytes);
        }
    }

    /// <summary>q[b s n w], cache[b c w], positions[b s] -> out[b s n v]; Float scale, Int v. Reads no place behind the last position.</summary>
    public static void CacheAttention(in KernelCall call)
    {
        Tensor q = call.In(0), cache = call.In(1);
        var shape = q.shape;
        int tokens = (int)shape[1], heads = (int)shape[2], value = call.Int(1);
        long features = shape[3], places = cache.shape[1];
        var scale = (float)call.Float(0);
        var positions = (long*)call.In(2).Pointer();
        var result = call.Out().Fill();
        for (long b = 0; b < shape[0]; b++)
        {
            using var mine = result.select(0, b);
            var last = -1L;
            for (var s = 0; s < tokens; s++)
                last = Math.Max(last, positions[(b * tokens) + s]);
            if (last < 0)
            {
                mine.zero_().On(mine);
                continue;
            }

            if (last >= places)
                throw new InvalidOperationException($"position {last} is behind the cache of {places} places");
            using var sequence = cache.select(0, b);
            using var seen = Products.WideRows(sequence, 0, last + 1);
            using var queries = q.select(0, b);
            using var flat = queries.view(tokens * heads, features);
            using var wide = Products.WideRows(flat, 0, tokens * heads);
            using var keys = seen.t();
            using var scores = wide.mm(keys);
            var row = (float*)scores.Pointer();
            for (var s = 0; s < tokens; s++)
            {
                var here = (int)positions[(b * tokens) + s] + 1;
                for (var n = 0; n < heads; n++, row += last + 1)
                {
                    if (here > 0)
                        AttentionKernels.Softmax(row, here, (int)last + 1, scale);
                    else
                        new Span<float>(row, (int)last + 1).Clear();
                }
            }

            using var values = seen.narrow(1, 0, value);
            using var sum = scores.mm(values);
            using var shaped = sum.view(tokens, heads, value);
            mine.copy_(shaped).On(mine);
        }
    }
}

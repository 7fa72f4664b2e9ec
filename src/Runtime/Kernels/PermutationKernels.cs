// Tokens to routed rows and back. Unpermute sums a token's rows in expert order, in fp32, and rounds once.
// Rows that fill up an expert's block become zero, and nothing is read from them.
using System.Runtime.InteropServices;
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using TorchSharp;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class PermutationKernels
{
    /// <summary>x[b s h], route -> rows[rows h], by the library's gather.</summary>
    public static void Permute(in KernelCall call)
    {
        var x = call.In(0);
        var route = ByToken(call, 1);
        using var index = Index(route);
        using var tokens = x.reshape(route.Tokens, -1);
        using var rows = tokens.index_select(0, index);
        if (route.Padding == 1)
        {
            using var shaped = rows.reshape([route.Rows, .. x.shape.AsSpan(2)]);
            call.Out().AdoptCopy(shaped);
            return;
        }

        using var places = Places(route);
        using var blocks = zeros([route.Rows, rows.shape[1]], dtype: x.dtype);
        blocks.index_copy_(0, places, rows).On(blocks);
        using var filled = blocks.reshape([route.Rows, .. x.shape.AsSpan(2)]);
        call.Out().AdoptCopy(filled);
    }

    /// <summary>rows[rows h], route -> y[b s h], by the library's scatter-add.</summary>
    public static void Unpermute(in KernelCall call)
    {
        var rows = call.In(0);
        var route = ByToken(call, 1);
        using var index = Index(route);
        using var wide = rows.to_type(ScalarType.Float32);
        var target = call.Out().Fill();
        var width = route.Tokens == 0 ? 0 : target.numel() / route.Tokens;
        using var flat = wide.reshape(route.Rows, width);
        using var places = route.Padding == 1 ? null : Places(route);
        using var rowsOnly = places is null ? flat.alias() : flat.index_select(0, places);
        using var sum = zeros([route.Tokens, width], dtype: ScalarType.Float32);
        using var one = (Scalar)1f;
        sum.index_add_(0, index, rowsOnly, one).On(sum);
        using var shaped = sum.reshape(target.shape);
        call.Out().AdoptCopy(shaped);
    }

    /// <summary>x[b s h], route -> rows[rows h]; one pass.</summary>
    public static void PermuteFused(in KernelCall call) => Gather(call, ByToken(call, 1));

    /// <summary>rows[rows h], route -> y[b s h]; one pass, each token gathers its rows.</summary>
    public static void UnpermuteFused(in KernelCall call) => Combine(call, ByToken(call, 1));

    /// <summary>p[b s e], route -> rows[rows].</summary>
    public static void RouteProbs(in KernelCall call) => GatherProbs(call, ByToken(call, 1), 0, 0);

    /// <summary>r[rows], route -> p[b s e], zero where nothing is routed.</summary>
    public static void UnrouteProbs(in KernelCall call) => ScatterProbs(call, ByToken(call, 1), 0, 0);

    /// <summary>x[b s h], p[b s e], route -> rows[rows h], r[rows].</summary>
    public static void PermuteWithProbs(in KernelCall call)
    {
        var route = ByToken(call, 2);
        Gather(call, route);
        GatherProbs(call, route, 1, 1);
    }

    /// <summary>rows[rows h], r[rows], route -> y[b s h], p[b s e].</summary>
    public static void UnpermuteWithProbs(in KernelCall call)
    {
        var route = ByToken(call, 2);
        Combine(call, route);
        ScatterProbs(call, route, 1, 1);
    }

    private static RowSet ByToken(in KernelCall call, int input)
    {
        var route = call.Route(input);
        return route.ByToken ? route : throw new InvalidOperationException("rows ordered by expert cannot be permuted by token");
    }

    /// <summary>The token of each row that does not fill up.</summary>
    private static Tensor Index(RowSet route) => tensor((long[])[.. route.TokenIndex.Where(t => t >= 0).Select(t => (long)t)]);

    /// <summary>Where those rows stand.</summary>
    private static Tensor Places(RowSet route)
        => tensor((long[])[.. Enumerable.Range(0, route.Rows).Where(row => route.TokenIndex[row] >= 0).Select(row => (long)row)]);

    private static void Gather(in KernelCall call, RowSet route)
    {
        var x = call.In(0);
        using var rows = new Result(call.Out(0), x.dtype, route.Rows);
        var width = route.Tokens == 0 ? 0 : x.numel() / route.Tokens * TensorMemory.Width(x.dtype);
        byte* from = (byte*)x.Pointer(), to = (byte*)rows.P;
        for (var row = 0; row < route.Rows; row++)
        {
            if (route.TokenIndex[row] >= 0)
                Buffer.MemoryCopy(from + (route.TokenIndex[row] * width), to + (row * width), width, width);
        }

        route.ClearPadding(to, width);
    }

    private static void Combine(in KernelCall call, RowSet route)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            Combine<BF16>(call, route);
        else
            Combine<F32>(call, route);
    }

    private static void Combine<T>(in KernelCall call, RowSet route)
        where T : struct, IElement
    {
        var rows = call.In(0);
        using var y = new Result(call.Out(0), rows.dtype);
        var width = route.Tokens == 0 ? 0 : y.Count / route.Tokens;
        var p = rows.Pointer();
        for (var t = 0; t < route.Tokens; t++)
        {
            var mine = route.TokenRows.AsSpan(route.TokenStart[t]..route.TokenStart[t + 1]);
            long to = t * width, i = 0;
            for (; i <= width - 8; i += 8)
            {
                var sum = Vector256<float>.Zero;
                foreach (var row in mine)
                    sum += T.Load8(p, (row * width) + i);
                T.Store8(y.P, to + i, sum);
            }

            for (; i < width; i++)
            {
                var sum = 0f;
                foreach (var row in mine)
                    sum += T.Load(p, (row * width) + i);
                T.Store(y.P, to + i, sum);
            }
        }
    }

    private static void GatherProbs(in KernelCall call, RowSet route, int input, int output)
    {
        using var probs = Operand.Float(call.In(input));
        using var rows = new Result(call.Out(output), ScalarType.Float32, route.Rows);
        for (var e = 0; e < route.Experts; e++)
        {
            for (var row = route.Offsets[e]; row < route.Offsets[e] + route.Counts[e]; row++)
                rows.Floats[row] = probs.Floats[((long)route.TokenIndex[row] * route.Experts) + e];
        }

        route.ClearPadding((byte*)rows.P, sizeof(float));
    }

    private static void ScatterProbs(in KernelCall call, RowSet route, int input, int output)
    {
        using var rows = Operand.Float(call.In(input));
        using var probs = new Result(call.Out(output), ScalarType.Float32);
        NativeMemory.Clear(probs.P, (nuint)(probs.Count * 4));
        for (var e = 0; e < route.Experts; e++)
        {
            for (var row = route.Offsets[e]; row < route.Offsets[e] + route.Counts[e]; row++)
                probs.Floats[((long)route.TokenIndex[row] * route.Experts) + e] = rows.Floats[row];
        }
    }
}

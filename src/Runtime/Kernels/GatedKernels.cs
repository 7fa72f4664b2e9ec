// SwiGLU, with or without router probabilities: x holds gate then up, y = silu(gate) * up (* p), fp32 inside.
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using TorchSharp;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class GatedKernels
{
    /// <summary>x[... 2 f] -> y[... f].</summary>
    public static void SwiGlu(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            Forward<BF16>(call, false);
        else
            Forward<F32>(call, false);
    }

    /// <summary>x[... 2 f], p[...] -> y[... f].</summary>
    public static void SwiGluProbs(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            Forward<BF16>(call, true);
        else
            Forward<F32>(call, true);
    }

    /// <summary>dy[... f], x[... 2 f] -> dx[... 2 f].</summary>
    public static void SwiGluGrad(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(1).dtype))
            Backward<BF16>(call, false);
        else
            Backward<F32>(call, false);
    }

    /// <summary>dy[... f], x[... 2 f], p[...] -> dx[... 2 f], dp[...].</summary>
    public static void SwiGluProbsGrad(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(1).dtype))
            Backward<BF16>(call, true);
        else
            Backward<F32>(call, true);
    }

    private static void Forward<T>(in KernelCall call, bool weighted)
        where T : struct, IElement
    {
        var x = call.In(0);
        var rows = ElementwiseKernels.Rows(call.Inputs[0]);
        var f = call.Out().Info.Extents[^1];
        using var p = weighted ? Operand.Float(call.In(1)) : default;
        using var y = new Result(call.Out(), x.dtype, rows);
        var px = x.Pointer();
        for (long row = 0; row < y.Count / f; row++)
        {
            var weight = Vector256.Create(weighted ? p.Floats[row] : 1);
            long gate = row * 2 * f, up = gate + f, to = row * f;
            var i = 0;
            for (; i <= f - 8; i += 8)
            {
                var g = T.Load8(px, gate + i);
                T.Store8(y.P, to + i, g * Simd.Sigmoid(g) * T.Load8(px, up + i) * weight);
            }

            for (; i < f; i++)
            {
                var g = Vector256.Create(T.Load(px, gate + i));
                T.Store(y.P, to + i, (g * Simd.Sigmoid(g) * Vector256.Create(T.Load(px, up + i)) * weight)[0]);
            }
        }
    }

    private static void Backward<T>(in KernelCall call, bool weighted)
        where T : struct, IElement
    {
        var x = call.In(1);
        var f = call.Inputs[0].Info.Extents[^1];
        var rows = ElementwiseKernels.Rows(call.Inputs[1]);
        using var dy = new Operand(call.In(0), x.dtype);
        using var p = weighted ? Operand.Float(call.In(2)) : default;
        using var dx = new Result(call.Out(0), x.dtype, rows);
        using var dp = weighted ? new Result(call.Out(1), torch.ScalarType.Float32, rows) : default;
        var px = x.Pointer();
        for (long row = 0; row < dx.Count / (2 * f); row++)
        {
            var weight = Vector256.Create(weighted ? p.Floats[row] : 1);
            long gate = row * 2 * f, up = gate + f, from = row * f;
            var sums = Vector256<float>.Zero;
            var i = 0;
            for (; i <= f - 8; i += 8)
            {
                var (dg, du, share) = Gradients(T.Load8(dy.P, from + i), T.Load8(px, gate + i), T.Load8(px, up + i), weight);
                T.Store8(dx.P, gate + i, dg);
                T.Store8(dx.P, up + i, du);
                sums += share;
            }

            var total = Simd.Total(sums);
            for (; i < f; i++)
            {
                var (dg, du, share) = Gradients(
                    Vector256.Create(T.Load(dy.P, from + i)), Vector256.Create(T.Load(px, gate + i)), Vector256.Create(T.Load(px, up + i)), weight);
                T.Store(dx.P, gate + i, dg[0]);
                T.Store(dx.P, up + i, du[0]);
                total += share[0];
            }

            if (weighted)
                dp.Floats[row] = total;
        }
    }

    /// <summary>Gradients of gate and up, and dy * silu(gate) * up.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static (Vector256<float> Gate, Vector256<float> Up, Vector256<float> Share) Gradients(
        Vector256<float> dy, Vector256<float> g, Vector256<float> u, Vector256<float> weight)
    {
        var sigmoid = Simd.Sigmoid(g);
        var silu = g * sigmoid;
        var weighted = dy * weight;
        var slope = sigmoid * (Vector256<float>.One + (g * (Vector256<float>.One - sigmoid)));
        return (weighted * u * slope, weighted * silu, dy * silu * u);
    }
}

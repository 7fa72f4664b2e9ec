// Root-mean-square normalisation over the last dim: y = x / sqrt(mean(x^2) + eps) * w, fp32 inside.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using TorchSharp;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class NormalizationKernels
{
    /// <summary>x, w -> y.</summary>
    public static void RmsNorm(in KernelCall call)
    {
        var x = call.In(0);
        if (Simd.IsBFloat16(x.dtype))
            Forward<BF16>(call);
        else
            Forward<F32>(call);
    }

    /// <summary>dy, x, w -> dx.</summary>
    public static void RmsNormGradX(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(1).dtype))
            GradX<BF16>(call, false);
        else
            GradX<F32>(call, false);
    }

    /// <summary>dy, x -> dw.</summary>
    public static void RmsNormGradW(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(1).dtype))
            GradW<BF16>(call);
        else
            GradW<F32>(call);
    }

    /// <summary>x, r, w -> x + r, its norm; the norm is of the sum as stored.</summary>
    public static void AddRmsNorm(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            AddForward<BF16>(call);
        else
            AddForward<F32>(call);
    }

    /// <summary>dy, x, w, c -> dx + c, rounded once.</summary>
    public static void RmsNormGradXAdd(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(1).dtype))
            GradX<BF16>(call, true);
        else
            GradX<F32>(call, true);
    }

    private static float Rate<T>(void* x, long at, int n, double eps)
        where T : struct, IElement
        => (float)(1 / Math.Sqrt((Simd.Dot<T, T>(x, at, x, at, n) / n) + eps));

    private static void Forward<T>(in KernelCall call)
        where T : struct, IElement
    {
        var x = call.In(0);
        var n = (int)x.shape[^1];
        var eps = call.Float(0);
        using var w = Operand.Float(call.In(1));
        using var y = new Result(call.Out(), x.dtype, ElementwiseKernels.Rows(call.Inputs[0]));
        var px = x.Pointer();
        for (long at = 0; at < y.Count; at += n)
        {
            var rate = Rate<T>(px, at, n, eps);
            var rates = Vector256.Create(rate);
            var i = 0;
            for (; i <= n - 8; i += 8)
                T.Store8(y.P, at + i, T.Load8(px, at + i) * rates * F32.Load8(w.P, i));
            for (; i < n; i++)
                T.Store(y.P, at + i, T.Load(px, at + i) * rate * w.Floats[i]);
        }
    }

    private static void AddForward<T>(in KernelCall call)
        where T : struct, IElement
    {
        Tensor x = call.In(0), r = call.In(1);
        var n = (int)x.shape[^1];
        var eps = call.Float(0);
        using var w = Operand.Float(call.In(2));
        using var sum = new Result(call.Out(0), x.dtype);
        using var y = new Result(call.Out(1), x.dtype);
        void* px = x.Pointer(), pr = r.Pointer();
        for (long at = 0; at < y.Count; at += n)
        {
            // the order of Simd.Dot, so that norms are those of the unfused ops
            var squares = Vector256<float>.Zero;
            var i = 0;
            for (; i <= n - 8; i += 8)
            {
                T.Store8(sum.P, at + i, T.Load8(px, at + i) + T.Load8(pr, at + i));
                var s = T.Load8(sum.P, at + i);
                squares += s * s;
            }

            var total = Simd.Total(squares);
            for (; i < n; i++)
            {
                T.Store(sum.P, at + i, T.Load(px, at + i) + T.Load(pr, at + i));
                var s = T.Load(sum.P, at + i);
                total += s * s;
            }

            var rate = (float)(1 / Math.Sqrt((total / n) + eps));
            var rates = Vector256.Create(rate);
            for (i = 0; i <= n - 8; i += 8)
                T.Store8(y.P, at + i, T.Load8(sum.P, at + i) * rates * F32.Load8(w.P, i));
            for (; i < n; i++)
                T.Store(y.P, at + i, T.Load(sum.P, at + i) * rate * w.Floats[i]);
        }
    }

    private static void GradX<T>(in KernelCall call, bool carries)
        where T : struct, IElement
    {
        var x = call.In(1);
        var n = (int)x.shape[^1];
        var eps = call.Float(0);
        using var dy = new Operand(call.In(0), x.dtype);
        using var w = Operand.Float(call.In(2));
        using var carried = carries ? new Operand(call.In(3), x.dtype) : default;
        using var dx = new Result(call.Out(), x.dtype, ElementwiseKernels.Rows(call.Inputs[1]));
        void* px = x.Pointer(), pc = carried.P;
        for (long at = 0; at < dx.Count; at += n)
        {
            var rate = Rate<T>(px, at, n, eps);

            // dx = rate * (dy w - x rate^2 mean(dy w x))
            var sum = Vector256<float>.Zero;
            var i = 0;
            for (; i <= n - 8; i += 8)
                sum += T.Load8(dy.P, at + i) * F32.Load8(w.P, i) * T.Load8(px, at + i);
            var total = Simd.Total(sum);
            for (; i < n; i++)
                total += T.Load(dy.P, at + i) * w.Floats[i] * T.Load(px, at + i);
            var back = rate * rate * total / n;
            var backs = Vector256.Create(back);
            var rates = Vector256.Create(rate);
            for (i = 0; i <= n - 8; i += 8)
            {
                var own = rates * ((T.Load8(dy.P, at + i) * F32.Load8(w.P, i)) - (T.Load8(px, at + i) * backs));
                T.Store8(dx.P, at + i, carries ? own + T.Load8(pc, at + i) : own);
            }

            for (; i < n; i++)
            {
                var own = rate * ((T.Load(dy.P, at + i) * w.Floats[i]) - (T.Load(px, at + i) * back));
                T.Store(dx.P, at + i, carries ? own + T.Load(pc, at + i) : own);
            }
        }
    }

    private static void GradW<T>(in KernelCall call)
        where T : struct, IElement
    {
        // Rows are summed in blocks and blocks in order: errors grow with the root of the rows, not with the rows.
        const int Block = 64;
        var x = call.In(1);
        var n = (int)x.shape[^1];
        var rows = n == 0 ? 0 : x.numel() / n;
        var eps = call.Float(0);
        using var dy = new Operand(call.In(0), x.dtype);
        using var dw = new Result(call.Out(), torch.ScalarType.Float32);
        var px = x.Pointer();
        var total = dw.Floats;
        new Span<float>(total, n).Clear();
        var partial = new float[n];
        fixed (float* part = partial)
        {
            for (long first = 0; first < rows; first += Block)
            {
                partial.AsSpan().Clear();
                for (var row = first; row < Math.Min(rows, first + Block); row++)
                {
                    var at = row * n;
                    var rate = Rate<T>(px, at, n, eps);
                    var rates = Vector256.Create(rate);
                    var i = 0;
                    for (; i <= n - 8; i += 8)
                        F32.Store8(part, i, F32.Load8(part, i) + (T.Load8(dy.P, at + i) * T.Load8(px, at + i) * rates));
                    for (; i < n; i++)
                        part[i] += T.Load(dy.P, at + i) * T.Load(px, at + i) * rate;
                }

                for (var i = 0; i < n; i++)
                    total[i] += part[i];
            }
        }
    }
}

// Once-a-step kernels: accumulators, gradient norm and clip, AdamW, router bias.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class StepKernels
{
    /// <summary>-> out: zeros.</summary>
    public static void Zero(in KernelCall call)
    {
        var target = call.Out().Fill();
        target.zero_().On(target);
    }

    /// <summary>a -> out: out += a; floats are added in fp32 and rounded to out's type, to nearest even.</summary>
    public static void Accumulate(in KernelCall call)
    {
        Tensor a = call.In(0), target = call.Out().Tensor;
        if (!a.is_floating_point())
        {
            target.add_(a, Scalars.One).On(target);
            return;
        }

        switch (Simd.IsBFloat16(a.dtype), Simd.IsBFloat16(target.dtype))
        {
            case (false, false):
                Accumulate<F32, F32>(a, target);
                break;
            case (false, true):
                Accumulate<F32, BF16>(a, target);
                break;
            case (true, false):
                Accumulate<BF16, F32>(a, target);
                break;
            case (true, true):
                Accumulate<BF16, BF16>(a, target);
                break;
        }
    }

    /// <summary>g1, ..., gn -> out[]: sum of squares in operand order, fp64 inside.</summary>
    public static void SumSquares(in KernelCall call)
    {
        var sum = 0.0;
        foreach (var input in call.Inputs)
        {
            using var g = Operand.Float(input.Tensor);
            var n = input.Tensor.numel();
            Vector256<double> low = Vector256<double>.Zero, high = Vector256<double>.Zero;
            long i = 0;
            for (; i <= n - 8; i += 8)
            {
                var (a, b) = Vector256.Widen(F32.Load8(g.P, i));
                low += a * a;
                high += b * b;
            }

            low += high;
            var total = (low[0] + low[1]) + (low[2] + low[3]);
            for (; i < n; i++)
                total += (double)g.Floats[i] * g.Floats[i];
            sum += total;
        }

        using var result = new Result(call.Out(), ScalarType.Float32);
        result.Floats[0] = (float)sum;
    }

    /// <summary>sumsq[] -> norm[], scale[] = min(1, maxNorm / (norm + 1e-6)).</summary>
    public static void ClipScale(in KernelCall call)
    {
        var norm = Math.Sqrt(Number(call.In(0)));
        using var norms = new Result(call.Out(0), ScalarType.Float32);
        using var scale = new Result(call.Out(1), ScalarType.Float32);
        norms.Floats[0] = (float)norm;
        scale.Floats[0] = (float)Math.Min(1, call.Float(0) / (norm + 1e-6));
    }

    /// <summary>
    /// grad, scale[], lr[], step[] -> master, m, v, param; all but a temporary param in place. Decoupled decay, bias corrected; one pass.
    /// Moments and param may be bf16: they are read as fp32, and rounded to nearest even after fp32 arithmetic; the update itself
    /// uses the moments before they are rounded. With the weight as fifth input, the master is a remainder of i16 (Halves).
    /// </summary>
    public static void AdamW(in KernelCall call)
    {
        call.Out(3).Fill();
        if (Simd.IsBFloat16(call.Out(1).Tensor.dtype))
            AdamW<BF16>(call);
        else
            AdamW<F32>(call);
    }

    /// <summary>counts[e] -> bias[e] in place: bias += rate * sign(mean(counts) - counts).</summary>
    public static void RouterBias(in KernelCall call)
    {
        var counts = call.In(0);
        var bias = (float*)call.Out().Tensor.Pointer();
        var n = (int)counts.numel();
        var p = (long*)counts.Pointer();
        var rate = (float)call.Float(0);
        long total = 0;
        for (var e = 0; e < n; e++)
            total += p[e];
        for (var e = 0; e < n; e++)
            bias[e] += rate * total.CompareTo(p[e] * n);
    }

    /// <summary>The one element of a scalar.</summary>
    internal static double Number(Tensor scalar)
        => scalar.dtype switch
        {
            ScalarType.Float32 => *(float*)scalar.Pointer(),
            ScalarType.BFloat16 => BF16.Load(scalar.Pointer(), 0),
            ScalarType.Int64 => *(long*)scalar.Pointer(),
            var other => throw new InvalidOperationException($"a scalar of type {other}"),
        };

    private static void Accumulate<TFrom, TTo>(Tensor a, Tensor target)
        where TFrom : struct, IElement
        where TTo : struct, IElement
    {
        var n = target.numel();
        if (a.numel() != n)
            throw new InvalidOperationException($"{a.numel()} elements do not add to {n}");
        void* from = a.Pointer(), to = target.Pointer();
        long i = 0;
        for (; i <= n - 8; i += 8)
            TTo.Store8(to, i, TTo.Load8(to, i) + TFrom.Load8(from, i));
        for (; i < n; i++)
            TTo.Store(to, i, TTo.Load(to, i) + TFrom.Load(from, i));
    }

    private static void AdamW<TFirst>(in KernelCall call)
        where TFirst : struct, IElement
    {
        if (Simd.IsBFloat16(call.Out(2).Tensor.dtype))
            AdamW<TFirst, BF16>(call);
        else
            AdamW<TFirst, F32>(call);
    }

    private static void AdamW<TFirst, TSecond>(in KernelCall call)
        where TFirst : struct, IElement
        where TSecond : struct, IElement
    {
        var narrow = Simd.IsBFloat16(call.Out(3).Tensor.dtype);
        switch (call.Out(0).Tensor.dtype)
        {
            case ScalarType.Float32 when narrow:
                AdamW<TFirst, TSecond, Beside<BF16>>(call, null);
                break;
            case ScalarType.Float32:
                AdamW<TFirst, TSecond, Beside<F32>>(call, null);
                break;
            case ScalarType.Int16 when narrow && call.Inputs.Length == 5 && Simd.IsBFloat16(call.In(4).dtype):
                AdamW<TFirst, TSecond, Halves>(call, call.In(4).Pointer());
                break;
            case var other:
                throw new InvalidOperationException($"AdamW needs an fp32 master, or a remainder beside a bf16 weight, not {other}");
        }
    }

    private static void AdamW<TFirst, TSecond, TMaster>(in KernelCall call, void* weight)
        where TFirst : struct, IElement
        where TSecond : struct, IElement
        where TMaster : struct, IMaster
    {
        double beta1 = call.Float(0), beta2 = call.Float(1), eps = call.Float(2), decay = call.Float(3);
        double clip = Number(call.In(1)), lr = Number(call.In(2)), step = Number(call.In(3));
        using var grad = Operand.Float(call.In(0));
        void* master = call.Out(0).Tensor.Pointer(), param = call.Out(3).Tensor.Pointer();
        void* m = call.Out(1).Tensor.Pointer(), v = call.Out(2).Tensor.Pointer();
        var n = call.Out(0).Tensor.numel();
        if (call.In(0).numel() != n || (weight != null && call.In(4).numel() != n))
            throw new InvalidOperationException("AdamW needs a master, and a weight beside a remainder, of its gradient's size");

        float b1 = (float)beta1, b2 = (float)beta2, c1 = (float)(1 - beta1), c2 = (float)(1 - beta2), scale = (float)clip;
        var keep = (float)(1 - (lr * decay));
        var rate = (float)(lr / (1 - Math.Pow(beta1, step)));
        var root = (float)(1 / Math.Sqrt(1 - Math.Pow(beta2, step)));
        var tiny = (float)eps;
        long i = 0;
        for (; i <= n - 8; i += 8)
        {
            var g = F32.Load8(grad.P, i) * scale;
            var m1 = (TFirst.Load8(m, i) * b1) + (g * c1);
            var v1 = (TSecond.Load8(v, i) * b2) + (g * g * c2);
            var p = (TMaster.Load8(weight, master, i) * keep) - (m1 * rate / ((Vector256.Sqrt(v1) * root) + Vector256.Create(tiny)));
            TFirst.Store8(m, i, m1);
            TSecond.Store8(v, i, v1);
            TMaster.Store8(param, master, i, p);
        }

        for (; i < n; i++)
        {
            var g = grad.Floats[i] * scale;
            var m1 = (TFirst.Load(m, i) * b1) + (g * c1);
            var v1 = (TSecond.Load(v, i) * b2) + (g * g * c2);
            var p = (TMaster.Load(weight, master, i) * keep) - (m1 * rate / ((MathF.Sqrt(v1) * root) + tiny));
            TFirst.Store(m, i, m1);
            TSecond.Store(v, i, v1);
            TMaster.Store(param, master, i, p);
        }
    }
}

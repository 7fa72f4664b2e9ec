// Rotary position embedding with YaRN (arXiv 2309.00071); pairs (x0, x1), (x2, x3), ... stay in place.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class RotaryKernels
{
    /// <summary>positions[s] or [b s] -> table[..., rope] fp32: cos of rope/2 frequencies, then sin, times mscale.</summary>
    public static void RotaryTable(in KernelCall call)
    {
        var positions = call.In(0);
        var rope = call.Int(0);
        var frequencies = Frequencies(rope, call.Float(1), call.Float(2), call.Float(3), call.Float(4), call.Float(5));
        var mscale = call.Float(6);
        using var table = new Result(call.Out(), ScalarType.Float32);
        var p = (long*)positions.Pointer();
        var half = rope / 2;
        for (long s = 0; s < positions.numel(); s++)
        {
            for (var i = 0; i < half; i++)
            {
                var angle = p[s] * frequencies[i];
                table.Floats[(s * rope) + i] = (float)(Math.Cos(angle) * mscale);
                table.Floats[(s * rope) + half + i] = (float)(Math.Sin(angle) * mscale);
            }
        }
    }

    /// <summary>Inverse frequencies as fp32, as the reference implementations hold them; factor 1 means no YaRN.</summary>
    internal static float[] Frequencies(int dim, double theta, double factor, double original, double betaFast, double betaSlow)
    {
        var result = new float[dim / 2];
        double low = 0, high = 0;
        if (factor != 1)
        {
            double Correction(double turns) => dim * Math.Log(original / (turns * 2 * Math.PI)) / (2 * Math.Log(theta));
            low = Math.Max(0, Math.Floor(Correction(betaFast)));
            high = Math.Min(dim - 1, Math.Ceiling(Correction(betaSlow)));
            if (low == high)
                high += 0.001;
        }

        for (var i = 0; i < result.Length; i++)
        {
            var frequency = 1 / Math.Pow(theta, 2.0 * i / dim);
            if (factor != 1)
            {
                var ramp = Math.Clamp((i - low) / (high - low), 0, 1);
                frequency = (frequency / factor * ramp) + (frequency * (1 - ramp));
            }

            result[i] = (float)frequency;
        }

        return result;
    }

    /// <summary>x[b s ... rope], table[s rope] or [b s rope] -> y; Int inverse.</summary>
    public static void Rope(in KernelCall call) => RotateLast(call);

    /// <summary>q[b s n d], table -> q with the last `rope` features of each head rotated; Int inverse.</summary>
    public static void RopeQ(in KernelCall call) => RotateLast(call);

    /// <summary>kv[b s n nope+v], kPe[b s rope], table -> k[b s n nope+rope], v[b s n v]; one pass.</summary>
    public static void RopeKv(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            JoinKv<BF16>(call);
        else
            JoinKv<F32>(call);
    }

    /// <summary>dk[b s n nope+rope], dv[b s n v], table -> dkv[b s n nope+v], dkPe[b s rope] summed over heads; one pass.</summary>
    public static void RopeKvGrad(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            SplitKv<BF16>(call);
        else
            SplitKv<F32>(call);
    }

    private static void RotateLast(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            RotateLast<BF16>(call);
        else
            RotateLast<F32>(call);
    }

    private static void RotateLast<T>(in KernelCall call)
        where T : struct, IElement
    {
        Tensor x = call.In(0), table = call.In(1);
        var shape = x.shape;
        int d = (int)shape[^1], rope = (int)table.shape[^1], keep = d - rope;
        long tokens = shape[0] * shape[1], positions = table.shape.Length == 3 ? tokens : shape[1];
        var heads = tokens == 0 ? 0 : x.numel() / (tokens * d);
        using var angles = Operand.Float(table);
        using var y = new Result(call.Out(), x.dtype);
        var px = x.Pointer();
        Span<float> turns = stackalloc float[2 * rope];
        fixed (float* turn = turns)
        {
            for (long t = 0; t < tokens; t++)
            {
                Expand(angles.Floats + (t % positions * rope), rope, call.Int(0) != 0, turn);
                for (long h = 0; h < heads; h++)
                {
                    var at = ((t * heads) + h) * d;
                    if (keep > 0)
                        Simd.Copy<T, T>(px, at, y.P, at, keep);
                    Rotate<T, T>(px, at + keep, y.P, at + keep, rope, turn);
                }
            }
        }
    }

    private static void JoinKv<T>(in KernelCall call)
        where T : struct, IElement
    {
        Tensor kv = call.In(0), table = call.In(2);
        var shape = kv.shape;
        int rope = (int)table.shape[1], nope = call.Int(0), value = (int)shape[3] - nope;
        long positions = shape[1], tokens = shape[0] * positions, heads = shape[2];
        using var kPe = new Operand(call.In(1), kv.dtype);
        using var angles = Operand.Float(table);
        using var k = new Result(call.Out(0), kv.dtype);
        using var v = new Result(call.Out(1), kv.dtype);
        var p = kv.Pointer();
        Span<float> turns = stackalloc float[2 * rope];
        Span<float> rotated = stackalloc float[rope];
        fixed (float* turn = turns, key = rotated)
        {
            for (long t = 0; t < tokens; t++)
            {
                Expand(angles.Floats + (t % positions * rope), rope, false, turn);
                Rotate<T, F32>(kPe.P, t * rope, key, 0, rope, turn);
                for (long h = 0; h < heads; h++)
                {
                    var head = (t * heads) + h;
                    var from = head * (nope + value);
                    var to = head * (nope + rope);
                    Simd.Copy<T, T>(p, from, k.P, to, nope);
                    Simd.Copy<F32, T>(key, 0, k.P, to + nope, rope);
                    Simd.Copy<T, T>(p, from + nope, v.P, head * value, value);
                }
            }
        }
    }

    private static void SplitKv<T>(in KernelCall call)
        where T : struct, IElement
    {
        Tensor dk = call.In(0), table = call.In(2);
        var shape = dk.shape;
        int rope = (int)table.shape[1], nope = call.Int(0), value = (int)call.In(1).shape[3];
        long positions = shape[1], tokens = shape[0] * positions, heads = shape[2];
        using var dv = new Operand(call.In(1), dk.dtype);
        using var angles = Operand.Float(table);
        using var dkv = new Result(call.Out(0), dk.dtype);
        using var dkPe = new Result(call.Out(1), dk.dtype);
        var p = dk.Pointer();
        Span<float> turns = stackalloc float[2 * rope];
        Span<float> sums = stackalloc float[rope];
        fixed (float* turn = turns, sum = sums)
        {
            for (long t = 0; t < tokens; t++)
            {
                sums.Clear();
                for (long h = 0; h < heads; h++)
                {
                    var head = (t * heads) + h;
                    var from = head * (nope + rope);
                    var to = head * (nope + value);
                    Simd.Copy<T, T>(p, from, dkv.P, to, nope);
                    Simd.Copy<T, T>(dv.P, head * value, dkv.P, to + nope, value);
                    var i = 0;
                    for (; i <= rope - 8; i += 8)
                        F32.Store8(sum, i, F32.Load8(sum, i) + T.Load8(p, from + nope + i));
                    for (; i < rope; i++)
                        sum[i] += T.Load(p, from + nope + i);
                }

                Expand(angles.Floats + (t % positions * rope), rope, true, turn);
                Rotate<F32, T>(sum, 0, dkPe.P, t * rope, rope, turn);
            }
        }
    }

    /// <summary>cos cos cos cos ..., then -sin sin -sin sin ...: a rotation is x * first + swapped(x) * second.</summary>
    private static void Expand(float* angles, int rope, bool inverse, float* turn)
    {
        var half = rope / 2;
        for (var i = 0; i < half; i++)
        {
            var sin = inverse ? -angles[half + i] : angles[half + i];
            turn[2 * i] = turn[(2 * i) + 1] = angles[i];
            turn[rope + (2 * i)] = -sin;
            turn[rope + (2 * i) + 1] = sin;
        }
    }

    private static void Rotate<TFrom, TTo>(void* from, long fi, void* to, long ti, int rope, float* turn)
        where TFrom : struct, IElement
        where TTo : struct, IElement
    {
        var i = 0;
        for (; i <= rope - 8; i += 8)
        {
            var x = TFrom.Load8(from, fi + i);
            var swapped = Vector256.Shuffle(x, Vector256.Create(1, 0, 3, 2, 5, 4, 7, 6));
            TTo.Store8(to, ti + i, (x * F32.Load8(turn, i)) + (swapped * F32.Load8(turn, rope + i)));
        }

        for (; i < rope; i += 2)
        {
            float x0 = TFrom.Load(from, fi + i), x1 = TFrom.Load(from, fi + i + 1);
            TTo.Store(to, ti + i, (x0 * turn[i]) + (x1 * turn[rope + i]));
            TTo.Store(to, ti + i + 1, (x1 * turn[i + 1]) + (x0 * turn[rope + i + 1]));
        }
    }
}

// fp32 and bf16 elements behind one generic surface, so that a kernel is written once and computes in fp32.
using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using TorchSharp;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>How an element type is read and written as fp32, one at a time and eight at a time.</summary>
internal unsafe interface IElement
{
    static abstract int Width { get; }

    static abstract float Load(void* p, long i);

    static abstract void Store(void* p, long i, float value);

    static abstract Vector256<float> Load8(void* p, long i);

    static abstract void Store8(void* p, long i, Vector256<float> value);
}

/// <summary>IEEE single precision.</summary>
internal readonly unsafe struct F32 : IElement
{
    public static int Width => 4;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Load(void* p, long i) => ((float*)p)[i];

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(void* p, long i, float value) => ((float*)p)[i] = value;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Load8(void* p, long i) => Vector256.Load((float*)p + i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store8(void* p, long i, Vector256<float> value) => value.Store((float*)p + i);
}

/// <summary>bfloat16, rounded to nearest even; a NaN stays a NaN.</summary>
internal readonly unsafe struct BF16 : IElement
{
    public static int Width => 2;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Load(void* p, long i) => BitConverter.UInt32BitsToSingle((uint)((ushort*)p)[i] << 16);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(void* p, long i, float value) => ((ushort*)p)[i] = Round(value);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Load8(void* p, long i)
    {
        var bits = Vector128.Load((ushort*)p + i);
        var (low, high) = Vector128.Widen(bits);
        return Vector256.ShiftLeft(Vector256.Create(low, high), 16).AsSingle();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store8(void* p, long i, Vector256<float> value)
    {
        var bits = value.AsUInt32();
        var odd = (bits >>> 16) & Vector256<uint>.One;
        var rounded = (bits + Vector256.Create(0x7FFFu) + odd) >>> 16;
        var number = Vector256.Equals(value, value).AsUInt32();
        var chosen = Vector256.ConditionalSelect(number, rounded, Vector256.Create(0x7FC0u));
        Vector128.Narrow(chosen.GetLower(), chosen.GetUpper()).Store((ushort*)p + i);
    }

    /// <summary>The nearest bfloat16, ties to even.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static ushort Round(float value)
    {
        var bits = BitConverter.SingleToUInt32Bits(value);
        return float.IsNaN(value) ? (ushort)0x7FC0 : (ushort)((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
    }
}

/// <summary>Sums whose order depends on the length only, so that they are equal on every run.</summary>
internal static unsafe class Simd
{
    /// <summary>Eight lanes added in a fixed order.</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Total(Vector256<float> v)
    {
        var half = v.GetLower() + v.GetUpper();
        return (half[0] + half[1]) + (half[2] + half[3]);
    }

    /// <summary>1 / (1 + exp(-x)).</summary>
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Sigmoid(Vector256<float> x) => Vector256<float>.One / (Vector256<float>.One + Vector256.Exp(-x));

    /// <summary>The sigmoid of n elements.</summary>
    public static void Sigmoid(float* from, float* to, int n)
    {
        var i = 0;
        for (; i <= n - 8; i += 8)
            Sigmoid(Vector256.Load(from + i)).Store(to + i);
        for (; i < n; i++)
            to[i] = Sigmoid(Vector256.Create(from[i]))[0];
    }

    /// <summary>exp(x - max) over their sum, for n elements.</summary>
    public static void Softmax(float* from, float* to, int n)
    {
        var largest = Max(from, n);
        var i = 0;
        for (; i <= n - 8; i += 8)
            Vector256.Exp(Vector256.Load(from + i) - Vector256.Create(largest)).Store(to + i);
        for (; i < n; i++)
            to[i] = MathF.Exp(from[i] - largest);
        var total = Sum(to, n);
        for (i = 0; i < n; i++)
            to[i] /= total;
    }

    /// <summary>The largest element; minus infinity of none.</summary>
    public static float Max(float* p, int n)
    {
        var largest = float.NegativeInfinity;
        var i = 0;
        if (n >= 8)
        {
            var tops = Vector256.Load(p);
            for (i = 8; i <= n - 8; i += 8)
                tops = Vector256.Max(tops, Vector256.Load(p + i));
            for (var lane = 0; lane < 8; lane++)
                largest = Math.Max(largest, tops[lane]);
        }

        for (; i < n; i++)
            largest = Math.Max(largest, p[i]);
        return largest;
    }

    /// <summary>The sum of n elements.</summary>
    public static float Sum(float* p, int n)
    {
        var sum = Vector256<float>.Zero;
        var i = 0;
        for (; i <= n - 8; i += 8)
            sum += Vector256.Load(p + i);
        var total = Total(sum);
        for (; i < n; i++)
            total += p[i];
        return total;
    }

    /// <summary>a . b over n elements.</summary>
    public static float Dot<TA, TB>(void* a, long ai, void* b, long bi, int n)
        where TA : struct, IElement
        where TB : struct, IElement
    {
        var sum = Vector256<float>.Zero;
        var i = 0;
        for (; i <= n - 8; i += 8)
            sum += TA.Load8(a, ai + i) * TB.Load8(b, bi + i);
        var total = Total(sum);
        for (; i < n; i++)
            total += TA.Load(a, ai + i) * TB.Load(b, bi + i);
        return total;
    }

    /// <summary>Copies n elements, converting between types.</summary>
    public static void Copy<TFrom, TTo>(void* from, long fi, void* to, long ti, long n)
        where TFrom : struct, IElement
        where TTo : struct, IElement
    {
        if (typeof(TFrom) == typeof(TTo))
        {
            Buffer.MemoryCopy((byte*)from + (fi * TFrom.Width), (byte*)to + (ti * TTo.Width), n * TTo.Width, n * TTo.Width);
            return;
        }

        long i = 0;
        for (; i <= n - 8; i += 8)
            TTo.Store8(to, ti + i, TFrom.Load8(from, fi + i));
        for (; i < n; i++)
            TTo.Store(to, ti + i, TFrom.Load(from, fi + i));
    }

    /// <summary>True for bf16, false for fp32; anything else is a bug of the plan.</summary>
    public static bool IsBFloat16(torch.ScalarType type)
        => type switch
        {
            torch.ScalarType.BFloat16 => true,
            torch.ScalarType.Float32 => false,
            _ => throw new UnreachableException($"a float kernel got {type}; this is a bug in dsg"),
        };
}

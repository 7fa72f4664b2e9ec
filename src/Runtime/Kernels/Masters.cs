// Where the fp32 master of a weight lies: whole beside the weight, or as the bits that a bf16 weight lacks.
using System.Diagnostics;
using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>How a master is read and, with the weight that follows from it, written; one at a time and eight at a time.</summary>
internal unsafe interface IMaster
{
    static abstract float Load(void* weight, void* master, long i);

    static abstract void Store(void* weight, void* master, long i, float value);

    static abstract Vector256<float> Load8(void* weight, void* master, long i);

    static abstract void Store8(void* weight, void* master, long i, Vector256<float> value);
}

/// <summary>fp32, beside a weight that is it rounded to nearest even.</summary>
internal readonly unsafe struct Beside<TWeight> : IMaster
    where TWeight : struct, IElement
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Load(void* weight, void* master, long i) => F32.Load(master, i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(void* weight, void* master, long i, float value)
    {
        F32.Store(master, i, value);
        TWeight.Store(weight, i, value);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Load8(void* weight, void* master, long i) => F32.Load8(master, i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store8(void* weight, void* master, long i, Vector256<float> value)
    {
        F32.Store8(master, i, value);
        TWeight.Store8(weight, i, value);
    }
}

/// <summary>
/// A bf16 weight and an i16 remainder, as KernelId.AdamW says: (weight &lt;&lt; 16) + remainder are the master's bits, of every fp32 number.
/// That leaves the weight of a tie no choice: the 65,537 masters that round to an even bf16 number do not fit into 16 bits, so that ties
/// go away from zero; the same bits as TransformerEngine's FusedAdam with store_param_remainders, but for NaN, which stays one.
/// </summary>
internal readonly unsafe struct Halves : IMaster
{
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Load(void* weight, void* master, long i)
        => BitConverter.Int32BitsToSingle((((ushort*)weight)[i] << 16) + ((short*)master)[i]);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(void* weight, void* master, long i, float value)
    {
        HighHalf.Store(weight, i, value);
        LowHalf.Store(master, i, value);
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Load8(void* weight, void* master, long i)
    {
        var (low, high) = Vector128.Widen(Vector128.Load((short*)master + i));
        return (BF16.Load8(weight, i).AsInt32() + Vector256.Create(low, high)).AsSingle();
    }

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store8(void* weight, void* master, long i, Vector256<float> value)
    {
        HighHalf.Store8(weight, i, value);
        LowHalf.Store8(master, i, value);
    }

    /// <summary>n masters in fp32.</summary>
    public static void Join(void* weight, void* remainder, float* master, long n)
    {
        long i = 0;
        for (; i <= n - 8; i += 8)
            Load8(weight, remainder, i).Store(master + i);
        for (; i < n; i++)
            master[i] = Load(weight, remainder, i);
    }
}

/// <summary>The weight of a master in halves: its nearest bf16, of two equally near the one away from zero. Read as bf16.</summary>
internal readonly unsafe struct HighHalf : IElement
{
    public static int Width => 2;

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static float Load(void* p, long i) => BF16.Load(p, i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(void* p, long i, float value)
        => ((ushort*)p)[i] = float.IsNaN(value) ? (ushort)0x7FC0 : (ushort)((BitConverter.SingleToUInt32Bits(value) + 0x8000u) >> 16);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static Vector256<float> Load8(void* p, long i) => BF16.Load8(p, i);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store8(void* p, long i, Vector256<float> value)
    {
        var rounded = (value.AsUInt32() + Vector256.Create(0x8000u)) >>> 16;
        var number = Vector256.Equals(value, value).AsUInt32();
        var chosen = Vector256.ConditionalSelect(number, rounded, Vector256.Create(0x7FC0u));
        Vector128.Narrow(chosen.GetLower(), chosen.GetUpper()).Store((ushort*)p + i);
    }
}

/// <summary>The remainder of a master in halves: the low 16 bits, 0 of a NaN. Of itself no number, so that it is written only.</summary>
internal readonly unsafe struct LowHalf : IElement
{
    public static int Width => 2;

    public static float Load(void* p, long i) => throw Alone();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store(void* p, long i, float value)
        => ((short*)p)[i] = float.IsNaN(value) ? (short)0 : (short)BitConverter.SingleToUInt32Bits(value);

    public static Vector256<float> Load8(void* p, long i) => throw Alone();

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    public static void Store8(void* p, long i, Vector256<float> value)
    {
        var bits = value.AsUInt32() & Vector256.Equals(value, value).AsUInt32();
        Vector128.Narrow(bits.GetLower(), bits.GetUpper()).Store((ushort*)p + i);
    }

    private static UnreachableException Alone() => new("a remainder was read without its weight; this is a bug in dsg");
}

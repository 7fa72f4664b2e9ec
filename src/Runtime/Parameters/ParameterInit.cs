// Initial values: a counter-based function of (seed, parameter name, global element), so that every layout starts alike.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Parameters;

/// <summary>Fills a rank's shard without looking at any other rank.</summary>
public static unsafe class ParameterInit
{
    /// <summary>Fills an fp32 or bf16 tensor that holds the box `shard` of a parameter.</summary>
    public static void Fill(Tensor local, Shard shard, Init init, string name, ulong seed)
    {
        if (Simd.IsBFloat16(local.dtype))
            Fill<BF16>(local, shard, init, name, seed);
        else
            Fill<F32>(local, shard, init, name, seed);
    }

    /// <summary>As elements of T, which a tensor of its width holds.</summary>
    internal static void Fill<T>(Tensor local, Shard shard, Init init, string name, ulong seed)
        where T : struct, IElement
    {
        // a rank that computes on a GPU has the cores to itself
        var spread = local.device_type != TorchSharp.DeviceType.CPU;
        local.FillOnHost(host =>
        {
            var p = (nint)host.Pointer();
            if (init is Init.Normal { Std: var std })
            {
                var key = Key(name, seed);
                shard.ForEachRun((g, l, n) => Each(spread, n, (at, count) => Normals<T>(key, std, g + at, (void*)p, l + at, count)));
                return;
            }

            for (long i = 0, n = host.numel(); i < n; i++)
                T.Store((void*)p, i, init.IsOnes ? 1f : 0f);
        });
    }

    /// <summary>All of n elements in one go, or piece by piece on all cores.</summary>
    private static void Each(bool spread, long n, System.Action<long, long> fill)
    {
        const long Piece = 1 << 18;
        if (!spread || n <= Piece)
            fill(0, n);
        else
            Parallel.For(0, (n + Piece - 1) / Piece, i => fill(i * Piece, Math.Min(Piece, n - (i * Piece))));
    }

    /// <summary>Element `index` of a parameter drawn from Normal(0, std).</summary>
    public static float Normal(string name, ulong seed, double std, long index)
    {
        var (even, odd) = Pair(Key(name, seed), index >> 1);
        return (float)(std * ((index & 1) == 0 ? even : odd));
    }

    private static void Normals<T>(ulong key, double std, long global, void* p, long local, long n)
        where T : struct, IElement
    {
        long i = 0;
        while (i < n)
        {
            var (even, odd) = Pair(key, (global + i) >> 1);
            if (((global + i) & 1) == 0)
            {
                T.Store(p, local + i++, (float)(std * even));
                if (i == n)
                    return;
            }

            T.Store(p, local + i++, (float)(std * odd));
        }
    }

    /// <summary>Two independent normal values by Box and Muller.</summary>
    private static (double Even, double Odd) Pair(ulong key, long pair)
    {
        var first = Mix(key + (0x9E3779B97F4A7C15UL * ((2 * (ulong)pair) + 1)));
        var second = Mix(key + (0x9E3779B97F4A7C15UL * ((2 * (ulong)pair) + 2)));
        var radius = Math.Sqrt(-2 * Math.Log(((first >> 11) + 1) * Unit));
        var (sin, cos) = Math.SinCos(2 * Math.PI * ((second >> 11) * Unit));
        return (radius * cos, radius * sin);
    }

    private const double Unit = 1.0 / (1L << 53);

    /// <summary>FNV-1a of the name, mixed with the seed.</summary>
    private static ulong Key(string name, ulong seed)
    {
        var hash = 0xCBF29CE484222325UL;
        foreach (var b in System.Text.Encoding.UTF8.GetBytes(name))
            hash = (hash ^ b) * 0x100000001B3UL;
        return Mix(hash ^ Mix(seed + 0x9E3779B97F4A7C15UL));
    }

    /// <summary>The finaliser of SplitMix64 (Steele, Lea and Flood 2014).</summary>
    internal static ulong Mix(ulong z)
    {
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9UL;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBUL;
        return z ^ (z >> 31);
    }
}

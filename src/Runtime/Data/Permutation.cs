// A seeded shuffle of 0..n-1 that is computed, not stored: any rank finds any place in it alone.

using System.Numerics;

namespace DeepSeekGraph.Runtime.Data;

/// A Feistel network on the next even power of two, walked until it lands below `count` (at most 4 steps on average).
public readonly struct Permutation
{
    private const int Rounds = 6;

    private readonly ulong _key;
    private readonly int _halfBits;

    /// The permutation of 0..count-1 that belongs to (seed, epoch).
    public Permutation(long count, ulong seed, long epoch)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(count);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(count, 1L << 62);
        Count = count;
        _key = Mix(Mix(seed) + (ulong)epoch);
        _halfBits = (BitOperations.Log2((ulong)Math.Max(count - 1, 1)) / 2) + 1;
    }

    /// How many numbers are permuted.
    public long Count { get; }

    /// Where `index` goes; every number below Count is hit exactly once.
    public long this[long index]
    {
        get
        {
            ArgumentOutOfRangeException.ThrowIfNegative(index);
            ArgumentOutOfRangeException.ThrowIfGreaterThanOrEqual(index, Count);
            var value = (ulong)index;
            do
            {
                value = Shuffle(value);
            }
            while (value >= (ulong)Count);
            return (long)value;
        }
    }

    /// SplitMix64's output function: every bit of the result depends on every bit of the input.
    public static ulong Mix(ulong value)
    {
        value += 0x9E3779B97F4A7C15;
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9;
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB;
        return value ^ (value >> 31);
    }

    private ulong Shuffle(ulong value)
    {
        var mask = (1UL << _halfBits) - 1;
        var (left, right) = (value >> _halfBits, value & mask);
        for (var round = 0UL; round < Rounds; round++)
        {
            (left, right) = (right, left ^ (Mix(_key ^ Mix((right << 8) | round)) & mask));
        }

        return (left << _halfBits) | right;
    }
}

// Counts the bytes a rank holds, by slot kind, and the most it ever held.
namespace DeepSeekGraph.Runtime.Memory;

/// <summary>Bytes now and at the peak; used by one thread.</summary>
public sealed class MemoryMeter
{
    private const int Kinds = 9;
    private readonly long[] _live = new long[Kinds];
    private readonly long[] _peaks = new long[Kinds];

    /// <summary>Bytes held now.</summary>
    public long Live { get; private set; }

    /// <summary>Most bytes held at once.</summary>
    public long Peak { get; private set; }

    /// <summary>Most bytes held at once in slots of one kind.</summary>
    public long PeakOf(SlotKind kind) => _peaks[kind.Tag];

    /// <summary>Bytes held now in slots of one kind.</summary>
    public long LiveOf(SlotKind kind) => _live[kind.Tag];

    /// <summary>Adds bytes (negative: takes them away) of a kind.</summary>
    public void Change(SlotKind kind, long bytes)
    {
        Live += bytes;
        Peak = Math.Max(Peak, Live);
        var live = _live[kind.Tag] += bytes;
        _peaks[kind.Tag] = Math.Max(_peaks[kind.Tag], live);
    }
}

// What a rank's last collectives were and how far they got, for the message of a fault.
using System.Diagnostics;
using System.Globalization;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>How far a collective got.</summary>
internal enum FlightState
{
    /// <summary>The host prepares it.</summary>
    Preparing,

    /// <summary>The GPU has it to do.</summary>
    Queued,

    /// <summary>The GPU has done it.</summary>
    Done,
}

/// <summary>
/// One collective: its number among those of the rank, from 1; `bytes` that the rank brought. Its kind becomes text only where somebody reads
/// it: F# takes more than 100 us for that.
/// </summary>
internal sealed class Flight(long number, Collective kind, string group, long bytes)
{
    private readonly long _begin = Stopwatch.GetTimestamp();

    public long Number => number;

    public string What => $"{kind} on {group}";

    public FlightState State { get; set; }

    /// <summary>Since it was started.</summary>
    public TimeSpan Age => Stopwatch.GetElapsedTime(_begin);

    public override string ToString()
        => string.Create(
            CultureInfo.InvariantCulture,
            $"#{number} {kind} on {group}, {bytes} bytes, {State.ToString().ToLowerInvariant()}, started {Age.TotalSeconds:F1} s ago");
}

/// <summary>The last `length` collectives. Any thread may read.</summary>
internal sealed class FlightRecord(int length = FlightRecord.Length)
{
    public const int Length = 32;

    private readonly Queue<Flight> _last = new();
    private readonly Lock _lock = new();
    private long _count;

    public Flight Add(Collective kind, string group, long bytes)
    {
        lock (_lock)
        {
            var flight = new Flight(++_count, kind, group, bytes);
            _last.Enqueue(flight);
            if (_last.Count > length)
                _last.Dequeue();
            return flight;
        }
    }

    /// <summary>The oldest first.</summary>
    public IReadOnlyList<Flight> Last
    {
        get
        {
            lock (_lock)
                return [.. _last];
        }
    }

    /// <summary>As text, a line each, which begins with the rank.</summary>
    public string Text(int rank)
    {
        var last = Last;
        if (last.Count == 0)
            return $"rank {rank}: no collective was started";
        return string.Join('\n', (IEnumerable<string>)[$"rank {rank}: the last {last.Count} collectives, the oldest first", .. last.Select(f => $"rank {rank}:   {f}")]);
    }
}

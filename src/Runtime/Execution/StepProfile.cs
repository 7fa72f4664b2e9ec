// Where a rank's time goes: nanoseconds and calls by kernel, and time spent waiting for other ranks.
using System.Diagnostics;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>Totals of one rank; used by one thread, read between steps.</summary>
public sealed class StepProfile
{
    private readonly Dictionary<string, (long Ticks, long Calls)> _totals = [];

    /// <summary>Milliseconds and calls by name, longest first.</summary>
    public IReadOnlyList<(string Name, double Milliseconds, long Calls)> Totals
        => [.. _totals.Select(t => (t.Key, t.Value.Ticks * 1e3 / Stopwatch.Frequency, t.Value.Calls)).OrderByDescending(t => t.Item2).ThenBy(t => t.Key, StringComparer.Ordinal)];

    /// <summary>Steps counted.</summary>
    public int Steps { get; internal set; }

    /// <summary>Forgets what was counted.</summary>
    public void Reset()
    {
        _totals.Clear();
        Steps = 0;
    }

    internal void Add(string name, long begin)
    {
        var (ticks, calls) = _totals.GetValueOrDefault(name);
        _totals[name] = (ticks + Stopwatch.GetTimestamp() - begin, calls + 1);
    }
}

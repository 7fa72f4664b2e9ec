// How much of a step's communication is hidden behind compute: arithmetic on intervals of time.
using System.Text.RegularExpressions;

namespace DeepSeekGraph.Runtime.Telemetry;

/// <summary>From Begin to End, which is not before it.</summary>
public readonly record struct Interval(long Begin, long End);

/// <summary>The union of intervals.</summary>
public sealed class Cover
{
    private readonly List<Interval> _parts = [];
    private readonly List<long> _before = [];

    public Cover(IEnumerable<Interval> intervals)
    {
        foreach (var next in intervals.Where(i => i.End > i.Begin).OrderBy(i => i.Begin))
        {
            if (_parts.Count > 0 && next.Begin <= _parts[^1].End)
                _parts[^1] = new Interval(_parts[^1].Begin, Math.Max(_parts[^1].End, next.End));
            else
                _parts.Add(next);
        }

        foreach (var part in _parts)
        {
            _before.Add(Length);
            Length += part.End - part.Begin;
        }
    }

    /// <summary>Disjoint, in order.</summary>
    public IReadOnlyList<Interval> Parts => _parts;

    /// <summary>Of all parts.</summary>
    public long Length { get; }

    /// <summary>How much of an interval lies outside.</summary>
    public long Outside(Interval interval) => interval.End - interval.Begin - (Before(interval.End) - Before(interval.Begin));

    /// <summary>How much of this lies outside another.</summary>
    public long Outside(Cover other) => _parts.Sum(other.Outside);

    /// <summary>How much lies before a time.</summary>
    private long Before(long time)
    {
        var (low, high) = (0, _parts.Count);
        while (low < high)
        {
            var middle = (low + high) / 2;
            if (_parts[middle].Begin < time)
                low = middle + 1;
            else
                high = middle;
        }

        return low == 0 ? 0 : _before[low - 1] + Math.Min(time, _parts[low - 1].End) - _parts[low - 1].Begin;
    }
}

/// <summary>Collectives of one kind and group that came from one module of any layer: how many, how long, and how much of that while nothing was computed.</summary>
public sealed record CollectiveShare(string Kind, string Path, string Group, int Count, long Time, long Exposed);

/// <summary>Of one step of one rank, in nanoseconds.</summary>
/// <param name="Length">The whole step.</param>
/// <param name="Compute">While something was computed.</param>
/// <param name="Communication">While at least one collective was under way, on any lane.</param>
/// <param name="Exposed">The part of that in which nothing was computed.</param>
/// <param name="HostWait">While the thread that runs the rank waited.</param>
public sealed partial record Overlap(long Length, long Compute, long Communication, long Exposed, long HostWait)
{
    /// <summary>While nothing was computed.</summary>
    public long Idle => Length - Compute;

    /// <summary>The share of communication that was hidden; null where there was none.</summary>
    public double? HiddenShare => Communication == 0 ? null : 1 - ((double)Exposed / Communication);

    /// <summary>The most exposed ones first. What several lanes expose at one time counts for each.</summary>
    public IReadOnlyList<CollectiveShare> Collectives { get; private init; } = [];

    /// <summary>From intervals on each kind of thread.</summary>
    public static Overlap Of(long length, IEnumerable<Interval> compute, IEnumerable<Interval> communication, IEnumerable<Interval> hostWaits)
    {
        var (busy, under) = (new Cover(compute), new Cover(communication));
        return new Overlap(length, busy.Length, under.Length, under.Outside(busy), new Cover(hostWaits).Length);
    }

    /// <summary>Of a trace, with its collectives by kind and path.</summary>
    public static Overlap Of(StepTrace trace)
    {
        IEnumerable<Interval> On(TraceLane lane) => trace.Events.Where(e => e.Lane == lane).Select(Time);
        var busy = new Cover(On(TraceLane.Compute));
        return Of(trace.Length, busy.Parts, On(TraceLane.Communication), On(TraceLane.Host)) with
        {
            Collectives = [.. trace.Events
                .Where(e => e.Lane == TraceLane.Communication)
                .GroupBy(e => (e.Kind, Path: AnyLayer(e.Path), e.Group))
                .Select(g => new CollectiveShare(
                    g.Key.Kind,
                    g.Key.Path,
                    g.Key.Group,
                    g.Count(e => e.Name == e.Kind),
                    g.Sum(e => e.End - e.Begin),
                    g.Sum(e => busy.Outside(Time(e)))))
                .OrderByDescending(c => c.Exposed)
                .ThenBy(c => c.Path, StringComparer.Ordinal)
                .ThenBy(c => c.Kind, StringComparer.Ordinal)
                .ThenBy(c => c.Group, StringComparer.Ordinal)],
        };
    }

    /// <summary>A module path with * for the numbers in it: layers and experts.</summary>
    internal static string AnyLayer(string path) => Numbers().Replace(path, "*");

    private static Interval Time(TraceEvent e) => new(e.Begin, e.End);

    [GeneratedRegex(@"(?<=^|\.)\d+(?=\.|$)", RegexOptions.CultureInvariant)]
    private static partial Regex Numbers();
}

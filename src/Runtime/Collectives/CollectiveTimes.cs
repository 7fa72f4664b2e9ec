// When one collective of a traced step was under way, noted by whoever carries it out.
using DeepSeekGraph.Runtime.Telemetry;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>
/// Marks are of the rank's clock. What works on streams notes Begin and End; of the others it is known when Start began and Wait
/// returned. `before`: a mark before Start.
/// </summary>
internal sealed class CollectiveTimes(IStepClock clock, long before)
{
    private readonly List<(long Begin, long End)> _hostWaits = [];
    private long _join;

    /// <summary>Before Start.</summary>
    public long Before => before;

    /// <summary>When its stream came to it; null where there is no stream.</summary>
    public long? Begun { get; private set; }

    /// <summary>When its stream was through.</summary>
    public long? Ended { get; private set; }

    /// <summary>When stream 0 had copied together what is sent, since Before.</summary>
    public long? Packed { get; private set; }

    /// <summary>Work on stream 0 behind it.</summary>
    public (long Begin, long End)? Join { get; private set; }

    /// <summary>When the last member had come, as HostTime; null where nobody can say.</summary>
    public long? Met { get; private set; }

    /// <summary>What the host waited for its stream, as HostTime.</summary>
    public IReadOnlyList<(long Begin, long End)> HostWaits => _hostWaits;

    public void Pack() => Packed = clock.Mark(0);

    public void Begin(nint stream) => Begun = clock.Mark(stream);

    public void End(nint stream) => Ended = clock.Mark(stream);

    public void BeginJoin() => _join = clock.Mark(0);

    public void EndJoin() => Join = (_join, clock.Mark(0));

    public void HostWaited(long begin) => _hostWaits.Add((begin, HostTime.Now));

    public void Meet(long at) => Met = at;
}

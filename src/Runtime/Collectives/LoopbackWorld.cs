// What the ranks of one process share: meeting places, and the first error of the job.
using System.Collections.Concurrent;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>The meeting places of a job in one process. Dispose after its ranks have ended.</summary>
public sealed class LoopbackWorld : IWorld
{
    private readonly ConcurrentDictionary<(int Group, int Stage, int Place, int To), Lane> _lanes = new();
    private readonly CancellationTokenSource _stop = new();
    private Exception? _firstError;

    public int Processes => 1;

    public int Process => 0;

    /// <summary>Cancelled when a rank failed or the job was cancelled.</summary>
    public CancellationToken Stop => _stop.Token;

    /// <summary>Counts what the exchange of routed rows would send between and inside nodes; null: nothing is counted.</summary>
    public Traffic? Traffic { get; init; }

    /// <summary>The error that stopped the job; null while it runs.</summary>
    public Exception? FirstError => _firstError;

    /// <summary>Wakes every waiting rank; the first error is kept.</summary>
    public void Abort(Exception error)
    {
        Interlocked.CompareExchange(ref _firstError, error, null);
        _stop.Cancel();
    }

    /// <summary>Nobody asks: a process that is gone takes all ranks with it.</summary>
    public Func<string>? Whereabouts
    {
        set { }
    }

    public bool Owns(int rank) => true;

    /// <summary>The collectives of one rank.</summary>
    public ICollectives For(RankContext rank, IReadOnlyList<Group> groups, RankDevice? device = null) => new LoopbackCollectives(this, rank);

    public byte[] Meet(string topic, byte[] mine, Func<IReadOnlyList<byte[]>, byte[]> decide, CancellationToken stop) => decide([mine]);

    public void Dispose()
    {
        foreach (var lane in _lanes.Values)
            lane.Dispose();
        _stop.Dispose();
    }

    internal Lane Lane(int group, int stage, int place, int to)
        => _lanes.GetOrAdd((group, stage, place, to), static _ => new Lane());
}

/// <summary>Meetings of one group, numbered in the order in which every member starts them.</summary>
internal sealed class Lane : IDisposable
{
    private readonly Dictionary<long, Exchange> _open = [];
    private readonly Lock _lock = new();

    public Exchange Open(long number, int members)
    {
        lock (_lock)
        {
            if (!_open.TryGetValue(number, out var exchange))
                _open[number] = exchange = new Exchange(members, members);
            return exchange;
        }
    }

    public void Close(long number)
    {
        lock (_lock)
            _open.Remove(number);
    }

    public void Dispose()
    {
        lock (_lock)
        {
            foreach (var exchange in _open.Values)
                exchange.Dispose();
            _open.Clear();
        }
    }
}

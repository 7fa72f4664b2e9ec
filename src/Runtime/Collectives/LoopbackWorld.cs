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
    private readonly LocalFabric _fabric = new();
    private readonly ConcurrentDictionary<int, int> _asked = new();
    private readonly ConcurrentBag<NcclCollectives> _made = [];
    private Exception? _firstError;

    public int Processes => 1;

    public int Process => 0;

    /// <summary>Cancelled when a rank failed or the job was cancelled.</summary>
    public CancellationToken Stop => _stop.Token;

    /// <summary>
    /// Counts what the exchange of routed rows would send between and inside nodes; as on GPUs, what a rank does send to another one (not sums and
    /// gathers). Null: nothing is counted.
    /// </summary>
    public Traffic? Traffic { get; init; }

    /// <summary>On the processor, collectives as ranks that share a GPU have them: by another way, with the same bits.</summary>
    public bool AsOnGpus { get; init; }

    /// <summary>What was handed over as on GPUs and nobody took.</summary>
    internal int Left => _fabric.Left;

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

    public ICollectives For(RankContext rank, JobShape job, RankDevice? device = null)
        => AsOnGpus || (device is { IsCuda: true } && job.Ranks > 1) ? Shared(rank, job, device ?? RankDevice.Cpu) : new LoopbackCollectives(this, rank);

    public byte[] Meet(string topic, byte[] mine, Func<IReadOnlyList<byte[]>, byte[]> decide, CancellationToken stop) => decide([mine]);

    public void Dispose()
    {
        foreach (var one in _made)
            one.Dispose();
        _fabric.Dispose();
        foreach (var lane in _lanes.Values)
            lane.Dispose();
        _stop.Dispose();
    }

    /// <summary>What GPUs do, with memory that all ranks see in NCCL's place. Who waits here waits for threads of this process: no time is too long.</summary>
    private NcclCollectives Shared(RankContext rank, JobShape job, RankDevice device)
    {
        // ranks ask in one order, each on its own thread
        var world = BitConverter.GetBytes(_asked.AddOrUpdate(rank.Rank, 0, static (_, before) => before + 1));
        var made = new NcclCollectives(
            new LocalCalls(_fabric, device, Stop, Traffic),
            rank,
            job.Groups,
            _ => world,
            new NcclJob(job.Ranks, Stop)
            {
                Dispatches = job.Dispatches,
                Device = device.Torch,
                Abort = Abort,
                FirstError = () => FirstError,
                Tell = static _ => { },
                Grace = TimeSpan.Zero,
                Timeout = TimeSpan.MaxValue,
            });
        _made.Add(made);
        return made;
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

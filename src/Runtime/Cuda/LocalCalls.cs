// In NCCL's place where ranks are threads of one process and share a device: what members bring is copied, and handed over in memory.
using System.Collections.Concurrent;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Where the ranks of a process meet. Dispose after them.</summary>
internal sealed class LocalFabric : IDisposable
{
    private readonly ConcurrentDictionary<(string Communicator, int From, int To), BlockingCollection<Tensor>> _letters = new();

    /// <summary>Letters that nobody took.</summary>
    public int Left => _letters.Values.Sum(letters => letters.Count);

    /// <summary>Hands over a tensor, which is the receiver's from now on.</summary>
    public void Post(string communicator, int from, int to, Tensor letter) => Letters(communicator, from, to).Add(letter);

    /// <summary>The next letter of a member, when it comes; StoppedException where the job ends before.</summary>
    public Tensor Take(string communicator, int from, int to, CancellationToken stop)
    {
        try
        {
            return Letters(communicator, from, to).Take(stop);
        }
        catch (OperationCanceledException)
        {
            throw new StoppedException("another rank stopped the job");
        }
    }

    public void Dispose()
    {
        foreach (var letters in _letters.Values)
        {
            while (letters.TryTake(out var letter))
                letter.Dispose();
            letters.Dispose();
        }
    }

    private BlockingCollection<Tensor> Letters(string communicator, int from, int to)
        => _letters.GetOrAdd((communicator, from, to), static _ => []);
}

/// <summary>A communicator of one rank: its name, the members' ranks in the job, and the rank's place among them.</summary>
internal sealed record LocalCommunicator(string Name, int[] Ranks, int Me)
{
    public int Size => Ranks.Length;

    /// <summary>Parts that were made of it.</summary>
    public int Splits { get; set; }
}

/// <summary>
/// One rank's calls. All ranks work on stream 0 of the device, so that what one has queued before it posts a letter has happened for whoever
/// takes that. A stream here is a list of what is yet to be taken: it is worked off, in order, when stream 0 follows it. Sums are the
/// loopback's: in member order, in fp32 for bf16. `traffic` counts what is sent to one member.
/// </summary>
internal sealed class LocalCalls(LocalFabric fabric, RankDevice device, CancellationToken stop, Traffic? traffic = null) : INcclCalls
{
    private readonly List<LocalCommunicator> _communicators = [];
    private readonly Dictionary<nint, Queue<System.Action>> _streams = [];
    private readonly ConcurrentDictionary<nint, Mark> _events = new();
    private nint _handles;

    public IRowWork Rows { get; } = device.IsCuda ? new CudaRowWork() : new HostRowWork();

    /// <summary>The rank's own, in the order in which they were made.</summary>
    public IReadOnlyList<LocalCommunicator> Communicators => _communicators;

    public void Enter()
    {
        if (device.IsCuda)
            Driver.Enter(device.Index);
    }

    public byte[] NewId() => Guid.NewGuid().ToByteArray();

    public nint Join(byte[] id, int ranks, int rank) => Add(new LocalCommunicator(Convert.ToHexString(id), [.. Enumerable.Range(0, ranks)], rank));

    public nint Split(nint communicator, int color, int key)
    {
        var whole = Of(communicator);
        var number = ++whole.Splits;
        using var mine = tensor((int[])[color, key]);
        var all = new (int Color, int Key)[whole.Size];
        Hand(whole, _ => mine.clone());
        for (var member = 0; member < whole.Size; member++)
        {
            using var told = fabric.Take(whole.Name, member, whole.Me, stop);
            all[member] = (told[0].item<int>(), told[1].item<int>());
        }

        if (color < 0)
            return 0;
        int[] members = [.. Enumerable.Range(0, whole.Size).Where(m => all[m].Color == color).OrderBy(m => all[m].Key)];
        return Add(new LocalCommunicator($"{whole.Name}/{number}:{color}", [.. members.Select(m => whole.Ranks[m])], Array.IndexOf(members, whole.Me)));
    }

    public void Close(nint communicator)
    {
    }

    public void Abort(nint communicator)
    {
    }

    public string? Fault(nint communicator) => null;

    public void Begin()
    {
    }

    public void End()
    {
    }

    public void AllReduce(nint communicator, nint from, nint to, long count, ScalarType type, bool max, nint stream)
    {
        var members = Of(communicator);
        var mine = Copied(from, count, type);
        Hand(members, _ => mine.alias());
        mine.Dispose();
        Later(stream, () => Reduce(members, type, max, to));
    }

    public void ReduceScatter(nint communicator, nint from, nint to, long count, ScalarType type, nint stream)
    {
        var members = Of(communicator);
        var mine = Copied(from, count * members.Size, type);
        Hand(members, peer => mine.narrow(0, peer * count, count));
        mine.Dispose();
        Later(stream, () => Reduce(members, type, false, to));
    }

    public void AllGather(nint communicator, nint from, nint to, long bytes, nint stream)
    {
        var members = Of(communicator);
        var mine = Copied(from, bytes, ScalarType.Byte);
        Hand(members, _ => mine.alias());
        mine.Dispose();
        Later(stream, () =>
        {
            for (var member = 0; member < members.Size; member++)
                Deliver(members, member, to + (member * (nint)bytes), bytes);
        });
    }

    public void Send(nint communicator, nint from, long bytes, int peer, nint stream)
    {
        var members = Of(communicator);
        traffic?.Add(members.Ranks[members.Me], members.Ranks[peer], bytes);
        fabric.Post(members.Name, members.Me, peer, Copied(from, bytes, ScalarType.Byte));
    }

    public void Receive(nint communicator, nint to, long bytes, int peer, nint stream)
        => Later(stream, () => Deliver(Of(communicator), peer, to, bytes));

    /// <summary>At once: what is copied is there, and nobody reads the copy before the collective is over.</summary>
    public void Copy(nint from, nint to, long bytes, nint stream) => Move(from, to, bytes);

    public void ToHost(nint from, nint to, long bytes, nint stream)
        => Later(stream, () =>
        {
            if (!device.IsCuda)
            {
                Move(from, to, bytes);
                return;
            }

            Driver.ToHost(from, to, bytes, 0);
            Driver.Synchronize();
        });

    public void Then(nint stream, System.Action<nint> work) => Later(stream, () => work(0));

    public nint Pinned(long bytes) => device.IsCuda ? Driver.Pinned(bytes) : System.Runtime.InteropServices.Marshal.AllocHGlobal((nint)bytes);

    public nint Where(nint stream) => 0;

    public nint NewStream()
    {
        _streams[++_handles] = [];
        return _handles;
    }

    public nint NewEvent() => ++_handles;

    /// <summary>Behind what the stream has left to do; on stream 0 everything has its place already.</summary>
    public void Record(nint @event, nint stream)
    {
        var mark = new Mark(stream);
        _events[@event] = mark;
        if (stream == 0 || _streams[stream].Count == 0)
            mark.IsDone = true;
        else
            Later(stream, () => mark.IsDone = true);
    }

    /// <summary>Only stream 0 has to wait: others begin nothing before somebody follows them.</summary>
    public void Follow(nint stream, nint @event)
    {
        if (stream != 0)
            return;
        var mark = _events[@event];
        while (!mark.IsDone)
            _streams[mark.Stream].Dequeue()();
    }

    public bool IsDone(nint @event) => _events[@event].IsDone;

    private void Later(nint stream, System.Action work) => _streams[stream].Enqueue(work);

    private LocalCommunicator Of(nint handle) => _communicators[(int)handle - 1];

    private nint Add(LocalCommunicator made)
    {
        _communicators.Add(made);
        return _communicators.Count;
    }

    /// <summary>A letter to each member, oneself too.</summary>
    private void Hand(LocalCommunicator members, Func<int, Tensor> letter)
    {
        for (var peer = 0; peer < members.Size; peer++)
            fabric.Post(members.Name, members.Me, peer, letter(peer));
    }

    private void Deliver(LocalCommunicator members, int peer, nint to, long bytes)
    {
        using var letter = fabric.Take(members.Name, peer, members.Me, stop);
        if (letter.ByteCount() != bytes)
            throw new InvalidOperationException($"{letter.ByteCount()} bytes came for {bytes}");
        Move(NcclLaunch.Address(letter), to, bytes);
    }

    private void Reduce(LocalCommunicator members, ScalarType type, bool max, nint to)
    {
        var letters = new Tensor[members.Size];
        for (var member = 0; member < letters.Length; member++)
            letters[member] = fabric.Take(members.Name, member, members.Me, stop);
        using var wide = Reduction.Of(letters, max);
        using var result = wide.to_type(type);
        Move(NcclLaunch.Address(result), to, result.ByteCount());
        foreach (var letter in letters)
            letter.Dispose();
    }

    private Tensor Copied(nint from, long count, ScalarType type)
    {
        var copy = empty(count, dtype: type, device: device.Torch);
        Move(from, NcclLaunch.Address(copy), copy.ByteCount());
        return copy;
    }

    private unsafe void Move(nint from, nint to, long bytes)
    {
        if (device.IsCuda)
            Driver.Copy(from, to, bytes, 0);
        else
            Buffer.MemoryCopy((void*)from, (void*)to, bytes, bytes);
    }

    /// <summary>How far a stream was when an event was recorded.</summary>
    private sealed class Mark(nint stream)
    {
        private volatile bool _done;

        public nint Stream => stream;

        public bool IsDone
        {
            get => _done;
            set => _done = value;
        }
    }
}

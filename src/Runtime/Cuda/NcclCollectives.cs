// Collectives of a rank on a GPU: NCCL, or what stands in its place, on streams beside the one that computes.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Where collectives of a group run; groups over the same axes share one. Without communicator: the rank is alone in it.</summary>
internal sealed record NcclLane(GroupMembers Members, nint Communicator, nint Stream);

/// <summary>
/// Start queues a collective on its group's stream, behind what stream 0 has to do; Wait makes stream 0 wait for it. The host waits for
/// counts of routed rows only, once for a set or a message of rows. Inputs may be given back at once, since their memory is held; a plan that passed its
/// checks does not write them before Wait (DSG0605). A message is sent when its receiver comes, and nobody waits for it. Belongs to one
/// thread, but for Stop and the watch.
/// </summary>
internal sealed class NcclCollectives : ICollectives, IDisposable
{
    private readonly INcclCalls _nccl;
    private readonly RankContext _rank;
    private readonly NcclJob _job;
    private readonly Dictionary<int, NcclLane> _lanes = [];
    private readonly List<nint> _communicators = [];
    private readonly List<InFlight> _flying = [];
    private readonly Stack<nint> _events = new();
    private readonly Dictionary<long, Stack<nint>> _pinned = [];
    private readonly nint _begin;
    private readonly NcclWatch _watch;

    /// <summary>
    /// All ranks of the job call it with the same groups; `share` gives everybody what rank 0 hands in. The calling thread is the rank's,
    /// which has entered its device.
    /// </summary>
    public NcclCollectives(INcclCalls nccl, RankContext rank, IReadOnlyList<Group> groups, Func<byte[], byte[]> share, NcclJob job)
    {
        (_nccl, _rank, _job) = (nccl, rank, job);
        _begin = nccl.NewEvent();
        _watch = new NcclWatch(nccl, rank.Rank, job, Record, Unfinished, Waiting);
        try
        {
            Connect(groups, nccl.Join(share(rank.Rank == 0 ? nccl.NewId() : []), job.Ranks, rank.Rank));
        }
        catch (InvalidOperationException e)
        {
            throw Failed(e);
        }

        _watch.Over(_communicators);
    }

    /// <summary>The last collectives.</summary>
    public FlightRecord Record { get; } = new();

    /// <summary>What the host waited for counts of routed rows, in all.</summary>
    public TimeSpan HostWait { get; private set; }

    /// <summary>Held by whoever calls NCCL or touches what is in flight.</summary>
    private Lock Waiting { get; } = new();

    public IPending Start(CollectiveCall call)
    {
        ThrowIfStopped();
        var launch = new NcclLaunch();
        var lane = _lanes[call.Group.Id];
        var host = Prepare(call, lane, launch);
        launch.QueueMoves(_nccl);
        var flight = Record.Add(call.Kind, call.Group.Name, launch.Bytes);
        try
        {
            lock (Waiting)
            {
                ThrowIfStopped();
                Reap();
                var done = _events.TryPop(out var free) ? free : _nccl.NewEvent();
                if (launch.IsPacked)
                    call.Times?.Pack();
                _nccl.Record(_begin, 0);
                _nccl.Follow(lane.Stream, _begin);
                call.Times?.Begin(_nccl.Where(lane.Stream));
                foreach (var copy in launch.Copies)
                    copy(lane.Stream);
                Queue(launch.Group, lane.Stream);
                Queue(launch.Second, lane.Stream);
                foreach (var work in launch.Behind)
                    work(lane.Stream);
                foreach (var copy in launch.ToHost)
                    copy(lane.Stream);
                call.Times?.End(_nccl.Where(lane.Stream));
                _nccl.Record(done, lane.Stream);
                flight.State = FlightState.Queued;
                var flying = new InFlight(this, launch, lane.Stream, call, flight, done, host);
                _flying.Add(flying);
                return flying;
            }
        }
        catch (InvalidOperationException e)
        {
            throw Failed(e);
        }
    }

    /// <summary>Calls of NCCL as one group.</summary>
    private void Queue(List<Action<nint>> group, nint stream)
    {
        if (group.Count == 0)
            return;
        _nccl.Begin();
        foreach (var part in group)
            part(stream);
        _nccl.End();
    }

    /// <summary>Ends the communicators, with those of the other ranks unless the job was stopped.</summary>
    public void Dispose()
    {
        _watch.Dispose();
        lock (Waiting)
        {
            foreach (var flying in _flying)
                flying.Release();
            _flying.Clear();
        }
    }

    /// <summary>Splits the world, in the order of the groups' numbers, and connects stages that send to each other.</summary>
    private void Connect(IReadOnlyList<Group> groups, nint world)
    {
        var streams = new Dictionary<nint, nint>();
        foreach (var one in NcclGroups.Of(groups, _rank, _job.Ranks))
        {
            var communicator = one.Origin switch
            {
                Origin.Alone => 0,
                Origin.World => world,
                Origin.Shared => _lanes[one.Like].Communicator,
                Origin.Split => _nccl.Split(world, one.Color, one.Key),
                var origin => throw new UnreachableException($"no communicator by {origin}"),
            };
            if (one.Origin == Origin.Split && communicator != 0)
                _communicators.Add(communicator);
            if (one.Members is null)
                continue;
            if (!streams.TryGetValue(communicator, out var stream))
                streams[communicator] = stream = _nccl.NewStream();
            _lanes[one.Group.Id] = new NcclLane(one.Members, communicator, stream);
            if (one is { IsMessage: true, Origin: Origin.Split })
                Greet(one.Group.Id);
        }

        if (_job.Ranks == 1 && groups.Count == 0)
            Try(world);
        _communicators.Add(world);
    }

    /// <summary>A plan of one rank says nothing to anybody: a part of the world and a sum over it show that NCCL works here.</summary>
    private void Try(nint world)
    {
        var part = _nccl.Split(world, 0, 0);
        _communicators.Add(part);
        var stream = _nccl.NewStream();
        using var one = TorchSharp.torch.ones(1, dtype: TorchSharp.torch.ScalarType.Float32, device: _job.Device);
        var at = NcclLaunch.Address(one);
        _nccl.Record(_begin, 0);
        _nccl.Follow(stream, _begin);
        _nccl.AllReduce(part, at, at, 1, TorchSharp.torch.ScalarType.Float32, false, stream);
        _nccl.Record(_begin, stream);
        _nccl.Follow(0, _begin);
        if (one.item<float>() is not 1f and var sum)
            throw new InvalidOperationException($"NCCL adds 1 of one rank to {sum}");
    }

    /// <summary>The first message between two ranks waits on the host until both are there, which no step of a plan may.</summary>
    private void Greet(int group)
    {
        var lane = _lanes[group];
        using var one = TorchSharp.torch.zeros(16, dtype: TorchSharp.torch.ScalarType.Byte, device: _job.Device);
        var at = NcclLaunch.Address(one);
        _nccl.Record(_begin, 0);
        _nccl.Follow(lane.Stream, _begin);
        if (lane.Members.Me == 0)
            _nccl.Send(lane.Communicator, at, 16, 1, lane.Stream);
        else
            _nccl.Receive(lane.Communicator, at, 16, 0, lane.Stream);
        _nccl.Record(_begin, lane.Stream);
        _nccl.Follow(0, _begin);
    }

    /// <summary>Fills the launch; pinned memory where counts of rows come to the host.</summary>
    private (nint At, long Bytes) Prepare(CollectiveCall call, NcclLane lane, NcclLaunch launch)
    {
        var (inputs, outputs) = (call.Inputs, call.Outputs);
        switch (call.Kind)
        {
            case Collective.Dispatch:
                NcclFused.AddDispatch(_nccl, lane, call, launch);
                return default;
            case Collective.Combine { RanksPerNode: var perNode }:
                NcclFused.AddCombine(_nccl, lane, call, perNode, launch);
                return default;
            case Collective.Send { Stage: var stage }:
                NcclMessages.Send(_nccl, lane, PeerOf(lane, stage), inputs[0], _job.Ranks, launch);
                return default;
            case Collective.Recv { Stage: var stage }:
                {
                    var header = (long)NcclMessages.Header(outputs[0].Info, _job.Ranks) * sizeof(int);
                    var memory = header == 0 ? 0 : Pinned(header);
                    NcclMessages.Receive(_nccl, lane, PeerOf(lane, stage), outputs[0], _job.Ranks, memory, launch);
                    return (memory, header);
                }
        }

        var arity = inputs.Count / outputs.Count;
        if (NcclRows.ExchangesCounts(call))
        {
            var n = lane.Members.Ranks.Length;
            var one = (long)n * (inputs.Max(input => input.DeviceRows.Experts) + n) * sizeof(int);
            var memory = Pinned(one * outputs.Count);
            for (var i = 0; i < outputs.Count; i++)
                NcclRows.AddCounts(_nccl, lane, call.Kind, inputs[i * arity], outputs[i], memory + (i * (nint)one), _job.Dispatches, launch);
            return (memory, one * outputs.Count);
        }

        for (var i = 0; i < outputs.Count; i++)
        {
            if (NcclRows.MovesRows(call))
                NcclRows.AddRows(_nccl, lane, call, i * arity, outputs[i], launch);
            else
                NcclDense.Add(_nccl, lane, call.Kind, inputs[i * arity], outputs[i], launch);
        }

        return default;
    }

    /// <summary>The place in the group of the rank at this one's coordinates on another stage.</summary>
    private int PeerOf(NcclLane lane, int stage)
    {
        var peer = Array.IndexOf(lane.Members.Ranks, _rank.Rank + ((stage - _rank.Stage) * _rank.Axes.Aggregate(1, (n, axis) => n * axis.Size)));
        return peer >= 0 ? peer : throw new InvalidOperationException($"stage {stage} is not in the group of a message");
    }

    private nint Pinned(long bytes)
        => _pinned.TryGetValue(bytes, out var free) && free.TryPop(out var memory) ? memory : _nccl.Pinned(bytes);

    /// <summary>Takes leave of what is done and waited for; a message's memory is held until it is sent. Under the lock.</summary>
    private void Reap()
    {
        var over = 0;
        foreach (var flying in _flying)
        {
            if (!flying.IsWaited || !flying.IsDone())
                break;
            _events.Push(flying.Done);
            flying.Release();
            over++;
        }

        _flying.RemoveRange(0, over);
    }

    /// <summary>What the GPU has not done yet, the oldest first. Under the lock.</summary>
    private IEnumerable<Flight> Unfinished() => _flying.Where(f => !f.IsDone()).Select(f => f.Flight);

    private void ThrowIfStopped()
    {
        if (_job.Stop.IsCancellationRequested)
            throw new StoppedException("another rank stopped the job");
    }

    /// <summary>A call fails nearly always since a peer is gone, which the hub says better, if a little later.</summary>
    private Exception Failed(InvalidOperationException error)
        => _job.Stop.WaitHandle.WaitOne(_job.Grace) ? new StoppedException("another rank stopped the job") : error;

    /// <summary>One collective under way.</summary>
    private sealed class InFlight(
        NcclCollectives owner, NcclLaunch launch, nint stream, CollectiveCall call, Flight flight, nint done, (nint At, long Bytes) host) : IPending
    {
        public Flight Flight => flight;

        public nint Done => done;

        public bool IsWaited { get; private set; }

        public bool IsDone()
        {
            if (flight.State == FlightState.Done)
                return true;
            if (!owner._nccl.IsDone(done))
                return false;
            flight.State = FlightState.Done;
            return true;
        }

        public void Wait()
        {
            owner.ThrowIfStopped();
            if (call.Kind.IsSend)
            {
                IsWaited = true;
                return;
            }

            if (IsLate)
            {
                foreach (var output in call.Outputs)
                    output.ArriveBy(Arrive);
                IsWaited = true;
                return;
            }

            owner._nccl.Follow(0, done);
            if (host.Bytes > 0)
                WaitOnHost();
            if (launch.Rest is not null)
                GoOn(launch.Rest);
            // behind counts of rows the host makes a set, which is not work of the GPU
            var joins = launch.After.Count > 0 && host.Bytes == 0;
            if (joins)
                call.Times?.BeginJoin();
            foreach (var work in launch.After)
                work();
            if (joins)
                call.Times?.EndJoin();
            if (host.Bytes > 0)
            {
                if (!owner._pinned.TryGetValue(host.Bytes, out var free))
                    owner._pinned[host.Bytes] = free = new Stack<nint>();
                free.Push(host.At);
            }

            // whatever takes this memory next is behind the collective on stream 0
            launch.Dispose();
            IsWaited = true;
        }

        public void Release() => launch.Dispose();

        /// <summary>
        /// Parameters that are gathered at the end of a step arrive while the next one begins: stream 0 waits when one of them is touched.
        /// What they came from is held until then.
        /// </summary>
        private bool IsLate
            => launch.After.Count == 0 && call.Outputs.Count > 0 && call.Outputs.All(output => output.Info.Kind.IsParameter);

        private void Arrive()
        {
            // its event may be another's once it is over
            if (flight.State == FlightState.Done || owner._job.Stop.IsCancellationRequested)
                return;
            // whoever looks at parameters between steps may have a thread of his own
            owner._nccl.Enter();
            owner._nccl.Follow(0, done);
        }

        /// <summary>The second group, as the host now knows it.</summary>
        private void GoOn(System.Action rest)
        {
            try
            {
                rest();
                lock (owner.Waiting)
                {
                    owner.ThrowIfStopped();
                    owner._nccl.Record(owner._begin, 0);
                    owner._nccl.Follow(stream, owner._begin);
                    owner.Queue(launch.Second, stream);
                    owner._nccl.Record(done, stream);
                    flight.State = FlightState.Queued;
                }

                owner._nccl.Follow(0, done);
            }
            catch (InvalidOperationException e)
            {
                throw owner.Failed(e);
            }
        }

        private void WaitOnHost()
        {
            var begin = Stopwatch.GetTimestamp();
            var spinner = new SpinWait();
            while (!IsDone())
            {
                owner.ThrowIfStopped();
                spinner.SpinOnce(sleep1Threshold: -1);
            }

            owner.HostWait += Stopwatch.GetElapsedTime(begin);
            call.Times?.HostWaited(begin);
        }
    }
}

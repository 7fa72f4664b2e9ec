// Collectives that MPI has itself: dense sums, maxima, gathers and all-to-alls; everything else goes as messages.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>
/// A communicator for each group over mesh axes. MPI chooses the order of sums, so results equal the loopback's to rounding; bf16 is summed
/// in fp32, as there. An instance belongs to one thread.
/// </summary>
internal sealed unsafe class MpiCollectives : ICollectives
{
    private const long MostElements = int.MaxValue;

    private readonly MpiLibrary _mpi;
    private readonly MpiMessages _messages;
    private readonly MessageCollectives _others;
    private readonly CancellationToken _stop;
    private readonly Dictionary<int, (nint Communicator, GroupMembers Members)> _groups = [];

    /// <summary>All ranks call it with the same groups, whose communicators they make one after the other.</summary>
    public MpiCollectives(MpiLibrary mpi, MpiMessages messages, RankContext rank, IReadOnlyList<Group> groups, CancellationToken stop)
    {
        (_mpi, _messages, _stop) = (mpi, messages, stop);
        _others = new MessageCollectives(messages, rank, stop);
        foreach (var group in groups.Where(group => group.Stages.Count == 0).OrderBy(group => group.Id))
        {
            var members = GroupMembers.Of(group, rank);
            lock (mpi.Lock)
                _groups[group.Id] = (mpi.Communicator(members.Ranks, group.Id), members);
        }
    }

    public IPending Start(CollectiveCall call)
    {
        if (!_groups.TryGetValue(call.Group.Id, out var group) || !IsDense(call) || call.Inputs.Any(value => value.Tensor.numel() > MostElements / 4))
            return _others.Start(call);
        var pending = new Pending(this, call, group.Members, Letters.AreAddressed(call));
        lock (_mpi.Lock)
        {
            for (var i = 0; i < call.Inputs.Count; i++)
                pending.Requests.Add(Begin(call, i, group, pending));
        }

        return pending;
    }

    /// <summary>Equal blocks of every member, of types that MPI adds.</summary>
    private static bool IsDense(CollectiveCall call)
        => call.Kind switch
        {
            Collective.AllGather or Collective.AllToAll => call.Inputs.All(value => !value.HoldsRows) && call.Outputs.All(value => !value.Info.Routed),
            Collective.ReduceScatter => call.Outputs.All(value => !value.Info.Routed) && call.Inputs.All(IsFloat),
            var kind when kind.IsAllReduceSum || kind.IsAllReduceMax => call.Inputs.All(IsFloat),
            Collective.Dispatch or Collective.Combine or Collective.Send or Collective.Recv => false,
            var kind when kind.IsRouteToExperts || kind.IsRowsToExperts || kind.IsRowsToTokens => false,
            var kind => throw new System.Diagnostics.UnreachableException($"no collective {kind}"),
        };

    private static bool IsFloat(SlotValue value) => !value.HoldsRows && value.Tensor.dtype is ScalarType.Float32 or ScalarType.BFloat16;

    /// <summary>One tensor of a bundle; the caller holds the lock.</summary>
    private nint Begin(CollectiveCall call, int i, (nint Communicator, GroupMembers Members) group, Pending pending)
    {
        nint request;
        var (comm, n) = (group.Communicator, group.Members.Ranks.Length);
        var input = call.Inputs[i].Tensor;
        switch (call.Kind)
        {
            case var kind when kind.IsAllReduceSum || kind.IsAllReduceMax:
                {
                    var (send, sum) = pending.Buffers(input.to_type(ScalarType.Float32, copy: true), 1);
                    MpiLibrary.Require(MpiLibrary.MPI_Iallreduce(
                        send.Pointer(), sum.Pointer(), (int)sum.numel(), _mpi.Float, kind.IsAllReduceMax ? _mpi.Max : _mpi.Sum, comm, &request));
                    break;
                }

            case Collective.ReduceScatter:
                {
                    using var blocks = Blocks(call, i, n);
                    var (send, sum) = pending.Buffers(blocks.to_type(ScalarType.Float32, copy: true), 1.0 / n);
                    MpiLibrary.Require(MpiLibrary.MPI_Ireduce_scatter_block(
                        send.Pointer(), sum.Pointer(), (int)sum.numel(), _mpi.Float, _mpi.Sum, comm, &request));
                    break;
                }

            case Collective.AllGather:
                {
                    var (send, all) = pending.Buffers(input.clone(), n);
                    var bytes = (int)send.ByteCount();
                    MpiLibrary.Require(MpiLibrary.MPI_Iallgather(send.Pointer(), bytes, _mpi.Byte, all.Pointer(), bytes, _mpi.Byte, comm, &request));
                    break;
                }

            case Collective.AllToAll:
                {
                    var (send, all) = pending.Buffers(Blocks(call, i, n), 1);
                    var bytes = (int)(send.ByteCount() / n);
                    MpiLibrary.Require(MpiLibrary.MPI_Ialltoall(send.Pointer(), bytes, _mpi.Byte, all.Pointer(), bytes, _mpi.Byte, comm, &request));
                    break;
                }

            default:
                throw new System.Diagnostics.UnreachableException($"{call.Kind} goes as messages");
        }

        return request;
    }

    /// <summary>What goes to each member, one block behind the other: [n, block].</summary>
    private static Tensor Blocks(CollectiveCall call, int i, int n)
    {
        var one = new CollectiveCall(call.Kind, call.Group, [call.Inputs[i]], [call.Outputs[i]]);
        Parcel[] letters = [.. Enumerable.Range(0, n).Select(member => Letters.For(one, member, n))];
        try
        {
            return stack(letters.Select(letter => letter.Tensors[0]!));
        }
        finally
        {
            foreach (var letter in letters)
                letter.Dispose();
        }
    }

    /// <summary>Under way in MPI, with the memory that it reads and writes.</summary>
    private sealed class Pending(MpiCollectives owner, CollectiveCall call, GroupMembers members, bool addressed) : IPending
    {
        private readonly List<(Tensor Send, Tensor Result)> _buffers = [];

        public List<nint> Requests { get; } = [];

        /// <summary>Keeps what is sent, and makes room for `share` times as many elements.</summary>
        public (Tensor Send, Tensor Result) Buffers(Tensor send, double share)
        {
            var result = empty((long)Math.Round(send.numel() * share), dtype: send.dtype);
            _buffers.Add((send, result));
            return (send, result);
        }

        public void Wait()
        {
            owner._messages.Until(AreDone, owner._stop);
            if (call.Kind.IsAllReduceSum || call.Kind.IsAllReduceMax || call.Kind.IsReduceScatter)
            {
                for (var i = 0; i < call.Outputs.Count; i++)
                {
                    var (send, result) = _buffers[i];
                    using var shaped = result.view(addressed ? send.shape[1..] : send.shape);
                    call.Outputs[i].AdoptCopy(shaped);
                }
            }
            else
                Join();
            foreach (var (send, result) in _buffers)
            {
                send.Dispose();
                result.Dispose();
            }
        }

        private bool AreDone()
        {
            lock (owner._mpi.Lock)
            {
                for (var i = Requests.Count - 1; i >= 0; i--)
                {
                    var request = Requests[i];
                    if (!MpiLibrary.IsDone(ref request))
                        return false;
                    Requests.RemoveAt(i);
                }
            }

            return true;
        }

        /// <summary>What each member sent, as the loopback has it, and then what the loopback does.</summary>
        private void Join()
        {
            var n = members.Ranks.Length;
            using var exchange = new Exchange(n, 1);
            for (var member = 0; member < n; member++)
            {
                var parts = new Tensor?[call.Inputs.Count];
                for (var i = 0; i < parts.Length; i++)
                {
                    var (send, result) = _buffers[i];
                    var shape = addressed ? send.shape[1..] : send.shape;
                    using var flat = result.view(n, -1);
                    using var row = flat.select(0, member);
                    parts[i] = row.view(shape);
                }

                exchange.Put(member, new Parcel(parts, new RowSet?[parts.Length]));
            }

            new Finishing(call, exchange, members.Me, members.Ranks, addressed).All();
        }
    }
}

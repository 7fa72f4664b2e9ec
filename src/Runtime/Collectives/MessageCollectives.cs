// Collectives of a rank that has its process to itself: letters to the members that need them, then the arithmetic of the loopback.
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>The bits are those of the loopback, since Finishing reads parcels in member order. An instance belongs to one thread.</summary>
internal sealed class MessageCollectives(IMessages messages, RankContext rank, CancellationToken stop) : ICollectives
{
    private readonly Dictionary<(int Group, int Peer, bool Reads), long> _next = [];
    private readonly Dictionary<int, GroupMembers> _groups = [];

    public IPending Start(CollectiveCall call)
    {
        switch (call.Kind)
        {
            case Collective.Send { Stage: var stage }:
                {
                    var to = RankAt(stage);
                    messages.Send(to, new MessageKey(call.Group.Id, true, Number(call.Group.Id, to, false)), Parcel.Of(call.Inputs));
                    return Sent.Instance;
                }

            case Collective.Recv { Stage: var stage }:
                {
                    var from = RankAt(stage);
                    var key = new MessageKey(call.Group.Id, true, Number(call.Group.Id, from, true));
                    return new Arrival(messages, call, key, [from], -1, null, false, stop);
                }

            default:
                return StartGroup(call);
        }
    }

    private Arrival StartGroup(CollectiveCall call)
    {
        if (!_groups.TryGetValue(call.Group.Id, out var members))
            _groups[call.Group.Id] = members = GroupMembers.Of(call.Group, rank);
        var (ranks, me) = members;
        var key = new MessageKey(call.Group.Id, false, Number(call.Group.Id, -1, false));
        var addressed = Letters.AreAddressed(call);
        var mine = Letters.For(call, me, ranks.Length);
        if (!addressed)
            mine.Share(ranks.Length - 1);
        for (var i = 1; i < ranks.Length; i++)
        {
            // each begins with the one behind itself, so that not all send to the first
            var to = (me + i) % ranks.Length;
            messages.Send(ranks[to], key, addressed ? Letters.For(call, to, ranks.Length) : mine);
        }

        return new Arrival(messages, call, key, ranks, me, mine, addressed, stop);
    }

    private int RankAt(int stage) => rank.Rank + ((stage - rank.Stage) * rank.Axes.Aggregate(1, (n, axis) => n * axis.Size));

    private long Number(int group, int peer, bool reads)
    {
        var number = _next.GetValueOrDefault((group, peer, reads));
        _next[(group, peer, reads)] = number + 1;
        return number;
    }

    /// <summary>Everything else waits for the parcels of the other members, then writes its own outputs.</summary>
    private sealed class Arrival(
        IMessages messages, CollectiveCall call, MessageKey key, int[] ranks, int me, Parcel? mine, bool addressed, CancellationToken stop)
        : IPending
    {
        public void Wait()
        {
            using var exchange = new Exchange(ranks.Length, 1);
            if (mine is not null)
                exchange.Put(me, mine);
            for (var i = 0; i < ranks.Length; i++)
            {
                if (i != me)
                    exchange.Put(i, messages.Receive(ranks[i], key, stop));
            }

            new Finishing(call, exchange, Math.Max(0, me), ranks, addressed).All();
        }
    }
}

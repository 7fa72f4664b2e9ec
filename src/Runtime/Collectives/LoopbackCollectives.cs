// One rank's end of the loopback: a collective is a meeting at which copies are handed over.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>Collectives between threads of this process; an instance belongs to one thread.</summary>
internal sealed class LoopbackCollectives(LoopbackWorld world, RankContext rank) : ICollectives
{
    private readonly Dictionary<(Lane Lane, bool Reads), long> _next = [];
    private readonly Dictionary<int, (Lane Lane, GroupMembers Members)> _groups = [];
    private readonly int _place = GroupMembers.PlaceOf(rank.Coordinates, rank.Axes);

    public IPending Start(CollectiveCall call)
    {
        switch (call.Kind)
        {
            case Collective.Send { Stage: var to }:
                {
                    var lane = world.Lane(call.Group.Id, rank.Stage, _place, to);
                    lane.Open(Number(lane, false), 1).Put(0, Parcel.Of(call.Inputs));
                    return Sent.Instance;
                }

            case Collective.Recv { Stage: var from }:
                {
                    var lane = world.Lane(call.Group.Id, from, _place, rank.Stage);
                    var number = Number(lane, true);
                    return new Meeting(world, call, lane, number, lane.Open(number, 1), 0, []);
                }

            default:
                {
                    if (!_groups.TryGetValue(call.Group.Id, out var group))
                        _groups[call.Group.Id] = group = Find(call.Group);
                    var (lane, (ranks, me)) = group;
                    var number = Number(lane, false);
                    var exchange = lane.Open(number, ranks.Length);
                    Count(call, ranks, me);
                    exchange.Put(me, Parcel.Of(call.Inputs));
                    return new Meeting(world, call, lane, number, exchange, me, ranks);
                }
        }
    }

    private long Number(Lane lane, bool reads)
    {
        var number = _next.GetValueOrDefault((lane, reads));
        _next[(lane, reads)] = number + 1;
        return number;
    }

    /// <summary>A group's place is that of its first member on the stage; over stages, that of its members.</summary>
    private (Lane Lane, GroupMembers Members) Find(Group group)
    {
        var members = GroupMembers.Of(group, rank);
        var perStage = rank.Axes.Aggregate(1, (n, axis) => n * axis.Size);
        return (world.Lane(group.Id, group.Stages.Count > 0 ? -1 : rank.Stage, members.Ranks[0] % perStage, -1), members);
    }

    /// <summary>Rows and tokens that leave this rank for others, and sums that come back to it.</summary>
    private void Count(CollectiveCall call, int[] ranks, int me)
    {
        if (world.Traffic is not { } traffic)
            return;
        var (inputs, outputs) = (call.Inputs, call.Outputs);
        switch (call.Kind)
        {
            case var kind when kind.IsRowsToExperts:
                for (var i = 0; i < inputs.Count; i += inputs.Count / outputs.Count)
                    traffic.CountRows(inputs[i + 1].Rows, ranks, me, RowExchange.Width(inputs[i].Tensor));
                break;
            case var kind when kind.IsRowsToTokens:
                for (var i = 0; i < inputs.Count; i += inputs.Count / outputs.Count)
                    traffic.CountRows(inputs[i + 2].Rows, ranks, me, RowExchange.Width(inputs[i].Tensor));
                break;
            case Collective.Dispatch or Collective.Combine:
                {
                    var route = inputs[call.Kind.IsDispatch ? outputs.Count : outputs.Count + 1].Rows;
                    var width = RowExchange.Width(inputs[0].Tensor);
                    if (call.Kind.IsDispatch)
                    {
                        width /= inputs[0].Tensor.shape[1];
                        traffic.CountPlaces(inputs[outputs.Count + 1].Rows, route, ranks, me);
                    }

                    traffic.CountTokens(route, ranks, me, width);
                    if (outputs.Count == 2)
                        traffic.CountRows(route, ranks, me, TensorMemory.Width(inputs[1].Tensor.dtype));
                    break;
                }
        }
    }

    /// <summary>Everything else waits for the other members, then writes its own outputs.</summary>
    private sealed class Meeting(
        LoopbackWorld world, CollectiveCall call, Lane lane, long number, Exchange exchange, int me, int[] ranks) : IPending
    {
        public void Wait()
        {
            try
            {
                exchange.Wait(world.Stop);
            }
            catch (OperationCanceledException)
            {
                throw new StoppedException("another rank stopped the job");
            }

            call.Times?.Meet(exchange.Met);
            new Finishing(call, exchange, me, ranks).All();
            if (exchange.Leave())
                lane.Close(number);
        }
    }
}

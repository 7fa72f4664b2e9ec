// One rank's end of the loopback: a collective is a meeting at which copies are handed over.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>Collectives between threads of this process; an instance belongs to one thread.</summary>
internal sealed class LoopbackCollectives(LoopbackWorld world, RankContext rank) : ICollectives
{
    private readonly Dictionary<(Lane Lane, bool Reads), long> _next = [];
    private readonly Dictionary<int, (Lane Lane, int Me, int[] Ranks)> _groups = [];

    public IPending Start(CollectiveCall call)
    {
        switch (call.Kind)
        {
            case Collective.Send { Stage: var to }:
                {
                    var lane = world.Lane(call.Group.Id, rank.Stage, Place(rank.Coordinates), to);
                    lane.Open(Number(lane, false), 1).Put(0, Parcel.Of(call.Inputs));
                    return Sent.Instance;
                }

            case Collective.Recv { Stage: var from }:
                {
                    var lane = world.Lane(call.Group.Id, from, Place(rank.Coordinates), rank.Stage);
                    var number = Number(lane, true);
                    return new Meeting(world, call, lane, number, lane.Open(number, 1), 0, []);
                }

            default:
                {
                    if (!_groups.TryGetValue(call.Group.Id, out var group))
                        _groups[call.Group.Id] = group = Find(call.Group);
                    var number = Number(group.Lane, false);
                    var exchange = group.Lane.Open(number, group.Ranks.Length);
                    Count(call, group.Ranks, group.Me);
                    exchange.Put(group.Me, Parcel.Of(call.Inputs));
                    return new Meeting(world, call, group.Lane, number, exchange, group.Me, group.Ranks);
                }
        }
    }

    private long Number(Lane lane, bool reads)
    {
        var number = _next.GetValueOrDefault((lane, reads));
        _next[(lane, reads)] = number + 1;
        return number;
    }

    private (Lane Lane, int Me, int[] Ranks) Find(Group group)
    {
        if (group.Stages.Count > 0)
        {
            var me = group.Stages.ToList().IndexOf(rank.Stage);
            return me < 0
                ? throw new InvalidOperationException($"stage {rank.Stage} is not in group {group.Name}")
                : (world.Lane(group.Id, -1, Place(rank.Coordinates), -1), me, new int[group.Stages.Count]);
        }

        long[] axes = [.. group.MeshAxes.Order()];
        var others = (int[])[.. rank.Coordinates];
        var members = 1;
        foreach (var axis in axes)
        {
            others[axis] = 0;
            members *= rank.Axes[(int)axis].Size;
        }

        var ranks = new int[members];
        for (var i = 0; i < members; i++)
        {
            // member order: the slowest axis is major
            var rest = i;
            foreach (var axis in axes)
                (rest, others[axis]) = Math.DivRem(rest, rank.Axes[(int)axis].Size);
            ranks[i] = rank.Rank - Place(rank.Coordinates) + Place(others);
        }

        foreach (var axis in axes)
            others[axis] = 0;
        return (world.Lane(group.Id, rank.Stage, Place(others), -1), rank.BlockOf(axes), ranks);
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
                        width /= inputs[0].Tensor.shape[1];
                    traffic.CountTokens(route, ranks, me, width);
                    if (outputs.Count == 2)
                        traffic.CountRows(route, ranks, me, TensorMemory.Width(inputs[1].Tensor.dtype));
                    break;
                }
        }
    }

    private int Place(IReadOnlyList<int> coordinates)
    {
        var place = 0;
        for (var i = coordinates.Count - 1; i >= 0; i--)
            place = (place * rank.Axes[i].Size) + coordinates[i];
        return place;
    }

    /// <summary>Sends are buffered: nothing to wait for.</summary>
    private sealed class Sent : IPending
    {
        public static readonly Sent Instance = new();

        public void Wait()
        {
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

            FinishAll();
            if (exchange.Leave())
                lane.Close(number);
        }

        /// <summary>A bundle is one meeting: output i has the operand tuple of inputs that begins at i x arity.</summary>
        private void FinishAll()
        {
            if (!call.Kind.TakesTuples)
            {
                Finish(0, call.Outputs[0]);
                return;
            }

            var arity = call.Inputs.Count / call.Outputs.Count;
            for (var i = 0; i < call.Outputs.Count; i++)
                Finish(i * arity, call.Outputs[i]);
        }

        private void Finish(int i, SlotValue output)
        {
            var inputs = call.Inputs;
            switch (call.Kind)
            {
                case var kind when kind.IsRouteToExperts:
                    output.Adopt(RowExchange.ToExperts(Routes(i), me, output.Info.Padding));
                    break;
                case var kind when kind.IsRowsToExperts:
                    RowExchange.Collect(Values(i), Routes(i + 1), me * inputs[i + 2].Rows.Experts, inputs[i + 2].Rows, output);
                    break;
                case var kind when kind.IsRowsToTokens:
                    RowExchange.Return(Values(i), Routes(i + 1), me, inputs[i + 2].Rows, output);
                    break;
                case Collective.Dispatch:
                    {
                        var values = call.Outputs.Count;
                        var mine = inputs[values + 1].Rows;
                        FusedExchange.Tokens(Values(0), Routes(values), me * mine.Experts, mine, output);
                        if (values == 2)
                            FusedExchange.Probabilities(Values(1), Routes(values), me * mine.Experts, mine, call.Outputs[1]);
                        break;
                    }

                case Collective.Combine { RanksPerNode: var perNode }:
                    {
                        var values = call.Outputs.Count;
                        var mine = inputs[values + 1].Rows;
                        int[] nodes = [.. ranks.Select(r => r / perNode)];
                        FusedExchange.Sums(Values(0), Routes(values), nodes, me, mine, output);
                        if (values == 2)
                            FusedExchange.Scattered(Values(1), Routes(values), me, mine, call.Outputs[1]);
                        break;
                    }

                case Collective.AllGather when exchange[0].Rows[i] is not null:
                    output.Adopt(RowExchange.Joined(Routes(i), output.Info.Padding));
                    break;
                case Collective.AllGather { Dim: < 3 } when output.Info.Routed:
                    RowExchange.Collect(Values(i), Routes(i + 1), 0, inputs[i + 2].Rows, output);
                    break;
                case Collective.ReduceScatter { Dim: < 3 } when output.Info.Routed:
                    RowExchange.ReduceScatter(exchange, i, inputs[i + 1].Rows, inputs[i + 2].Rows, me, output);
                    break;
                default:
                    FinishDense(i, output);
                    break;
            }
        }

        private void FinishDense(int i, SlotValue output)
        {
            switch (call.Kind)
            {
                case var kind when kind.IsAllReduceSum || kind.IsAllReduceMax:
                    output.AdoptCopy(exchange.Reduced(i, kind.IsAllReduceMax));
                    break;
                case Collective.AllGather { Dim: var dim }:
                    Join(output, output.StorageDim(dim), Values(i), static (tensor, _, _) => tensor.alias(), 0);
                    break;
                case Collective.ReduceScatter { Dim: var dim }:
                    {
                        var storage = output.StorageDim(dim);
                        output.Adopt(Reduction.OfBlock(exchange, i, storage, me, Block(i, storage)));
                        break;
                    }

                case Collective.AllToAll { SplitDim: var split, JoinDim: var join }:
                    {
                        var storage = output.StorageDim(split);
                        var length = Block(i, storage);
                        Join(output, output.StorageDim(join), Values(i), (tensor, s, mine) => tensor.narrow(s, mine * length, length), storage);
                        break;
                    }

                case Collective.Recv when exchange[0].Rows[i] is { } rows:
                    output.Adopt(rows);
                    break;
                case Collective.Recv:
                    output.AdoptCopy(exchange[0].Tensors[i]!);
                    break;
                default:
                    throw new UnreachableException($"no handler for {call.Kind}");
            }
        }

        private long Block(int i, int dim)
        {
            var (length, rest) = Math.DivRem(exchange[me].Tensors[i]!.shape[dim], exchange.Members);
            return rest == 0 ? length : throw new InvalidOperationException($"{exchange[me].Tensors[i]!.shape[dim]} elements do not split over {exchange.Members} ranks");
        }

        private void Join(SlotValue output, int dim, List<Tensor> values, Func<Tensor, int, int, Tensor> part, int split)
        {
            long total = 0, at = 0;
            foreach (var value in values)
            {
                using var block = part(value, split, me);
                total += block.shape[dim];
            }

            using var first = part(values[0], split, me);
            var target = output.FillLike(first);
            if (target.shape[dim] != total)
                throw new InvalidOperationException($"{total} elements arrived for {target.shape[dim]} places of {output.Info.Name}");
            foreach (var value in values)
            {
                using var block = part(value, split, me);
                using var place = target.narrow(dim, at, block.shape[dim]);
                place.copy_(block).On(place);
                at += block.shape[dim];
            }
        }

        private List<Tensor> Values(int i) => [.. Enumerable.Range(0, exchange.Members).Select(m => exchange[m].Tensors[i]!)];

        private List<RowSet> Routes(int i) => [.. Enumerable.Range(0, exchange.Members).Select(m => exchange[m].Rows[i]!)];
    }
}

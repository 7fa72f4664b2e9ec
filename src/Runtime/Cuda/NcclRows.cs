// Rows of routed tokens between GPUs: counts are exchanged once for a set, then rows go in one message to each peer.
using System.Diagnostics;
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Between which sets rows go.</summary>
internal enum RowWay
{
    /// <summary>From the set by token to that by expert.</summary>
    ToExperts,

    /// <summary>Back.</summary>
    ToTokens,

    /// <summary>From each member's set to that of all.</summary>
    Gather,

    /// <summary>Back, to a place of its own for what each member brings.</summary>
    Scatter,
}

/// <summary>
/// The order is that of RowSet: by local expert, then member, then token. By token a member's rows lie together, since its experts are
/// neighbours; by expert they do not.
/// </summary>
internal static class NcclRows
{
    /// <summary>Is it a set of rows that is exchanged, so that the host waits for counts?</summary>
    public static bool ExchangesCounts(CollectiveCall call) => call.Kind.IsRouteToExperts || (call.Kind.IsAllGather && call.Inputs[0].HoldsRows);

    /// <summary>Is it rows that go by such a set?</summary>
    public static bool MovesRows(CollectiveCall call)
        => call.Kind switch
        {
            Collective.AllGather { Dim: var dim } => !call.Inputs[0].HoldsRows && dim < 3 && call.Outputs[0].Info.Routed,
            Collective.ReduceScatter { Dim: var dim } => dim < 3 && call.Outputs[0].Info.Routed,
            var kind when kind.IsRowsToExperts || kind.IsRowsToTokens => true,
            var kind when kind.IsRouteToExperts || kind.IsAllReduceSum || kind.IsAllReduceMax => false,
            Collective.AllToAll or Collective.Dispatch or Collective.Combine or Collective.Send or Collective.Recv => false,
            var kind => throw new UnreachableException($"no collective {kind}"),
        };

    /// <summary>
    /// Everybody's counts of all experts, into `host`, [members, experts] i32; then the set that the output is of. With `fused` also how many
    /// tokens each has for each member, behind the counts of experts.
    /// </summary>
    public static void AddCounts(INcclCalls nccl, NcclLane lane, Collective kind, SlotValue input, SlotValue output, nint host, bool fused, NcclLaunch launch)
    {
        var (route, (ranks, me)) = (input.DeviceRows, lane.Members);
        var (n, experts) = (ranks.Length, route.Experts);
        if (kind.IsRouteToExperts && experts % n != 0)
            throw new InvalidOperationException($"{experts} experts do not split over {n} ranks");
        var sent = fused && kind.IsRouteToExperts && route.ByToken ? NcclFused.Sent(nccl.Rows, route, n) : null;
        var ints = experts + (sent is null ? 0 : n);
        var all = empty([n, ints], dtype: ScalarType.Int32, device: input.Device);
        var from = sent is null ? launch.Read(route.Counts) : launch.Own(cat([route.Counts, sent.Counts]));
        var (to, bytes) = (launch.Own(all), (long)ints * sizeof(int));
        if (lane.Communicator == 0)
            launch.Copies.Add(stream => nccl.Copy(from, to, bytes, stream));
        else
            launch.Group.Add(stream => nccl.AllGather(lane.Communicator, from, to, bytes, stream));
        launch.ToHost.Add(stream => nccl.ToHost(to, host, n * bytes, stream));
        launch.After.Add(() =>
        {
            var known = new int[n][];
            for (var member = 0; member < n; member++)
            {
                known[member] = new int[ints];
                Marshal.Copy(host + (member * (nint)bytes), known[member], 0, ints);
            }

            // before it is told of others, a rank knows no more of its own rows than how many there may be
            route.Host ??= RowSet.FromMembers([known[me][..experts]], route.Padding);
            var (first, count) = kind.IsRouteToExperts ? (me * (experts / n), experts / n) : (0, experts);
            var set = RowSet.FromMembers([.. known.Select(c => c[first..(first + count)])], output.Info.Padding);
            var rows = DeviceRows.ByExpert(set, input.Device, (values, tensor) => nccl.Rows.FromHost(values, NcclLaunch.Address(tensor)));
            if (sent is not null)
                rows.Crossing = new Crossing(sent, [.. known.Select(c => c[experts..])], me, Math.Min(count, route.Width));
            output.Adopt(rows);
        });
    }

    /// <summary>Adds the calls for the rows of one output, whose operand tuple begins at input i.</summary>
    public static void AddRows(INcclCalls nccl, NcclLane lane, CollectiveCall call, int i, SlotValue output, NcclLaunch launch)
    {
        var (rows, here, there) = (call.Inputs[i].Tensor, call.Inputs[i + 1], call.Inputs[i + 2]);
        if (output.ScalarType != rows.dtype)
            throw new InvalidOperationException($"slot {output.Info.Name} has elements of type {output.ScalarType}, the rows {rows.dtype}");
        var (from, width) = (launch.Read(rows), RowExchange.Width(rows));
        var filled = output.Fill(there.DeviceRows.Rows);
        switch (call.Kind)
        {
            case var kind when kind.IsRowsToExperts:
                Move(nccl, lane, RowWay.ToExperts, here, there, from, NcclLaunch.Address(filled), width, 0, launch);
                break;
            case var kind when kind.IsRowsToTokens:
                Move(nccl, lane, RowWay.ToTokens, here, there, from, NcclLaunch.Address(filled), width, 0, launch);
                break;
            case Collective.AllGather:
                Move(nccl, lane, RowWay.Gather, here, there, from, NcclLaunch.Address(filled), width, 0, launch);
                break;
            case Collective.ReduceScatter:
                {
                    // everybody's part of my rows, one behind the other, added in member order; zero where there are none
                    long[] shape = [lane.Members.Ranks.Length, .. filled.shape];
                    var parts = zeros(shape, dtype: rows.dtype, device: rows.device);
                    Move(nccl, lane, RowWay.Scatter, here, there, from, launch.Own(parts), width, 0, launch);
                    launch.After.Add(() => Sum(parts, filled));
                    break;
                }

            default:
                throw new UnreachableException($"{call.Kind} moves no rows");
        }
    }

    /// <summary>Rows of `width` bytes at `from`, of one set, to their places at `to`, of the other. Rows that nothing comes for hold `fill`: 0, or -1.</summary>
    public static void Move(
        INcclCalls nccl, NcclLane lane, RowWay way, SlotValue source, SlotValue target, nint from, nint to, long width, int fill, NcclLaunch launch)
    {
        var moves = MovesOf(nccl, lane, way, source, target);
        var (sent, received) = (Staging(moves.SentStaging), Staging(moves.ReceivedStaging));
        for (var peer = 0; peer < moves.Sent.Length; peer++)
        {
            var other = peer;
            var (goes, comes) = (Place(moves.Sent[peer], sent, from), Place(moves.Received[peer], received, to));
            if (goes.Bytes > 0)
                launch.Group.Add(stream => nccl.Send(lane.Communicator, goes.At, goes.Bytes, other, stream));
            if (comes.Bytes > 0)
                launch.Group.Add(stream => nccl.Receive(lane.Communicator, comes.At, comes.Bytes, other, stream));
        }

        launch.Move(moves, new MovedRows(from, sent, to, width, fill), new MovedRows(from, received, to, width, fill));

        (nint At, long Bytes) Place(RowRun run, nint staging, nint value)
            => ((run.IsStaged ? staging : value) + (nint)(run.At * width), run.Count * width);

        nint Staging(int rows)
            => rows == 0 ? 0 : launch.Own(empty(rows * width, dtype: ScalarType.Byte, device: target.Device));
    }

    /// <summary>Kept with the set that the exchange of counts made.</summary>
    private static RowMoves MovesOf(INcclCalls nccl, NcclLane lane, RowWay way, SlotValue source, SlotValue target)
    {
        var (from, to) = (source.DeviceRows, target.DeviceRows);
        var (made, other) = way is RowWay.ToExperts or RowWay.Gather ? (to, from) : (from, to);
        return made.Moves(way, other, () =>
        {
            var (mine, theirs, n) = (Known(from, source), Known(to, target), lane.Members.Ranks.Length);
            var (ranges, places) = way switch
            {
                RowWay.ToExperts => (ByToken(mine, n), ByExpert(theirs)),
                RowWay.ToTokens => (ByExpert(mine), ByToken(theirs, n)),
                RowWay.Gather => (Whole(mine, n, 0), ByExpert(theirs)),
                RowWay.Scatter => (ByExpert(mine), Whole(theirs, n, to.Rows)),
                _ => throw new UnreachableException($"no way {way}"),
            };
            return RowMoves.Of(ranges, places, lane.Members.Me, way == RowWay.Scatter ? [] : Filling(theirs), integers =>
            {
                var tables = empty(integers.Length, dtype: ScalarType.Int32, device: target.Device);
                nccl.Rows.FromHost(integers, NcclLaunch.Address(tables));
                return tables;
            });
        });
    }

    /// <summary>Of a set whose experts are those of n members, one member after the other: each one's rows.</summary>
    private static RowRange[][] ByToken(RowSet set, int n)
    {
        var (ranges, local) = (new RowRange[n][], set.Experts / n);
        for (var member = 0; member < n; member++)
        {
            ranges[member] = new RowRange[local];
            for (var e = 0; e < local; e++)
                ranges[member][e] = new RowRange(set.Offsets[(member * local) + e], set.Counts[(member * local) + e]);
        }

        return ranges;
    }

    /// <summary>Of a set that members brought: each one's rows, expert by expert.</summary>
    private static RowRange[][] ByExpert(RowSet set)
    {
        var ranges = new RowRange[set.MemberCounts.Length][];
        for (var member = 0; member < ranges.Length; member++)
            ranges[member] = new RowRange[set.Experts];
        for (var e = 0; e < set.Experts; e++)
        {
            var at = set.Offsets[e];
            for (var member = 0; member < ranges.Length; member++)
            {
                var count = set.MemberCounts[member][e];
                ranges[member][e] = new RowRange(at, count);
                at += count;
            }
        }

        return ranges;
    }

    /// <summary>All rows of a set, for each of n members; those of a member `apart` rows behind those of the one before.</summary>
    private static RowRange[][] Whole(RowSet set, int n, int apart)
    {
        var ranges = new RowRange[n][];
        for (var member = 0; member < n; member++)
        {
            ranges[member] = new RowRange[set.Experts];
            for (var e = 0; e < set.Experts; e++)
                ranges[member][e] = new RowRange(checked((member * apart) + set.Offsets[e]), set.Counts[e]);
        }

        return ranges;
    }

    /// <summary>Rows that fill up experts' blocks.</summary>
    private static IEnumerable<RowRange> Filling(RowSet set)
    {
        for (var e = 0; e < set.Experts && set.Padding > 1; e++)
        {
            var first = set.Offsets[e] + set.Counts[e];
            yield return new RowRange(first, set.Offsets[e + 1] - first);
        }
    }

    /// <summary>What the members brought, in their order, in fp32, rounded once.</summary>
    private static void Sum(Tensor parts, Tensor into)
    {
        var all = new Tensor[parts.shape[0]];
        for (var i = 0; i < all.Length; i++)
            all[i] = parts.select(0, i);
        using var sum = Reduction.Of(all, false);
        into.copy_(sum).On(into);
        foreach (var part in all)
            part.Dispose();
    }

    /// <summary>What the host knows of a set, once counts were exchanged.</summary>
    private static RowSet Known(DeviceRows route, SlotValue slot)
        => route.Host ?? throw new InvalidOperationException($"how many rows {slot.Info.Name} has was not exchanged");
}

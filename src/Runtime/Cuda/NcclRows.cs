// Rows of routed tokens between GPUs: counts are exchanged once for a set, then ranges of rows go straight to where they belong.
using System.Diagnostics;
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>The order is that of RowSet: by local expert, then member, then token; so a member's rows of one expert are one range.</summary>
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
        var rows = call.Inputs[i].Tensor;
        var (here, there) = (call.Inputs[i + 1].DeviceRows, call.Inputs[i + 2].DeviceRows);
        var (source, target) = (Known(here, call.Inputs[i + 1]), Known(there, call.Inputs[i + 2]));
        var width = RowExchange.Width(rows);
        var type = rows.dtype;
        if (output.ScalarType != type)
            throw new InvalidOperationException($"slot {output.Info.Name} has elements of type {output.ScalarType}, the rows {type}");
        var from = launch.Read(rows);
        var (ranks, me) = lane.Members;
        var n = ranks.Length;
        var filled = output.Fill(there.Rows);
        var to = NcclLaunch.Address(filled);
        switch (call.Kind)
        {
            case var kind when kind.IsRowsToExperts:
                ToExperts(nccl, lane, from, source, to, target, width, launch);
                break;
            case var kind when kind.IsRowsToTokens:
                ToTokens(nccl, lane, from, source, to, target, width, launch);
                break;
            case Collective.AllGather:
                for (var e = 0; e < source.Experts; e++)
                {
                    var expert = e;
                    NcclDense.Exchange(
                        nccl, lane, launch,
                        _ => At(from, source.Offsets[expert], source.Counts[expert]),
                        peer => At(to, RowExchange.Start(target, peer, expert), target.MemberCounts[peer][expert]));
                }

                break;
            case Collective.ReduceScatter:
                {
                    // everybody's part of my rows, one behind the other, added in member order
                    long[] shape = [n, .. filled.shape];
                    var parts = zeros(shape, dtype: type, device: rows.device);
                    var (begin, size) = (launch.Own(parts), filled.ByteCount());
                    for (var e = 0; e < source.Experts; e++)
                    {
                        var expert = e;
                        NcclDense.Exchange(
                            nccl, lane, launch,
                            peer => At(from, RowExchange.Start(source, peer, expert), source.MemberCounts[peer][expert]),
                            peer => At(begin + (peer * (nint)size), target.Offsets[expert], target.Counts[expert]));
                    }

                    launch.After.Add(() => Sum(parts, filled));
                    break;
                }

            default:
                throw new UnreachableException($"{call.Kind} moves no rows");
        }

        if (target.Padding > 1)
            launch.After.Add(() => nccl.Rows.ClearPadding(filled, there));

        (nint, long) At(nint start, long row, long count) => Range(start, row, count, width);
    }

    /// <summary>Ranges of my rows, by token, to the ranks of their experts; rows of `width` bytes at `from` and `to`.</summary>
    public static void ToExperts(INcclCalls nccl, NcclLane lane, nint from, RowSet source, nint to, RowSet target, long width, NcclLaunch launch)
    {
        for (var e = 0; e < target.Experts; e++)
        {
            var expert = e;
            NcclDense.Exchange(
                nccl, lane, launch,
                peer => Range(from, source.Offsets[(peer * target.Experts) + expert], source.Counts[(peer * target.Experts) + expert], width),
                peer => Range(to, RowExchange.Start(target, peer, expert), target.MemberCounts[peer][expert], width));
        }
    }

    /// <summary>The way back.</summary>
    public static void ToTokens(INcclCalls nccl, NcclLane lane, nint from, RowSet source, nint to, RowSet target, long width, NcclLaunch launch)
    {
        for (var e = 0; e < source.Experts; e++)
        {
            var expert = e;
            NcclDense.Exchange(
                nccl, lane, launch,
                peer => Range(from, RowExchange.Start(source, peer, expert), source.MemberCounts[peer][expert], width),
                peer => Range(to, target.Offsets[(peer * source.Experts) + expert], target.Counts[(peer * source.Experts) + expert], width));
        }
    }

    private static (nint At, long Bytes) Range(nint start, long row, long count, long width) => (start + (nint)(row * width), count * width);

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
    public static RowSet Known(DeviceRows route, SlotValue slot)
        => route.Host ?? throw new InvalidOperationException($"how many rows {slot.Info.Name} has was not exchanged");
}

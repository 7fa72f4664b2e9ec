// The fused dispatch and combine between GPUs: a token goes once to each rank that has experts for it, and comes back as one sum of its rows.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>
/// Which tokens go from rank to rank; kept with the set of rows by expert that they become. `sent`: the rank's own tokens as rows of the
/// members that they go to, by member, then token. `tokens`[from][to] has everybody's counts, `width` is how many rows a token has at a
/// rank at most.
/// </summary>
internal sealed class Crossing(DeviceRows sent, int[][] tokens, int me, int width) : IDisposable
{
    private Tensor? _rowOf;

    public DeviceRows Sent => sent;

    public int Width => width;

    /// <summary>Tokens that go to each member, and those that come from each.</summary>
    public int[] SentCounts { get; } = tokens[me];

    public int[] ReceivedCounts { get; } = [.. tokens.Select(to => to[me])];

    /// <summary>At each member: where my first token lies among all that it received, less where it lies among those that I send.</summary>
    public int[] Shift { get; } =
        [.. Enumerable.Range(0, tokens.Length).Select(peer => tokens[..me].Sum(to => to[peer]) - tokens[me][..peer].Sum())];

    /// <summary>Of each row by expert, the token among those received: token * width + which of its rows here, [rows] i32; null before the first dispatch.</summary>
    public Tensor? Flat { get; set; }

    /// <summary>The rows of each token received, [tokens, width] i32; after a dispatch.</summary>
    public Tensor RowOf(IRowWork work)
        => _rowOf ??= work.RowOf(
            Flat ?? throw new InvalidOperationException("rows come back that no dispatch brought"), ReceivedCounts.Sum(), width);

    public void Dispose()
    {
        sent.Dispose();
        Flat?.Dispose();
        _rowOf?.Dispose();
    }
}

internal static class NcclFused
{
    /// <summary>The rank's tokens as rows of the members, `ranks`, that have experts for them.</summary>
    public static DeviceRows Sent(IRowWork work, DeviceRows route, int ranks)
    {
        using var reach = work.Reach(route, ranks);
        return work.Route(reach, Math.Min(ranks, route.Width));
    }

    /// <summary>(x [, probabilities], route by token, route by expert) -> rows by expert [, their probabilities].</summary>
    public static void AddDispatch(INcclCalls nccl, NcclLane lane, CollectiveCall call, NcclLaunch launch)
    {
        var values = call.Outputs.Count;
        var (x, source, target) = (call.Inputs[0].Tensor, call.Inputs[values], call.Inputs[values + 1]);
        var (here, there) = (source.DeviceRows, target.DeviceRows);
        var (crossing, work) = (Of(there, call), nccl.Rows);
        var rows = Typed(call.Outputs[0], x.dtype).Fill(there.Rows);
        var packed = Tokens(crossing.SentCounts, rows);
        work.Gather(x, crossing.Sent.Flat, crossing.Sent.Experts, packed);
        var received = Tokens(crossing.ReceivedCounts, rows);
        Exchange(nccl, lane, launch.Read(packed), crossing.SentCounts, launch.Own(received), crossing.ReceivedCounts, RowExchange.Width(packed), launch);
        packed.Dispose();
        if (crossing.Flat is null)
        {
            var places = work.Places(here, crossing.Sent, crossing.Shift, crossing.Width);
            crossing.Flat = empty(there.Rows, dtype: ScalarType.Int32, device: x.device);
            NcclRows.Move(nccl, lane, RowWay.ToExperts, source, target, launch.Own(places), NcclLaunch.Address(crossing.Flat), sizeof(int), -1, launch);
        }

        if (values == 2)
        {
            var one = empty(here.Rows, dtype: ScalarType.Float32, device: x.device);
            work.GatherOne(Float(call.Inputs[1]), here.Flat, one);
            var filled = Typed(call.Outputs[1], ScalarType.Float32).Fill(there.Rows);
            NcclRows.Move(nccl, lane, RowWay.ToExperts, source, target, launch.Own(one), NcclLaunch.Address(filled), sizeof(float), 0, launch);
        }

        launch.After.Add(() => work.Gather(received, crossing.Flat, crossing.Width, rows));
    }

    /// <summary>
    /// (rows by expert [, their probabilities], route by expert, route by token) -> y [, probabilities]. `perNode` ranks are a node, in whose
    /// order the sums of ranks are added.
    /// </summary>
    public static void AddCombine(INcclCalls nccl, NcclLane lane, CollectiveCall call, int perNode, NcclLaunch launch)
    {
        var values = call.Outputs.Count;
        var (rows, source, target) = (call.Inputs[0].Tensor, call.Inputs[values], call.Inputs[values + 1]);
        var (there, here) = (source.DeviceRows, target.DeviceRows);
        var (crossing, work) = (Of(there, call), nccl.Rows);
        int[] nodes = [.. lane.Members.Ranks.Select(rank => rank / perNode)];
        var sums = Tokens(crossing.ReceivedCounts, rows);
        work.Sum(rows, crossing.RowOf(work), sums);
        var back = Tokens(crossing.SentCounts, rows);
        Exchange(nccl, lane, launch.Read(sums), crossing.ReceivedCounts, launch.Own(back), crossing.SentCounts, RowExchange.Width(sums), launch);
        sums.Dispose();
        var y = Typed(call.Outputs[0], rows.dtype).Fill();
        launch.After.Add(() => work.SumByNode(back, crossing.Sent, nodes, y));
        if (values == 2)
        {
            var one = empty(here.Rows, dtype: ScalarType.Float32, device: rows.device);
            var p = Typed(call.Outputs[1], ScalarType.Float32).Fill();
            NcclRows.Move(
                nccl, lane, RowWay.ToTokens, source, target, launch.Read(Float(call.Inputs[1])), launch.Own(one), sizeof(float), 0, launch);
            launch.After.Add(() => work.ScatterOne(one, here.Flat, p));
        }
    }

    /// <summary>Runs of tokens to and from every member.</summary>
    private static void Exchange(
        INcclCalls nccl, NcclLane lane, nint from, int[] sent, nint to, int[] received, long width, NcclLaunch launch)
    {
        NcclDense.Exchange(nccl, lane, launch, peer => Run(from, sent, peer), peer => Run(to, received, peer));

        (nint, long) Run(nint start, int[] counts, int peer) => (start + (nint)(counts.Take(peer).Sum(count => (long)count) * width), counts[peer] * width);
    }

    /// <summary>Room for tokens that are as wide as rows.</summary>
    private static Tensor Tokens(int[] counts, Tensor rows)
        => empty([counts.Sum(), .. rows.shape.AsSpan(1)], dtype: rows.dtype, device: rows.device);

    private static Crossing Of(DeviceRows there, CollectiveCall call)
        => there.Crossing ?? throw new InvalidOperationException($"how many tokens cross {call.Group.Name} was not exchanged");

    private static SlotValue Typed(SlotValue output, ScalarType type)
        => output.ScalarType == type
            ? output
            : throw new InvalidOperationException($"slot {output.Info.Name} has elements of type {output.ScalarType}, the values {type}");

    private static Tensor Float(SlotValue input) => Typed(input, ScalarType.Float32).Tensor;
}

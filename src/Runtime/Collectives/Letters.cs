// What of its inputs a member sends to another process: the part that the receiver needs, where that is less than all.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>Makes the parcels that Finishing reads. Values that the receiver has itself, or does not look at, are left out.</summary>
internal static unsafe class Letters
{
    /// <summary>Does each member get a parcel of its own? Otherwise one goes to all.</summary>
    public static bool AreAddressed(CollectiveCall call)
        => call.Kind switch
        {
            Collective.ReduceScatter { Dim: var dim } => !IsRows(call, dim),
            Collective.AllToAll or Collective.Combine => true,
            var kind when kind.IsRouteToExperts || kind.IsRowsToExperts || kind.IsRowsToTokens => true,
            Collective.AllGather or Collective.Dispatch or Collective.Send or Collective.Recv => false,
            var kind when kind.IsAllReduceSum || kind.IsAllReduceMax => false,
            var kind => throw new UnreachableException($"no letters for {kind}"),
        };

    /// <summary>The parcel for `member` of `members`; where parcels are not addressed, the same for all.</summary>
    public static Parcel For(CollectiveCall call, int member, int members)
    {
        var inputs = call.Inputs;
        var tensors = new Tensor?[inputs.Count];
        var rows = new RowSet?[inputs.Count];
        switch (call.Kind)
        {
            case var kind when kind.IsAllReduceSum || kind.IsAllReduceMax:
                foreach (var i in Enumerable.Range(0, inputs.Count))
                    tensors[i] = inputs[i].Tensor.clone();
                break;
            case Collective.AllGather:
                foreach (var (i, _) in Tuples(call))
                {
                    if (inputs[i].HoldsRows)
                        rows[i] = Counts(inputs[i].Rows);
                    else
                        tensors[i] = inputs[i].Tensor.clone();
                    if (inputs.Count > call.Outputs.Count)
                        rows[i + 1] = Counts(inputs[i + 1].Rows);
                }

                break;
            case Collective.ReduceScatter { Dim: var dim }:
                foreach (var (i, output) in Tuples(call))
                {
                    tensors[i] = IsRows(call, dim)
                        ? inputs[i].Tensor.clone()
                        : Block(inputs[i].Tensor, output.StorageDim(dim), member, members);
                }

                break;
            case Collective.AllToAll { SplitDim: var dim }:
                foreach (var (i, output) in Tuples(call))
                    tensors[i] = Block(inputs[i].Tensor, output.StorageDim(dim), member, members);
                break;
            case var kind when kind.IsRouteToExperts:
                foreach (var (i, _) in Tuples(call))
                    rows[i] = ExpertsOf(inputs[i].Rows, member, members);
                break;
            case var kind when kind.IsRowsToExperts:
                foreach (var (i, _) in Tuples(call))
                {
                    var route = inputs[i + 1].Rows;
                    var experts = route.Experts / members;
                    var (first, end) = (route.Offsets[member * experts], route.Offsets[(member + 1) * experts]);
                    using var part = inputs[i].Tensor.narrow(0, first, end - first);
                    tensors[i] = part.clone();
                    rows[i + 1] = ExpertsOf(route, member, members);
                }

                break;
            case var kind when kind.IsRowsToTokens:
                foreach (var (i, _) in Tuples(call))
                    Return(i, i + 1);
                break;
            case Collective.Dispatch:
                {
                    // (x [, probabilities], route by token, route by expert)
                    var values = call.Outputs.Count;
                    for (var i = 0; i < values; i++)
                        tensors[i] = inputs[i].Tensor.clone();
                    rows[values] = inputs[values].Rows;
                    break;
                }

            case Collective.Combine:
                // (rows [, rows of probabilities], route by expert, route by token)
                for (var i = 0; i < call.Outputs.Count; i++)
                    Return(i, call.Outputs.Count);
                break;
            case Collective.Send or Collective.Recv:
                throw new UnreachableException("a message between stages is its input as it is");
            default:
                throw new UnreachableException($"no letters for {call.Kind}");
        }

        return new Parcel(tensors, rows);

        void Return(int i, int route)
        {
            var from = inputs[route].Rows;
            tensors[i] = RowsOf(inputs[i].Tensor, from, member);
            rows[route] = RowSet.FromMembers([from.MemberCounts[member]]);
        }
    }

    /// <summary>Where the operand tuple of each output begins.</summary>
    private static IEnumerable<(int First, SlotValue Output)> Tuples(CollectiveCall call)
        => call.Outputs.Select((output, i) => (i * (call.Inputs.Count / call.Outputs.Count), output));

    private static bool IsRows(CollectiveCall call, int dim) => dim < 3 && call.Outputs[0].Info.Routed;

    /// <summary>How many rows, not of which tokens.</summary>
    private static RowSet Counts(RowSet route) => RowSet.FromMembers([route.Counts], route.Padding);

    private static RowSet ExpertsOf(RowSet route, int member, int members)
    {
        var (experts, rest) = Math.DivRem(route.Experts, members);
        return rest == 0
            ? RowSet.FromMembers([route.Counts[(member * experts)..((member + 1) * experts)]], route.Padding)
            : throw new InvalidOperationException($"{route.Experts} experts do not split over {members} ranks");
    }

    private static Tensor Block(Tensor value, int dim, int member, int members)
    {
        var (length, rest) = Math.DivRem(value.shape[dim], members);
        if (rest != 0)
            throw new InvalidOperationException($"{value.shape[dim]} elements do not split over {members} ranks");
        using var block = value.narrow(dim, member * length, length);
        var result = empty(block.shape, dtype: value.dtype);
        result.copy_(block).On(result);
        return result;
    }

    /// <summary>The rows that came from a member, expert by expert, without those that fill up.</summary>
    private static Tensor RowsOf(Tensor rows, RowSet route, int member)
    {
        var counts = route.MemberCounts[member];
        var shape = (long[])rows.shape.Clone();
        shape[0] = counts.Sum(n => (long)n);
        var width = RowExchange.Width(rows);
        var result = empty(shape, dtype: rows.dtype);
        byte* from = (byte*)rows.Pointer(), to = (byte*)result.Pointer();
        for (var e = 0; e < counts.Length; e++)
        {
            var bytes = counts[e] * width;
            Buffer.MemoryCopy(from + (RowExchange.Start(route, member, e) * width), to, bytes, bytes);
            to += bytes;
        }

        return result;
    }
}

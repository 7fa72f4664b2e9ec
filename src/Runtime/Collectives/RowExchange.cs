// Moves routed rows between ranks: row ranges are copied as they lie, expert by expert.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Collectives;

internal static unsafe class RowExchange
{
    /// <summary>Everybody's counts of my experts, part of `parts`: rows ordered by expert, member, and then as they lay there.</summary>
    public static RowSet ToExperts(IReadOnlyList<RowSet> routes, int part, int parts, int padding)
    {
        var experts = routes[0].Experts / parts;
        if (experts * parts != routes[0].Experts)
            throw new InvalidOperationException($"{routes[0].Experts} experts do not split over {parts} ranks");
        var first = part * experts;
        return RowSet.FromMembers([.. routes.Select(r => r.Counts[first..(first + experts)])], padding);
    }

    /// <summary>Everybody's rows of all experts.</summary>
    public static RowSet Joined(IReadOnlyList<RowSet> routes, int padding)
        => RowSet.FromMembers([.. routes.Select(r => r.Counts)], padding);

    /// <summary>Copies the rows of `mine` out of everybody's; `firstExpert` is my first one in their numbering.</summary>
    public static void Collect(
        IReadOnlyList<Tensor> rows, IReadOnlyList<RowSet> routes, int firstExpert, RowSet mine, SlotValue result)
    {
        var target = result.Fill(mine.Rows);
        var width = Width(rows[0]);
        var start = (byte*)target.Pointer();
        for (var e = 0; e < mine.Experts; e++)
        {
            var to = start + (mine.Offsets[e] * width);
            for (var member = 0; member < rows.Count; member++)
            {
                var bytes = routes[member].Counts[firstExpert + e] * width;
                var from = (byte*)rows[member].Pointer() + (routes[member].Offsets[firstExpert + e] * width);
                Buffer.MemoryCopy(from, to, bytes, bytes);
                to += bytes;
            }
        }

        mine.ClearPadding(start, width);
    }

    /// <summary>Copies my rows back from the ranks that hold their experts; `routes` say what those received.</summary>
    public static void Return(IReadOnlyList<Tensor> rows, IReadOnlyList<RowSet> routes, int me, RowSet mine, SlotValue result)
    {
        var target = result.Fill(mine.Rows);
        var width = Width(rows[0]);
        var start = (byte*)target.Pointer();
        var expert = 0;
        for (var member = 0; member < rows.Count; member++)
        {
            for (var e = 0; e < routes[member].Experts; e++, expert++)
            {
                var bytes = mine.Counts[expert] * width;
                var from = (byte*)rows[member].Pointer() + (Start(routes[member], me, e) * width);
                Buffer.MemoryCopy(from, start + (mine.Offsets[expert] * width), bytes, bytes);
            }
        }

        mine.ClearPadding(start, width);
    }

    /// <summary>Sums everybody's results i for my rows, `own`; all members hold the same joined row set.</summary>
    public static void ReduceScatter(Exchange exchange, int i, RowSet joined, RowSet own, int me, SlotValue result)
    {
        using var sum = Reduction.Of(exchange, i, false);
        using var typed = sum.to_type(result.ScalarType);
        var mine = joined.MemberCounts[me];
        var target = result.Fill(own.Rows);
        var width = Width(typed);
        byte* from = (byte*)typed.Pointer(), to = (byte*)target.Pointer();
        for (var e = 0; e < joined.Experts; e++)
        {
            var bytes = mine[e] * width;
            Buffer.MemoryCopy(from + (Start(joined, me, e) * width), to + (own.Offsets[e] * width), bytes, bytes);
        }

        own.ClearPadding(to, width);
    }

    /// <summary>Where a member's rows of a local expert begin among those received.</summary>
    public static long Start(RowSet route, int member, int expert)
    {
        long start = route.Offsets[expert];
        for (var i = 0; i < member; i++)
            start += route.MemberCounts[i][expert];
        return start;
    }

    /// <summary>Bytes of one row.</summary>
    public static long Width(Tensor rows)
    {
        long width = TensorMemory.Width(rows.dtype);
        foreach (var extent in rows.shape.AsSpan(1))
            width *= extent;
        return width;
    }
}

// The fused dispatch and combine of routed tokens: rows are made where their experts are, and summed where their tokens are.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Collectives;

// Loopback hands everything over at one meeting; what a network would carry, node by node, is what Traffic counts.
internal static unsafe class FusedExchange
{
    /// <summary>Everybody's tokens [b s h] -> rows of my experts, by expert, member, then token; as Permute and RowsToExperts make them.</summary>
    public static void Tokens(
        IReadOnlyList<Tensor> tokens, IReadOnlyList<RowSet> routes, int firstExpert, RowSet mine, SlotValue result)
        => Collect(tokens, routes, firstExpert, mine, result, static (route, _) => route.Tokens, static (token, _, _) => token);

    /// <summary>Everybody's probabilities [b s e] -> one-wide rows of my experts, in the same order.</summary>
    public static void Probabilities(
        IReadOnlyList<Tensor> probs, IReadOnlyList<RowSet> routes, int firstExpert, RowSet mine, SlotValue result)
        => Collect(
            probs,
            routes,
            firstExpert,
            mine,
            result,
            static (route, _) => (long)route.Tokens * route.Experts,
            static (token, expert, route) => ((long)token * route.Experts) + expert);

    private static void Collect(
        IReadOnlyList<Tensor> values,
        IReadOnlyList<RowSet> routes,
        int firstExpert,
        RowSet mine,
        SlotValue result,
        Func<RowSet, int, long> places,
        Func<int, int, RowSet, long> place)
    {
        var target = result.Fill(mine.Rows);
        var start = (byte*)target.Pointer();
        var row = mine.Rows == 0 ? 0 : target.ByteCount() / mine.Rows;
        for (var e = 0; e < mine.Experts; e++)
        {
            var to = start + (mine.Offsets[e] * row);
            for (var member = 0; member < values.Count; member++)
            {
                var route = ByToken(routes[member]);
                var count = places(route, member);
                var width = count == 0 ? 0 : values[member].numel() / count * TensorMemory.Width(values[member].dtype);
                var from = (byte*)values[member].Pointer();
                var first = route.Offsets[firstExpert + e];
                for (var i = first; i < first + route.Counts[firstExpert + e]; i++, to += width)
                    Buffer.MemoryCopy(from + (place(route.TokenIndex[i], firstExpert + e, route) * width), to, width, width);
            }
        }

        mine.ClearPadding(start, row);
    }

    /// <summary>
    /// Everybody's rows -> my tokens [b s h]: summed over experts in ascending order on each rank, then over the ranks of each node, then over
    /// nodes; in fp32, and every sum is rounded as it is sent. `nodes` gives the node of each member.
    /// </summary>
    public static void Sums(IReadOnlyList<Tensor> rows, IReadOnlyList<RowSet> routes, int[] nodes, int me, RowSet mine, SlotValue result)
    {
        if (Simd.IsBFloat16(rows[0].dtype))
            Sums<BF16>(rows, routes, nodes, me, ByToken(mine), result);
        else
            Sums<F32>(rows, routes, nodes, me, ByToken(mine), result);
    }

    private static void Sums<T>(
        IReadOnlyList<Tensor> rows, IReadOnlyList<RowSet> routes, int[] nodes, int me, RowSet mine, SlotValue result)
        where T : struct, IElement
    {
        var target = result.Fill();
        var to = target.Pointer();
        var width = mine.Tokens == 0 ? 0 : target.numel() / mine.Tokens;
        var (members, places) = Places(routes, me, mine);
        var (ofRank, ofNode, total) = (new float[width], new float[width], new float[width]);
        for (var t = 0; t < mine.Tokens; t++)
        {
            Array.Clear(total);
            var of = mine.TokenRows.AsSpan(mine.TokenStart[t]..mine.TokenStart[t + 1]);
            for (var i = 0; i < of.Length;)
            {
                var node = nodes[members[of[i]]];
                Array.Clear(ofNode);
                while (i < of.Length && nodes[members[of[i]]] == node)
                {
                    var member = members[of[i]];
                    Array.Clear(ofRank);
                    var from = rows[member].Pointer();
                    for (; i < of.Length && members[of[i]] == member; i++)
                    {
                        var at = places[of[i]] * width;
                        for (var h = 0; h < width; h++)
                            ofRank[h] += T.Load(from, at + h);
                    }

                    AddRounded<T>(ofRank, ofNode);
                }

                AddRounded<T>(ofNode, total);
            }

            for (var h = 0; h < width; h++)
                T.Store(to, (t * width) + h, total[h]);
        }
    }

    private static void AddRounded<T>(float[] sum, float[] to)
        where T : struct, IElement
    {
        var rounded = stackalloc byte[4];
        for (var h = 0; h < sum.Length; h++)
        {
            T.Store(rounded, 0, sum[h]);
            to[h] += T.Load(rounded, 0);
        }
    }

    /// <summary>Everybody's one-wide rows -> my [b s e], zero where nothing is routed.</summary>
    public static void Scattered(IReadOnlyList<Tensor> rows, IReadOnlyList<RowSet> routes, int me, RowSet mine, SlotValue result)
    {
        ByToken(mine);
        var target = result.Fill();
        target.zero_().On(target);
        var element = TensorMemory.Width(target.dtype);
        var to = (byte*)target.Pointer();
        var (members, places) = Places(routes, me, mine);
        for (var e = 0; e < mine.Experts; e++)
        {
            for (var row = mine.Offsets[e]; row < mine.Offsets[e] + mine.Counts[e]; row++)
            {
                var from = (byte*)rows[members[row]].Pointer() + (places[row] * element);
                Buffer.MemoryCopy(from, to + ((((long)mine.TokenIndex[row] * mine.Experts) + e) * element), element, element);
            }
        }
    }

    /// <summary>For each of my rows, the member that holds its expert and the place among that member's rows.</summary>
    private static (int[] Members, long[] Places) Places(IReadOnlyList<RowSet> routes, int me, RowSet mine)
    {
        var members = new int[mine.Rows];
        var places = new long[mine.Rows];
        var expert = 0;
        for (var member = 0; member < routes.Count; member++)
        {
            for (var e = 0; e < routes[member].Experts; e++, expert++)
            {
                var start = RowExchange.Start(routes[member], me, e);
                for (var row = mine.Offsets[expert]; row < mine.Offsets[expert] + mine.Counts[expert]; row++)
                    (members[row], places[row]) = (member, start + row - mine.Offsets[expert]);
            }
        }

        return (members, places);
    }

    private static RowSet ByToken(RowSet route)
        => route.ByToken ? route : throw new InvalidOperationException("a fused dispatch starts from rows by token");
}

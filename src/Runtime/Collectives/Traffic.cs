// What the exchange of routed rows would send over a network: bytes inside nodes and between them.
using System.Runtime.CompilerServices;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>Counts payload bytes of routed rows, as the ranks of a job send them; node = rank / RanksPerNode.</summary>
public sealed class Traffic(int ranksPerNode)
{
    private long _inside;
    private long _between;

    // sets of rows by expert whose places went with a dispatch
    private readonly ConditionalWeakTable<RowSet, object> _placed = [];

    public int RanksPerNode => ranksPerNode;

    /// <summary>Bytes between ranks of one node.</summary>
    public long Inside => _inside;

    /// <summary>Bytes between nodes.</summary>
    public long Between => _between;

    /// <summary>Rows of `route` (by token), one copy for each expert; `ranks` are the members of the group, `me` is one of them.</summary>
    internal void CountRows(RowSet route, int[] ranks, int me, long width)
    {
        var experts = route.Experts / ranks.Length;
        for (var e = 0; e < route.Experts; e++)
            Add(ranks[me], ranks[e / experts], route.Counts[e] * width);
    }

    /// <summary>With the first dispatch into a set `there` each row of `route` says by 4 bytes which token it is of.</summary>
    internal void CountPlaces(RowSet there, RowSet route, int[] ranks, int me)
    {
        if (_placed.TryAdd(there, there))
            CountRows(route, ranks, me, sizeof(int));
    }

    /// <summary>
    /// A token, or the sum of its rows, once for each node that holds experts of it; inside that node it goes on from the rank that
    /// received it (the member with the sender's place among those of its node) to each other rank with experts of it.
    /// </summary>
    internal void CountTokens(RowSet route, int[] ranks, int me, long width)
    {
        var experts = route.Experts / ranks.Length;
        var expertOf = new int[route.Rows];
        for (var e = 0; e < route.Experts; e++)
            Array.Fill(expertOf, e, route.Offsets[e], route.Counts[e]);
        var members = ranks.ToLookup(rank => rank / ranksPerNode).ToDictionary(node => node.Key, node => node.ToArray());
        var home = ranks[me] / ranksPerNode;
        var place = Array.IndexOf(members[home], ranks[me]);
        var nodes = new HashSet<int>();
        var holders = new HashSet<int>();
        for (var t = 0; t < route.Tokens; t++)
        {
            nodes.Clear();
            holders.Clear();
            foreach (var row in route.TokenRows.AsSpan(route.TokenStart[t]..route.TokenStart[t + 1]))
                holders.Add(ranks[expertOf[row] / experts]);
            foreach (var rank in holders)
            {
                var node = rank / ranksPerNode;
                // where the token enters that node; its own node it never leaves
                var gate = node == home ? ranks[me] : members[node][place % members[node].Length];
                if (nodes.Add(node))
                    Add(ranks[me], gate, width);
                Add(gate, rank, width);
            }
        }
    }

    /// <summary>Bytes from rank to rank; what stays on one is not counted.</summary>
    internal void Add(int from, int to, long bytes)
    {
        if (from == to)
            return;
        if (from / ranksPerNode == to / ranksPerNode)
            Interlocked.Add(ref _inside, bytes);
        else
            Interlocked.Add(ref _between, bytes);
    }
}

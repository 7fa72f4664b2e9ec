// Which rows of routed tokens a rank holds: the value of a `route` slot.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Memory;

/// <summary>
/// Rows ordered by local expert, then by source member, then by token; each expert's rows stand in a block of a multiple of
/// `Padding`, whose end is filled up. Immutable; shared between slots.
/// </summary>
public sealed class RowSet
{
    private RowSet(int padding, int[] counts, int tokens, int[] tokenIndex, int[] tokenStart, int[] tokenRows, int[][] memberCounts)
    {
        Padding = padding;
        Counts = counts;
        Tokens = tokens;
        TokenIndex = tokenIndex;
        TokenStart = tokenStart;
        TokenRows = tokenRows;
        MemberCounts = memberCounts;
        Offsets = Blocks(counts, padding);
    }

    /// <summary>Blocks of rows are multiples of so many; 1: no row fills up.</summary>
    public int Padding { get; }

    /// <summary>Rows of each local expert, without those that fill up.</summary>
    public int[] Counts { get; }

    /// <summary>First row of each local expert's block, then the number of rows.</summary>
    public int[] Offsets { get; }

    /// <summary>Local experts.</summary>
    public int Experts => Counts.Length;

    /// <summary>All rows, with those that fill up.</summary>
    public int Rows => Offsets[^1];

    /// <summary>Local tokens (batch x seq); 0 when the rows came from other ranks.</summary>
    public int Tokens { get; }

    /// <summary>True while the rows are those of the rank's own tokens.</summary>
    public bool ByToken => MemberCounts.Length == 0;

    /// <summary>The token (b * seq + s) of each row, -1 of one that fills up; by token only.</summary>
    public int[] TokenIndex { get; }

    /// <summary>Where each token's rows begin in TokenRows, [Tokens + 1]; by token only.</summary>
    public int[] TokenStart { get; }

    /// <summary>The rows of each token, experts ascending; by token only.</summary>
    public int[] TokenRows { get; }

    /// <summary>Rows received from each member, per local expert: [member][expert]; by expert only.</summary>
    public int[][] MemberCounts { get; }

    /// <summary>Bytes of the index arrays.</summary>
    public long Bytes
        => 4L * (Counts.Length + Offsets.Length + TokenIndex.Length + TokenStart.Length + TokenRows.Length
            + MemberCounts.Sum(m => m.Length));

    /// <summary>From a mask [tokens, experts] of bytes, non-zero where routed.</summary>
    public static RowSet FromMask(ReadOnlySpan<byte> mask, int tokens, int experts, int padding = 1)
    {
        var counts = new int[experts];
        var chosen = new List<int>(tokens * 8);
        var start = new int[tokens + 1];
        for (var t = 0; t < tokens; t++)
        {
            var row = mask.Slice(t * experts, experts);
            for (var e = row.IndexOfAnyExcept((byte)0); e >= 0; e = Next(row, e))
            {
                counts[e]++;
                chosen.Add(e);
            }

            start[t + 1] = chosen.Count;
        }

        var next = Blocks(counts, padding);
        var index = new int[next[experts]];
        if (padding > 1)
            Array.Fill(index, -1);
        var rows = new int[chosen.Count];
        for (var t = 0; t < tokens; t++)
        {
            for (var i = start[t]; i < start[t + 1]; i++)
            {
                var row = next[chosen[i]]++;
                rows[i] = row;
                index[row] = t;
            }
        }

        return new RowSet(padding, counts, tokens, index, start, rows, []);
    }

    /// <summary>Rows that came from several members: memberCounts[member][local expert].</summary>
    public static RowSet FromMembers(int[][] memberCounts, int padding = 1)
    {
        var counts = new int[memberCounts[0].Length];
        foreach (var member in memberCounts)
        {
            for (var e = 0; e < counts.Length; e++)
                counts[e] += member[e];
        }

        return new RowSet(padding, counts, 0, [], [], [], memberCounts);
    }

    /// <summary>The rows of experts [first, first + count), renumbered from 0, in blocks of multiples of `padding`.</summary>
    public RowSet SliceExperts(int first, int count, int padding = 1)
    {
        if (!ByToken)
            return FromMembers([.. MemberCounts.Select(m => m[first..(first + count)])], padding);
        int from = Offsets[first], to = Offsets[first + count];
        var counts = Counts[first..(first + count)];
        var blocks = Blocks(counts, padding);
        // where each row of the range goes; its token goes with it
        var places = new int[to - from];
        var index = new int[blocks[count]];
        Array.Fill(index, -1);
        for (var e = 0; e < count; e++)
        {
            for (var i = 0; i < counts[e]; i++)
            {
                var row = Offsets[first + e] + i;
                places[row - from] = blocks[e] + i;
                index[blocks[e] + i] = TokenIndex[row];
            }
        }

        var start = new int[Tokens + 1];
        var rows = new List<int>(to - from);
        for (var t = 0; t < Tokens; t++)
        {
            for (var i = TokenStart[t]; i < TokenStart[t + 1]; i++)
            {
                if (TokenRows[i] >= from && TokenRows[i] < to)
                    rows.Add(places[TokenRows[i] - from]);
            }

            start[t + 1] = rows.Count;
        }

        return new RowSet(padding, counts, Tokens, index, start, [.. rows], []);
    }

    /// <summary>Zeros in the rows that fill up.</summary>
    public unsafe void ClearPadding(byte* rows, long width)
    {
        if (Padding == 1)
            return;
        for (var e = 0; e < Experts; e++)
        {
            long first = Offsets[e] + Counts[e];
            NativeMemory.Clear(rows + (first * width), (nuint)((Offsets[e + 1] - first) * width));
        }
    }

    private static int[] Blocks(int[] counts, int padding)
    {
        var offsets = new int[counts.Length + 1];
        for (var e = 0; e < counts.Length; e++)
            offsets[e + 1] = checked(offsets[e] + ((counts[e] + padding - 1) / padding * padding));
        return offsets;
    }

    private static int Next(ReadOnlySpan<byte> row, int e)
    {
        var step = row[(e + 1)..].IndexOfAnyExcept((byte)0);
        return step < 0 ? -1 : e + 1 + step;
    }
}

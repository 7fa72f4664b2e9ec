// Where ranges of routed rows lie on both sides of an exchange: what is one run for each peer, and what goes through staging memory to be one.
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Rows [At, At + Count) of a value.</summary>
internal readonly record struct RowRange(int At, int Count);

/// <summary>The rows of one message: they lie together, in the value itself or in staging memory.</summary>
internal readonly record struct RowRun(int At, int Count, bool IsStaged);

/// <summary>A value whose rows of `Width` bytes a table moves. `Fill`: 0, or -1 for all bits, in rows that nothing comes for.</summary>
internal readonly record struct MovedRows(nint From, nint Staging, nint To, long Width, int Fill)
{
    /// <summary>Values whose rows one kernel moves at most.</summary>
    public const int AtOnce = 2;
}

/// <summary>
/// Ranges of rows that one kernel moves: segments [Count, 4] i32 of first, from, to and how, from integer `Start` of a tensor on. `first` counts
/// the rows of the segments before, `how` says where a segment's rows come from and go to.
/// </summary>
internal readonly record struct RowTable(int Start, int Count, int Rows)
{
    /// <summary>Bits of `how`; without one, rows go from the value to the result.</summary>
    public const int FromStaging = 1, ToStaging = 2, Fills = 4;

    /// <summary>Integers of a segment.</summary>
    public const int Segment = 4;
}

/// <summary>
/// One way of rows between ranks: a message for each peer. Where a peer's rows lie together on a side they are sent from there, or received
/// there; others go through staging memory, from or to which a kernel moves them. A rank's own rows go straight to their place, by the same
/// kernel.
/// </summary>
internal sealed class RowMoves : IDisposable
{
    private RowMoves(RowRun[] sent, RowRun[] received, int sentStaging, int receivedStaging, RowTable before, RowTable behind, Tensor? tables)
    {
        Sent = sent;
        Received = received;
        SentStaging = sentStaging;
        ReceivedStaging = receivedStaging;
        Before = before;
        Behind = behind;
        Tables = tables;
    }

    /// <summary>The message to each member, and that from it; of no rows for the rank itself.</summary>
    public RowRun[] Sent { get; }

    public RowRun[] Received { get; }

    /// <summary>Rows of staging memory in front of the messages, and behind them.</summary>
    public int SentStaging { get; }

    public int ReceivedStaging { get; }

    /// <summary>What is moved before anything is sent, and once everything has come.</summary>
    public RowTable Before { get; }

    public RowTable Behind { get; }

    /// <summary>The integers of both tables on the device; null where both are empty.</summary>
    public Tensor? Tables { get; }

    /// <summary>
    /// `from`[member] are the ranges of what goes to a member, `to`[member] those of what comes from it, in one order on both ranks; `fill` are
    /// rows of the result that nothing comes for. `upload` makes a tensor of integers.
    /// </summary>
    public static RowMoves Of(RowRange[][] from, RowRange[][] to, int me, IEnumerable<RowRange> fill, Func<int[], Tensor> upload)
    {
        var (before, behind) = (new Segments(), new Segments());
        var (sent, sentStaging) = Runs(from, me, (range, staged) => before.Add(range.At, staged, range.Count, RowTable.ToStaging));
        var (received, receivedStaging) = Runs(to, me, (range, staged) => behind.Add(staged, range.At, range.Count, RowTable.FromStaging));
        // with the others, so that there is one kernel where one side is in order
        var own = before.Count > 0 ? before : behind;
        for (var k = 0; k < from[me].Length; k++)
        {
            if (from[me][k].Count != to[me][k].Count)
                throw new InvalidOperationException($"{from[me][k].Count} rows of the rank itself go to {to[me][k].Count} places");
            own.Add(from[me][k].At, to[me][k].At, from[me][k].Count, 0);
        }

        foreach (var range in fill)
            own.Add(0, range.At, range.Count, RowTable.Fills);
        int[] integers = [.. before.Integers, .. behind.Integers];
        return new RowMoves(
            sent, received, sentStaging, receivedStaging, new RowTable(0, before.Count, before.Rows),
            new RowTable(before.Integers.Count, behind.Count, behind.Rows), integers.Length == 0 ? null : upload(integers));
    }

    public void Dispose() => Tables?.Dispose();

    /// <summary>Each member's message; `stage` gets the ranges of those whose rows do not lie together, with their place in staging memory.</summary>
    private static (RowRun[] Runs, int Staged) Runs(RowRange[][] ranges, int me, Action<RowRange, int> stage)
    {
        var runs = new RowRun[ranges.Length];
        var staged = 0;
        for (var peer = 0; peer < ranges.Length; peer++)
        {
            if (peer == me)
                continue;
            var (begin, end, count, together) = (0, 0, 0, true);
            foreach (var range in ranges[peer])
            {
                if (range.Count == 0)
                    continue;
                if (count == 0)
                    begin = range.At;
                else if (range.At != end)
                    together = false;
                end = range.At + range.Count;
                count = checked(count + range.Count);
            }

            runs[peer] = together ? new RowRun(begin, count, false) : new RowRun(staged, count, true);
            if (together)
                continue;
            foreach (var range in ranges[peer])
            {
                stage(range, staged);
                staged = checked(staged + range.Count);
            }
        }

        return (runs, staged);
    }

    /// <summary>Segments of a table; neighbours that go on alike become one, and those of no rows none.</summary>
    private sealed class Segments
    {
        public List<int> Integers { get; } = [];

        public int Rows { get; private set; }

        public int Count => Integers.Count / RowTable.Segment;

        public void Add(int from, int to, int count, int how)
        {
            if (count == 0)
                return;
            var last = Integers.Count - RowTable.Segment;
            var length = last < 0 ? 0 : Rows - Integers[last];
            var goesOn = last >= 0 && Integers[last + 3] == how && Integers[last + 2] + length == to
                && (how == RowTable.Fills || Integers[last + 1] + length == from);
            if (!goesOn)
                Integers.AddRange([Rows, from, to, how]);
            Rows = checked(Rows + count);
        }
    }
}

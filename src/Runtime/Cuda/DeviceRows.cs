// Which rows of routed tokens a rank holds, with everything in the GPU's memory: without other ranks, nobody on the host waits to know how many.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>
/// A row set as RowSet describes it. `Rows` is how many there may be: the host knows no more; those behind the last hold anything
/// and nobody reads them.
/// </summary>
public sealed class DeviceRows : IDisposable
{
    private readonly List<(RowWay Way, DeviceRows Other, RowMoves Moves)> _moves = [];

    internal DeviceRows(int rows, int tokens, int experts, int width, int padding, Tensor counts, Tensor offsets, Tensor flat, Tensor rowOf)
    {
        Rows = rows;
        Tokens = tokens;
        Experts = experts;
        Width = width;
        Padding = padding;
        Counts = counts;
        Offsets = offsets;
        Flat = flat;
        RowOf = rowOf;
        Ends = offsets.narrow(0, 1, experts);
    }

    /// <summary>Rows that slots hold.</summary>
    public int Rows { get; }

    /// <summary>Local tokens (batch x seq).</summary>
    public int Tokens { get; }

    /// <summary>Local experts.</summary>
    public int Experts { get; }

    /// <summary>Rows that a token may have.</summary>
    public int Width { get; }

    /// <summary>Blocks of rows are multiples of so many.</summary>
    public int Padding { get; }

    /// <summary>Rows of each expert without those that fill up, [experts] i32.</summary>
    public Tensor Counts { get; }

    /// <summary>First row of each expert's block, then the end of the last, [experts + 1] i32.</summary>
    public Tensor Offsets { get; }

    /// <summary>End of each expert's block, [experts] i32; a view.</summary>
    public Tensor Ends { get; }

    /// <summary>token * experts + expert of each row, -1 where there is none, [rows] i32.</summary>
    public Tensor Flat { get; }

    /// <summary>The rows of each token, experts ascending, then -1, [tokens, width] i32.</summary>
    public Tensor RowOf { get; }

    /// <summary>
    /// What the host knows of counts and blocks once they were exchanged with other ranks, as a set by expert with one member for each
    /// rank that rows came from; null before. Rows by token stay as many as there may be.
    /// </summary>
    internal RowSet? Host { get; set; }

    /// <summary>Rows that came from several ranks, exactly as many as there are: by expert, then member, then token. `fill` copies integers to a tensor.</summary>
    internal static DeviceRows ByExpert(RowSet host, Device device, System.Action<int[], Tensor> fill)
    {
        // one copy for both
        using var both = empty((2 * host.Experts) + 1, dtype: ScalarType.Int32, device: device);
        fill([.. host.Offsets, .. host.Counts], both);
        return new DeviceRows(
            host.Rows, 0, host.Experts, 0, host.Padding, both.narrow(0, host.Experts + 1, host.Experts), both.narrow(0, 0, host.Experts + 1),
            empty(0, dtype: ScalarType.Int32, device: device), empty([0, 0], dtype: ScalarType.Int32, device: device))
        { Host = host };
    }

    /// <summary>A set that the processor made, with everything known: where collectives of GPUs run in its memory.</summary>
    internal static DeviceRows Of(RowSet set)
    {
        if (!set.ByToken)
            return ByExpert(set, CPU, static (values, tensor) => new HostRowWork().FromHost(values, NcclLaunch.Address(tensor)));
        var flat = new int[set.Rows];
        Array.Fill(flat, -1);
        for (var e = 0; e < set.Experts; e++)
        {
            for (var row = set.Offsets[e]; row < set.Offsets[e] + set.Counts[e]; row++)
                flat[row] = (set.TokenIndex[row] * set.Experts) + e;
        }

        // a rank cannot know how many rows tokens of other ranks have
        var rowOf = new int[set.Tokens * set.Experts];
        Array.Fill(rowOf, -1);
        for (var t = 0; t < set.Tokens; t++)
            set.TokenRows.AsSpan(set.TokenStart[t]..set.TokenStart[t + 1]).CopyTo(rowOf.AsSpan(t * set.Experts));
        using var lists = tensor(rowOf);
        return new DeviceRows(
            set.Rows, set.Tokens, set.Experts, set.Experts, set.Padding, tensor(set.Counts), tensor(set.Offsets), tensor(flat),
            lists.reshape(set.Tokens, set.Experts))
        { Host = set };
    }

    /// <summary>The set as kernels of the processor read it; of indices in its memory.</summary>
    internal unsafe RowSet OnHost()
    {
        if (!ByToken || Host is { ByToken: true })
            return Host ?? throw new InvalidOperationException("rows of other ranks that nobody counted");
        var mask = new byte[Tokens * Experts];
        foreach (var at in new ReadOnlySpan<int>(Flat.Pointer(), Rows))
        {
            if (at >= 0)
                mask[at] = 1;
        }

        return Host = RowSet.FromMask(mask, Tokens, Experts, Padding);
    }

    /// <summary>True while the rows are those of the rank's own tokens.</summary>
    internal bool ByToken => Tokens > 0;

    /// <summary>How tokens cross to their experts' ranks, for a fused dispatch; null: their counts were not exchanged.</summary>
    internal Crossing? Crossing { get; set; }

    /// <summary>How rows go between this set, which other ranks' counts made, and another one; made once.</summary>
    internal RowMoves Moves(RowWay way, DeviceRows other, Func<RowMoves> make)
    {
        foreach (var made in _moves)
        {
            if (made.Way == way && ReferenceEquals(made.Other, other))
                return made.Moves;
        }

        var moves = make();
        _moves.Add((way, other, moves));
        return moves;
    }

    /// <summary>Bytes of the index tensors.</summary>
    public long Bytes => Counts.ByteCount() + Offsets.ByteCount() + Flat.ByteCount() + RowOf.ByteCount();

    public void Dispose()
    {
        foreach (var made in _moves)
            made.Moves.Dispose();
        Crossing?.Dispose();
        Ends.Dispose();
        Counts.Dispose();
        Offsets.Dispose();
        Flat.Dispose();
        RowOf.Dispose();
    }
}

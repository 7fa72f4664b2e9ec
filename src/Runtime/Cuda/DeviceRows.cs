// Which rows of routed tokens a rank holds, with everything in the GPU's memory: nobody on the host waits to know how many there are.
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>
/// A row set as RowSet describes it. `Rows` is how many there may be: the host knows no more; those behind the last hold anything
/// and nobody reads them.
/// </summary>
public sealed class DeviceRows : IDisposable
{
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

    /// <summary>Bytes of the index tensors.</summary>
    public long Bytes => Counts.ByteCount() + Offsets.ByteCount() + Flat.ByteCount() + RowOf.ByteCount();

    public void Dispose()
    {
        Ends.Dispose();
        Counts.Dispose();
        Offsets.Dispose();
        Flat.Dispose();
        RowOf.Dispose();
    }
}

// Routed rows of collectives on a GPU: kernels of Rows.cu, on the device that the calling thread has entered.
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal sealed unsafe class CudaRowWork : IRowWork
{
    /// <summary>Rows that a block of move_rows moves at once.</summary>
    private const int RowsOfBlock = 4;

    public void FromHost(ReadOnlySpan<int> values, nint to)
    {
        // the host does not wait for copies of 64 KiB at most (CUDA C++ programming guide, asynchronous concurrent execution)
        const int AtOnce = (64 << 10) / sizeof(int);
        fixed (int* p = values)
        {
            for (var first = 0; first < values.Length; first += AtOnce)
                Driver.FromHost(p + first, to + (first * (nint)sizeof(int)), Math.Min(AtOnce, values.Length - first) * (long)sizeof(int), 0);
        }
    }

    public void Move(nint tables, RowTable table, ReadOnlySpan<MovedRows> values, nint stream)
    {
        var (a, b) = (values[0], values.Length > 1 ? values[1] : default);
        var threads = Gpu.Threads(Math.Max(a.Width, b.Width) / 16, false);
        Gpu.LaunchOn(
            stream, "Moves", "move_rows", (table.Rows + RowsOfBlock - 1) / RowsOfBlock, threads, (long)tables + (table.Start * sizeof(int)), table.Count,
            table.Rows, (long)a.From, (long)a.Staging, (long)a.To, a.Width, a.Fill, (long)b.From, (long)b.Staging, (long)b.To, b.Width, b.Fill);
    }

    public DeviceRows Route(Tensor mask, int width) => CudaRows.RowsOf(mask, width, 1);

    public Tensor Reach(DeviceRows route, int ranks)
    {
        var reach = Gpu.Empty(route.Flat, ScalarType.Byte, route.Tokens, ranks);
        Gpu.Launch(
            "Rows", "reach", Gpu.Blocks(route.Tokens), 256, route.RowOf, route.Flat, reach, (long)route.Tokens, route.Width, route.Experts, ranks);
        return reach;
    }

    public Tensor Places(DeviceRows route, DeviceRows sent, int[] shift, int width)
    {
        var places = Gpu.Empty(route.Flat, ScalarType.Int32, route.Rows);
        using var shifts = Integers(shift, route.Flat);
        Gpu.Launch(
            "Rows", "places", Gpu.Blocks(route.Tokens), 256, route.RowOf, route.Flat, sent.RowOf, shifts, places, (long)route.Tokens, route.Width,
            route.Experts, sent.Width, shift.Length, width);
        return places;
    }

    public Tensor RowOf(Tensor flat, long tokens, int per)
    {
        var rowOf = full([tokens, per], -1, dtype: ScalarType.Int32, device: flat.device);
        Gpu.Launch("Rows", "row_of", Gpu.Blocks(flat.numel()), 256, flat, rowOf, flat.numel());
        return rowOf;
    }

    public void Gather(Tensor tokens, Tensor flat, int per, Tensor rows) => CudaRows.Gather(tokens, flat, per, rows);

    public void Sum(Tensor rows, Tensor rowOf, Tensor tokens) => CudaRows.Sum(rows, rowOf, tokens);

    public void SumByNode(Tensor rows, DeviceRows sent, int[] nodes, Tensor tokens)
    {
        if (nodes.AsSpan().IndexOfAnyExcept(nodes[0]) < 0)
        {
            CudaRows.Sum(rows, sent.RowOf, tokens);
            return;
        }

        using var nodeOf = Integers(nodes, rows);
        var h = sent.Tokens == 0 ? 0 : (int)(tokens.numel() / sent.Tokens);
        Gpu.Launch(
            "Rows", "unpermute_nodes_" + Gpu.Type(rows), sent.Tokens, Gpu.Threads(h, false), rows, sent.RowOf, sent.Flat, nodeOf, tokens,
            (long)sent.Tokens, h, sent.Width, nodes.Length);
    }

    public void GatherOne(Tensor p, Tensor flat, Tensor rows) => CudaRows.GatherOne(p, flat, rows);

    public void ScatterOne(Tensor rows, Tensor flat, Tensor p) => CudaRows.ScatterOne(rows, flat, p);

    private Tensor Integers(int[] values, Tensor beside)
    {
        var made = Gpu.Empty(beside, ScalarType.Int32, values.Length);
        FromHost(values, (nint)Memory.TensorMemory.Pointer(made));
        return made;
    }
}

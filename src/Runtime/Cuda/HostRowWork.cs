// Routed rows of collectives in the memory of the processor: the same results as CudaRowWork, by loops.
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal sealed unsafe class HostRowWork : IRowWork
{
    public void FromHost(ReadOnlySpan<int> values, nint to) => values.CopyTo(new Span<int>((void*)to, values.Length));

    public void Move(nint tables, RowTable table, ReadOnlySpan<MovedRows> values, nint stream)
    {
        var segments = new ReadOnlySpan<int>((int*)tables + table.Start, table.Count * RowTable.Segment);
        foreach (var value in values)
        {
            for (var i = 0; i < segments.Length; i += RowTable.Segment)
            {
                var next = i + RowTable.Segment;
                var (rows, how) = ((next < segments.Length ? segments[next] : table.Rows) - segments[i], segments[i + 3]);
                var (from, to) = ((how & RowTable.FromStaging) != 0 ? value.Staging : value.From, (how & RowTable.ToStaging) != 0 ? value.Staging : value.To);
                var target = (byte*)to + (segments[i + 2] * value.Width);
                if ((how & RowTable.Fills) != 0)
                    NativeMemory.Fill(target, (nuint)(rows * value.Width), (byte)value.Fill);
                else
                    Buffer.MemoryCopy((byte*)from + (segments[i + 1] * value.Width), target, rows * value.Width, rows * value.Width);
            }
        }
    }

    public DeviceRows Route(Tensor mask, int width)
    {
        var columns = (int)mask.shape[^1];
        var tokens = (int)(mask.numel() / columns);
        return DeviceRows.Of(RowSet.FromMask(new ReadOnlySpan<byte>(mask.Pointer(), tokens * columns), tokens, columns));
    }

    public Tensor Reach(DeviceRows route, int ranks)
    {
        var reach = zeros([route.Tokens, ranks], dtype: ScalarType.Byte);
        var at = (byte*)reach.Pointer();
        var local = route.Experts / ranks;
        foreach (var row in Integers(route.Flat))
        {
            if (row >= 0)
                at[((long)(row / route.Experts) * ranks) + (row % route.Experts / local)] = 1;
        }

        return reach;
    }

    public Tensor Places(DeviceRows route, DeviceRows sent, int[] shift, int width)
    {
        var places = empty(route.Rows, dtype: ScalarType.Int32);
        Span<int> at = Integers(places), flat = Integers(route.Flat), rowOf = Integers(route.RowOf), sentRowOf = Integers(sent.RowOf);
        var local = route.Experts / shift.Length;
        at.Fill(-1);
        for (var t = 0; t < route.Tokens; t++)
        {
            var (last, next, ordinal) = (-1, -1, 0);
            for (var k = 0; k < route.Width && rowOf[(t * route.Width) + k] is >= 0 and var row; k++)
            {
                var rank = flat[row] % route.Experts / local;
                if (rank != last)
                    (last, next, ordinal) = (rank, next + 1, 0);
                at[row] = ((sentRowOf[(t * sent.Width) + next] + shift[rank]) * width) + ordinal++;
            }
        }

        return places;
    }

    public Tensor RowOf(Tensor flat, long tokens, int per)
    {
        var rowOf = full([tokens, per], -1, dtype: ScalarType.Int32);
        Span<int> at = Integers(rowOf), rows = Integers(flat);
        for (var row = 0; row < rows.Length; row++)
        {
            if (rows[row] >= 0)
                at[rows[row]] = row;
        }

        return rowOf;
    }

    public void Gather(Tensor tokens, Tensor flat, int per, Tensor rows)
    {
        var (width, count) = (RowExchange.Width(rows), rows.shape[0]);
        var which = Integers(flat);
        byte* from = (byte*)tokens.Pointer(), to = (byte*)rows.Pointer();
        for (var row = 0; row < count; row++, to += width)
        {
            if (which[row] < 0)
                NativeMemory.Clear(to, (nuint)width);
            else
                Buffer.MemoryCopy(from + (which[row] / per * width), to, width, width);
        }
    }

    public void Sum(Tensor rows, Tensor rowOf, Tensor tokens) => Sum(rows, rowOf, [], 1, [0], tokens);

    public void SumByNode(Tensor rows, DeviceRows sent, int[] nodes, Tensor tokens)
        => Sum(rows, sent.RowOf, Integers(sent.Flat), nodes.Length, nodes, tokens);

    public void GatherOne(Tensor p, Tensor flat, Tensor rows)
    {
        var which = Integers(flat);
        float* from = (float*)p.Pointer(), to = (float*)rows.Pointer();
        for (var row = 0; row < rows.shape[0]; row++)
            to[row] = which[row] < 0 ? 0 : from[which[row]];
    }

    public void ScatterOne(Tensor rows, Tensor flat, Tensor p)
    {
        p.zero_().On(p);
        var which = Integers(flat);
        float* from = (float*)rows.Pointer(), to = (float*)p.Pointer();
        for (var row = 0; row < rows.shape[0]; row++)
        {
            if (which[row] >= 0)
                to[which[row]] = from[row];
        }
    }

    /// <summary>Without `flat` all rows are of one node.</summary>
    private static void Sum(Tensor rows, Tensor rowOf, ReadOnlySpan<int> flat, int ranks, int[] nodes, Tensor tokens)
    {
        if (Simd.IsBFloat16(rows.dtype))
            Sum<BF16>(rows, rowOf, flat, ranks, nodes, tokens);
        else
            Sum<F32>(rows, rowOf, flat, ranks, nodes, tokens);
    }

    private static void Sum<T>(Tensor rows, Tensor rowOf, ReadOnlySpan<int> flat, int ranks, int[] nodes, Tensor tokens)
        where T : struct, IElement
    {
        var (count, width) = (rowOf.shape[0], (int)rowOf.shape[1]);
        var lists = Integers(rowOf);
        var h = count == 0 ? 0 : tokens.numel() / count;
        void* from = rows.Pointer(), to = tokens.Pointer();
        var rounded = stackalloc byte[4];
        for (var t = 0; t < count; t++)
        {
            var mine = lists.Slice(t * width, width);
            for (var i = 0; i < h; i++)
            {
                var total = 0f;
                for (var k = 0; k < width && mine[k] >= 0;)
                {
                    var (node, sum) = (NodeOf(flat, mine[k]), 0f);
                    for (; k < width && mine[k] >= 0 && NodeOf(flat, mine[k]) == node; k++)
                        sum += T.Load(from, (mine[k] * h) + i);
                    T.Store(rounded, 0, sum);
                    total += T.Load(rounded, 0);
                }

                T.Store(to, (t * h) + i, total);
            }
        }

        int NodeOf(ReadOnlySpan<int> of, int row) => nodes[of.IsEmpty ? 0 : of[row] % ranks];
    }

    private static Span<int> Integers(Tensor tensor) => new(tensor.Pointer(), checked((int)tensor.numel()));
}

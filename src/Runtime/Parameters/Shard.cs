// Which part of a global tensor a rank holds, from the layout and the rank's coordinates.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Parameters;

/// <summary>A box of a global tensor: where it starts, its extents, and the global extents.</summary>
public sealed record Shard(IReadOnlyList<int> Start, IReadOnlyList<int> Extents, IReadOnlyList<int> Global)
{
    /// <summary>The box of a rank; of several mesh axes that split a dim, the slower one (higher index) is major.</summary>
    public static Shard Of(IReadOnlyList<int> global, IReadOnlyList<AxisState> layout, RankContext rank)
    {
        var start = new int[global.Count];
        var extents = new int[global.Count];
        for (var dim = 0; dim < global.Count; dim++)
        {
            int block = 0, blocks = 1;
            for (var axis = layout.Count - 1; axis >= 0; axis--)
            {
                if (!layout[axis].IsSplit || layout[axis].Dim != dim)
                    continue;
                block = (block * rank.Axes[axis].Size) + rank.Coordinates[axis];
                blocks *= rank.Axes[axis].Size;
            }

            if (global[dim] % blocks != 0)
                throw new InvalidOperationException($"an extent of {global[dim]} does not split into {blocks} blocks");
            extents[dim] = global[dim] / blocks;
            start[dim] = block * extents[dim];
        }

        return new Shard(start, extents, global);
    }

    /// <summary>The global extents of a value of which a rank holds `local`.</summary>
    public static int[] GlobalExtents(IReadOnlyList<int> local, IReadOnlyList<AxisState> layout, IReadOnlyList<MeshAxis> axes)
    {
        var global = local.ToArray();
        for (var axis = 0; axis < layout.Count; axis++)
        {
            if (layout[axis].IsSplit)
                global[layout[axis].Dim] *= axes[axis].Size;
        }

        return global;
    }

    /// <summary>True for one rank of those that hold the same box: coordinate 0 wherever the value is whole.</summary>
    public static bool IsFirstHolder(IReadOnlyList<AxisState> layout, RankContext rank)
    {
        for (var axis = 0; axis < layout.Count; axis++)
        {
            if (layout[axis].IsReplicated && rank.Coordinates[axis] != 0)
                return false;
        }

        return true;
    }

    /// <summary>What this box and another of the same tensor both hold; null for nothing.</summary>
    public Shard? Common(Shard other)
    {
        int[] start = new int[Global.Count], extents = new int[Global.Count];
        for (var dim = 0; dim < Global.Count; dim++)
        {
            start[dim] = Math.Max(Start[dim], other.Start[dim]);
            extents[dim] = Math.Min(Start[dim] + Extents[dim], other.Start[dim] + other.Extents[dim]) - start[dim];
            if (extents[dim] <= 0)
                return null;
        }

        return new Shard(start, extents, Global);
    }

    /// <summary>Calls `run(global element, local element, length)` for each contiguous run, local elements ascending.</summary>
    public void ForEachRun(System.Action<long, long, long> run)
    {
        var rank = Global.Count;

        // Trailing dims that are whole belong to one run.
        var split = rank - 1;
        long length = 1;
        for (; split >= 0; split--)
        {
            length *= Extents[split];
            if (Extents[split] != Global[split])
                break;
        }

        if (length == 0 || Extents.Contains(0))
            return;
        var strides = new long[rank];
        long stride = 1;
        for (var dim = rank - 1; dim >= 0; dim--)
        {
            strides[dim] = stride;
            stride *= Global[dim];
        }

        var outer = Math.Max(0, split);
        var index = new int[outer];
        long local = 0;
        while (true)
        {
            long global = split >= 0 ? Start[split] * strides[split] : 0;
            for (var dim = 0; dim < outer; dim++)
                global += (Start[dim] + index[dim]) * strides[dim];
            run(global, local, length);
            local += length;
            var next = outer - 1;
            while (next >= 0 && ++index[next] == Extents[next])
                index[next--] = 0;
            if (next < 0)
                return;
        }
    }

    /// <summary>A view of the rank's box of a global tensor; the caller disposes it.</summary>
    public Tensor View(Tensor global)
    {
        if (!global.shape.AsSpan().SequenceEqual(Global.Select(e => (long)e).ToArray()))
            throw new InvalidOperationException($"a tensor of shape [{string.Join(", ", global.shape)}] is not [{string.Join(", ", Global)}]");
        var view = global.alias();
        for (var dim = 0; dim < Global.Count; dim++)
        {
            using var old = view;
            view = old.narrow(dim, Start[dim], Extents[dim]);
        }

        return view;
    }

    /// <summary>Copies the rank's box of row-major global elements into a local tensor of the same element width.</summary>
    public unsafe void CopyFrom<T>(ReadOnlySpan<T> global, Tensor local)
        where T : unmanaged
    {
        fixed (T* source = global)
        {
            var from = source;
            local.FillOnHost(host =>
            {
                var target = (T*)host.Pointer();
                ForEachRun((g, l, n) => Buffer.MemoryCopy(from + g, target + l, n * sizeof(T), n * sizeof(T)));
            });
        }
    }
}

// A tensor cut into equal blocks, and the runs of elements that a box has in common with them.

using DeepSeekGraph.Runtime.Parameters;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// Block divides Shape in every dim; blocks are counted in row-major order.
internal readonly record struct BlockGrid(IReadOnlyList<int> Shape, IReadOnlyList<int> Block)
{
    /// Blocks in all.
    public int Count
    {
        get
        {
            var count = 1;
            for (var dim = 0; dim < Shape.Count; dim++)
                count = checked(count * (Shape[dim] / Block[dim]));
            return count;
        }
    }

    /// The block that begins at `start`.
    public int IndexOf(IReadOnlyList<int> start)
    {
        var index = 0;
        for (var dim = 0; dim < Shape.Count; dim++)
            index = (index * (Shape[dim] / Block[dim])) + (start[dim] / Block[dim]);
        return index;
    }

    /// Every block that shares elements with a box, and what it shares, in order.
    public IEnumerable<(int Index, Shard Block, Shard Common)> Overlapping(Shard box)
    {
        if (box.Extents.Contains(0))
            yield break;
        var rank = Shape.Count;
        var at = new int[rank];
        for (var dim = 0; dim < rank; dim++)
            at[dim] = box.Start[dim] / Block[dim];
        while (true)
        {
            var start = new int[rank];
            for (var dim = 0; dim < rank; dim++)
                start[dim] = at[dim] * Block[dim];
            var block = new Shard(start, Block, Shape);
            yield return (IndexOf(start), block, block.Common(box)!);
            var next = rank - 1;
            while (next >= 0 && ++at[next] * Block[next] >= box.Start[next] + box.Extents[next])
            {
                at[next] = box.Start[next] / Block[next];
                next--;
            }

            if (next < 0)
                yield break;
        }
    }

    /// Calls `run(element of a, element of b, length)` for the elements of `common`, which both boxes hold, in order;
    /// each box is stored row-major.
    public static void ForEachRun(Shard common, Shard a, Shard b, System.Action<long, long, long> run)
    {
        var rank = common.Extents.Count;
        if (common.Extents.Contains(0))
            return;

        // trailing dims that are whole in both belong to one run
        var split = rank - 1;
        long length = 1;
        for (; split >= 0; split--)
        {
            length *= common.Extents[split];
            if (common.Extents[split] != a.Extents[split] || common.Extents[split] != b.Extents[split])
                break;
        }

        var outer = Math.Max(0, split);
        var index = new int[outer];
        while (true)
        {
            run(Place(a), Place(b), length);
            var next = outer - 1;
            while (next >= 0 && ++index[next] == common.Extents[next])
                index[next--] = 0;
            if (next < 0)
                return;
        }

        long Place(Shard box)
        {
            long place = 0;
            for (var dim = 0; dim < rank; dim++)
            {
                place = (place * box.Extents[dim]) + common.Start[dim] - box.Start[dim]
                    + (dim < outer ? index[dim] : 0);
            }

            return place;
        }
    }
}

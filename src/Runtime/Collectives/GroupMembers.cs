// Which ranks one group of the plan consists of, seen from one of them.
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>The ranks of a group in member order (the slowest axis is major, or the group's list of stages), and the place of one of them.</summary>
internal sealed record GroupMembers(int[] Ranks, int Me)
{
    /// <summary>The group that `rank` is in.</summary>
    public static GroupMembers Of(Group group, RankContext rank)
    {
        var here = PlaceOf(rank.Coordinates, rank.Axes);
        if (group.Stages.Count > 0)
        {
            var perStage = rank.Axes.Aggregate(1, (n, axis) => n * axis.Size);
            var me = group.Stages.ToList().IndexOf(rank.Stage);
            return me < 0
                ? throw new InvalidOperationException($"stage {rank.Stage} is not in group {group.Name}")
                : new GroupMembers([.. group.Stages.Select(stage => ((int)stage * perStage) + here)], me);
        }

        long[] axes = [.. group.MeshAxes.Order()];
        var others = (int[])[.. rank.Coordinates];
        var ranks = new int[axes.Aggregate(1, (n, axis) => n * rank.Axes[(int)axis].Size)];
        for (var i = 0; i < ranks.Length; i++)
        {
            var rest = i;
            foreach (var axis in axes)
                (rest, others[axis]) = Math.DivRem(rest, rank.Axes[(int)axis].Size);
            ranks[i] = rank.Rank - here + PlaceOf(others, rank.Axes);
        }

        return new GroupMembers(ranks, rank.BlockOf(axes));
    }

    /// <summary>The place on a stage that coordinates mean; axis 0 is the fastest.</summary>
    public static int PlaceOf(IReadOnlyList<int> coordinates, IReadOnlyList<MeshAxis> axes)
    {
        var place = 0;
        for (var i = coordinates.Count - 1; i >= 0; i--)
            place = (place * axes[i].Size) + coordinates[i];
        return place;
    }
}

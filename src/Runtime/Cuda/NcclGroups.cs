// Which communicators a rank needs for the groups of a plan: the world's own, parts of it, or none for a rank by itself.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Where the communicator of a group comes from.</summary>
internal enum Origin
{
    /// <summary>One rank of several: values are copied.</summary>
    Alone,

    /// <summary>All ranks in their order: the world's communicator.</summary>
    World,

    /// <summary>The same ranks as another group before it, whose communicator does for both.</summary>
    Shared,

    /// <summary>A split of the world of its own.</summary>
    Split,
}

/// <summary>
/// One group seen from one rank. `Members`: null where the rank is not in it. `Color`, -1 for no part, and `Key` are what it gives to the
/// split; `Like`: the group whose communicator is shared.
/// </summary>
internal sealed record GroupCommunicator(Group Group, Origin Origin, GroupMembers? Members, int Color, int Key, int Like)
{
    /// <summary>A message of one stage to another: a connection that is made before the first step.</summary>
    public bool IsMessage => Group.Stages.Count == 2;
}

internal static class NcclGroups
{
    /// <summary>
    /// In the order of the groups' numbers, in which all ranks split. Groups of stages never share: messages of one may overtake those of
    /// another. Groups over the same mesh axes do, if they are of one lane: all their members start them in one order. A job of one rank has
    /// a part of its world for all groups, so that NCCL does there what it does elsewhere.
    /// </summary>
    public static IReadOnlyList<GroupCommunicator> Of(IReadOnlyList<Group> groups, RankContext rank, int ranks)
    {
        var made = new List<GroupCommunicator>();
        var like = new Dictionary<string, int>(StringComparer.Ordinal);
        foreach (var group in groups.OrderBy(g => g.Id))
        {
            if (group.Stages.Count > 0 && ranks > 1)
            {
                var isIn = group.Stages.Contains(rank.Stage);
                var members = isIn ? GroupMembers.Of(group, rank) : null;
                made.Add(group.Stages.Count == 1
                    ? new GroupCommunicator(group, Origin.Alone, members, -1, 0, -1)
                    : new GroupCommunicator(
                        group, Origin.Split, members, isIn ? GroupMembers.PlaceOf(rank.Coordinates, rank.Axes) : -1, members?.Me ?? 0, -1));
                continue;
            }

            var over = GroupMembers.Of(group, rank);
            // the same for every rank, since axes of extent 1 tell nothing apart
            var axes = string.Join(' ', group.MeshAxes.Where(axis => rank.Axes[(int)axis].Size > 1).Order()) + '.' + group.Lane;
            if (over.Ranks.Length == 1 && ranks > 1)
                made.Add(new GroupCommunicator(group, Origin.Alone, over, -1, 0, -1));
            else if (group.Lane == "" && ranks > 1 && over.Ranks.Length == ranks && over.Ranks.SequenceEqual(Enumerable.Range(0, ranks)))
                made.Add(new GroupCommunicator(group, Origin.World, over, -1, 0, -1));
            else if (like.TryGetValue(axes, out var first))
                made.Add(new GroupCommunicator(group, Origin.Shared, over, -1, 0, first));
            else
            {
                like[axes] = group.Id;
                made.Add(new GroupCommunicator(group, Origin.Split, over, over.Ranks.Min(), over.Me, -1));
            }
        }

        return made;
    }
}

// What of a plan's slots a checkpoint stores: parameters and optimizer states, each block once.

using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// A state of the model, by the name of its slot ("X", "master:X" or "remainder:X", "m:X", "v:X"); of several stages that hold it, the first stores it.
internal sealed record StateSlot(
    string Name, SlotKind Kind, DType DType, IReadOnlyList<int> Global, IReadOnlyList<int> Block, IReadOnlyList<AxisState> Layout, int Stage)
{
    /// fp32 weights.
    public const string Master = "master:";

    /// What fp32 weights are beyond the parameter.
    public const string Remainder = "remainder:";

    /// What each slot of a checkpoint is called besides the parameter's name.
    public static IReadOnlyList<string> Prefixes { get; } = [Master, Remainder, "m:", "v:"];

    /// The parameter that a state is of.
    public static string ParameterOf(string name)
        => Prefixes.FirstOrDefault(prefix => name.StartsWith(prefix, StringComparison.Ordinal)) is { } prefix
            ? name[prefix.Length..]
            : name;

    /// Is this a slot that a checkpoint stores?
    public static bool IsState(SlotInfo slot) => slot.Kind.IsParameter || slot.Kind.IsOptimizer;

    /// The states of a plan, in the order of its stages.
    public static IReadOnlyList<StateSlot> Of(PlanSet plan)
    {
        var seen = new HashSet<string>(StringComparer.Ordinal);
        return [.. plan.Stages
            .SelectMany(stage => stage.Slots.Where(IsState).Select(slot => (stage.Stage, Slot: slot)))
            .Where(one => seen.Add(one.Slot.Name))
            .Select(one => new StateSlot(
                one.Slot.Name,
                one.Slot.Kind,
                one.Slot.DType,
                Shard.GlobalExtents(one.Slot.Extents, one.Slot.Layout, plan.Mesh.Axes),
                one.Slot.Extents,
                one.Slot.Layout,
                one.Stage))];
    }

    /// Does the rank store its block of it?
    public bool IsStoredBy(RankContext rank) => rank.Stage == Stage && Shard.IsFirstHolder(Layout, rank);
}

/// Which rank stores what of a plan's states, and how a manifest says so.
internal sealed class StateMap
{
    private readonly Dictionary<int, List<StateSlot>> _byRank = [];
    private readonly List<(StateSlot Slot, int[] Ranks)> _holders = [];

    public StateMap(PlanSet plan, IEnumerable<StateSlot> slots)
    {
        var perStage = RankContext.RanksPerStage(plan.Mesh);
        foreach (var slot in slots)
        {
            var grid = new BlockGrid(slot.Global, slot.Block);
            var ranks = new int[grid.Count];
            for (var place = 0; place < perStage; place++)
            {
                var rank = RankContext.At(plan.Mesh, slot.Stage, place);
                if (!slot.IsStoredBy(rank))
                    continue;
                ranks[grid.IndexOf(Shard.Of(slot.Global, slot.Layout, rank).Start)] = rank.Rank;
                if (!_byRank.TryGetValue(rank.Rank, out var own))
                    _byRank.Add(rank.Rank, own = []);
                own.Add(slot);
            }

            _holders.Add((slot, ranks));
        }
    }

    /// Ranks that store something, ascending.
    public IReadOnlyList<int> Ranks => [.. _byRank.Keys.Order()];

    /// What a rank stores; nothing for one without.
    public IReadOnlyList<StateSlot> Of(int rank) => _byRank.GetValueOrDefault(rank) ?? [];

    /// The tensors of a rank's file.
    public IEnumerable<SafeTensorSpec> Specs(int rank, Func<StateSlot, string>? type = null)
        => Of(rank).Select(slot => new SafeTensorSpec(
            slot.Name, type?.Invoke(slot) ?? Elements.NameOf(slot.DType), [.. slot.Block.Select(e => (long)e)]));

    /// The manifest's tensors, where `Ranks` is its list of files.
    public IReadOnlyList<StoredTensor> Tensors(Func<StateSlot, string>? type = null)
    {
        var files = Ranks.Index().ToDictionary(rank => rank.Item, rank => rank.Index);
        return [.. _holders
            .OrderBy(one => one.Slot.Name, StringComparer.Ordinal)
            .Select(one => new StoredTensor(
                one.Slot.Name,
                one.Slot.Kind.IsParameter ? StoredTensor.Parameter : StoredTensor.Optimizer,
                type?.Invoke(one.Slot) ?? Elements.NameOf(one.Slot.DType),
                one.Slot.Global,
                one.Slot.Block,
                [.. one.Ranks.Select(rank => files[rank])]))];
    }
}

// Whole tensors out of the shards of all ranks of a process, by the slots' layouts.
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Parameters;

/// <summary>Puts shards together; partial sums are added in rank order. For tests, export and small models.</summary>
public static class Gathering
{
    /// <summary>The global value of a persistent slot of a stage, in the slot's element type.</summary>
    public static Tensor Slot(IReadOnlyList<RankRunner> ranks, int stage, string name)
    {
        var holders = ranks.Where(r => r.Rank.Stage == stage)
            .Select(r => (r.Rank, Value: r.Find(name) ?? throw new ArgumentException($"stage {stage} has no slot '{name}'", nameof(name))))
            .ToList();
        var info = holders[0].Value.Info;
        var global = Shard.GlobalExtents(info.Extents, info.Layout, holders[0].Rank.Axes);
        var wide = info.DType.IsFloat ? ScalarType.Float32 : ScalarType.Int64;
        var isPartial = info.Layout.Any(state => state.IsPartialSum);
        using var sum = zeros([.. global.Select(e => (long)e)], dtype: wide);
        foreach (var (rank, value) in holders)
        {
            if (!Shard.IsFirstHolder(info.Layout, rank))
                continue;
            using var place = Shard.Of(global, info.Layout, rank).View(sum);
            using var part = value.Tensor.OnHost();

            // a sum with zero has no sign of zero
            if (isPartial)
                place.add_(part, Scalars.One).On(place);
            else
                place.copy_(part).On(place);
        }

        return sum.to_type(info.DType.ToScalarType(), copy: true);
    }

    /// <summary>A parameter in its most precise form: its fp32 master, whole or of weight and remainder, where there is one.</summary>
    public static unsafe Tensor Master(IReadOnlyList<RankRunner> ranks, int stage, string parameter)
    {
        bool Has(string slot) => ranks.Any(rank => rank.Rank.Stage == stage && rank.Find(slot) is not null);

        if (Has(StateSlot.Master + parameter))
            return Slot(ranks, stage, StateSlot.Master + parameter);
        var weight = Slot(ranks, stage, parameter);
        if (!Has(StateSlot.Remainder + parameter))
            return weight;
        using var remainder = Slot(ranks, stage, StateSlot.Remainder + parameter);
        var master = empty(weight.shape, dtype: ScalarType.Float32);
        Halves.Join(weight.Pointer(), remainder.Pointer(), (float*)master.Pointer(), master.numel());
        weight.Dispose();
        return master;
    }

    /// <summary>The sum over stages that each hold a copy, such as the gradient of a tied parameter, in fp32.</summary>
    public static Tensor Sum(IReadOnlyList<RankRunner> ranks, IReadOnlyList<int> stages, string name)
    {
        Tensor? sum = null;
        foreach (var stage in stages)
        {
            using var part = Slot(ranks, stage, name);
            if (sum is null)
                sum = part.to_type(ScalarType.Float32, copy: true);
            else
                sum.add_(part, Scalars.One).On(sum);
        }

        return sum ?? throw new ArgumentException($"no stage holds '{name}'", nameof(name));
    }
}

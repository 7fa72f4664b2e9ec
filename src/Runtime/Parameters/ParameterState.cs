// Initial values of a rank's parameters and of the optimizer's copies of them.
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Parameters;

/// <summary>Fills parameter, `master:` and `remainder:` slots, each by its own layout; moments and the rest start at zero.</summary>
public static unsafe class ParameterState
{
    /// <summary>What fills a rank: a checkpoint's states where there is one, else as Initialize says.</summary>
    internal static System.Action<RankRunner> Filler(StateSources? sources, ulong seed, Func<string, Tensor?>? weights)
        => sources is null ? runner => Initialize(runner, seed, weights) : sources.Load;

    /// <summary>Draws each parameter from (seed, name, global element), or takes it from `weights`; DSG0806 when a shape differs.</summary>
    public static void Initialize(RankRunner runner, ulong seed, Func<string, Tensor?>? weights = null)
    {
        foreach (var parameter in runner.Plan.Parameters)
        {
            if (runner.Find(parameter.Name) is not { } slot)
                continue;
            var given = weights?.Invoke(parameter.Name);
            if (runner.Find(StateSlot.Remainder + parameter.Name) is { } remainder)
            {
                FillAs<HighHalf>(slot);
                FillAs<LowHalf>(remainder);
            }
            else if (slot.Info.DType.IsBFloat16)
                FillAs<BF16>(slot);
            else
                FillAs<F32>(slot);

            if (runner.Find(StateSlot.Master + parameter.Name) is { } master)
                FillAs<F32>(master);

            void FillAs<T>(SlotValue value)
                where T : struct, IElement
            {
                var shard = ShardOf(value, parameter, runner);
                if (given is not { } whole)
                {
                    ParameterInit.Fill<T>(value.Tensor, shard, parameter.Init, parameter.Name, seed);
                    return;
                }

                if (!whole.shape.AsSpan().SequenceEqual(parameter.Extents.Select(e => (long)e).ToArray()))
                {
                    throw DiagnosticException.Of(
                        Codes.WeightMismatch,
                        parameter.Name,
                        $"the weight is [{string.Join(", ", whole.shape)}], the parameter [{string.Join(", ", parameter.Extents)}]",
                        "give weights of the model that the plan was compiled for");
                }

                using var part = shard.View(whole);
                using var wide = part.to_type(ScalarType.Float32);
                using var values = wide.contiguous();
                value.Tensor.FillOnHost(host => Simd.Copy<F32, T>(values.Pointer(), 0, host.Pointer(), 0, values.numel()));
            }
        }
    }

    private static Shard ShardOf(SlotValue value, ParameterInfo parameter, RankRunner runner)
    {
        var shard = Shard.Of(parameter.Extents, value.Info.Layout, runner.Rank);
        if (!shard.Extents.SequenceEqual(value.Info.Extents))
            throw new InvalidOperationException(
                $"slot {value.Info.Name} is [{string.Join(", ", value.Info.Extents)}], its layout says [{string.Join(", ", shard.Extents)}]");
        return shard;
    }
}

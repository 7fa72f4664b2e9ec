// FLOPs of a plan beside Megatron's formula: part by part, with each difference named.

using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// One part, FLOPs for each token of a step: by formula, and what all ranks execute; `Why` names the difference.
public sealed record FlopsRow(string Part, double Formula, double Plan, string Why)
{
    public double Difference => Plan - Formula;
}

/// Counts of a plan's own ops against the formula's.
public static class FlopsTable
{
    /// Rows of all parts; their sums are the totals. The formula's column is zero where the model is not known.
    public static IReadOnlyList<FlopsRow> Of(PlanSet plan, DeepSeekV3Config? config)
    {
        var tokens = (double)plan.Microbatches * plan.MicroBatch * plan.SeqLength;
        var executed = PlanFlops.lines(plan);
        var formula = config is null
            ? []
            : Flops.Parts(config, plan.SeqLength).ToDictionary(part => part.Part, part => part.Flops);
        var counted = executed.GroupBy(PartOf).ToDictionary(part => part.Key, part => part.Sum(l => l.Flops) / tokens);
        var again = executed.Where(l => l is { Kernel: "attention", Phase: not "F" }).Sum(l => l.Flops) / tokens;
        return
        [
            .. formula.Keys.Concat(counted.Keys).Distinct().Select(part =>
            {
                var (said, done) = (formula.GetValueOrDefault(part), counted.GetValueOrDefault(part));
                return new FlopsRow(part, said, done, config is null ? "" : Why(plan, part, done - said, again));
            }),
        ];
    }

    /// The part of the model that a launch belongs to, by its kernel and the module it came from.
    private static string PartOf(FlopsLine line)
    {
        var (kernel, path) = (line.Kernel, line.Path.Split('.'));
        if (line.Phase is "prologue" or "epilogue")
            return FlopsParts.Optimizer;
        if (kernel.StartsWith("attention", StringComparison.Ordinal) || kernel == "cache_attention")
            return FlopsParts.Core;
        if (kernel.Contains("rms_norm", StringComparison.Ordinal))
            return FlopsParts.Norms;
        if (kernel.StartsWith("rope", StringComparison.Ordinal) || kernel == "rotary_table")
            return FlopsParts.Rotation;
        if (kernel.StartsWith("swi_glu", StringComparison.Ordinal))
            return FlopsParts.Activations;
        if (path.Contains("balance"))
            return FlopsParts.Balance;
        if (path.Contains("gate"))
            return FlopsParts.Router;
        if (kernel.StartsWith("linear_", StringComparison.Ordinal))
            return FlopsParts.Logits;
        if (path.Contains("loss"))
            return FlopsParts.Loss;
        if (kernel is not ("contract" or "grouped_mat_mul" or "grouped_weight_grad"))
            return FlopsParts.Additions;
        return path.Contains("self_attn") ? FlopsParts.Projections
            : path.Contains("shared_experts") ? FlopsParts.Shared
            : path.Contains("experts") ? FlopsParts.Routed
            : path.Contains("mlp") ? FlopsParts.Dense
            : path.Contains("lm_head") ? FlopsParts.Logits
            : path is ["model", "layers", _] ? FlopsParts.MultiToken
            : FlopsParts.Other;
    }

    /// Why a plan executes other than the formula counts.
    private static string Why(PlanSet plan, string part, double difference, double again)
    {
        if (difference == 0)
            return "";
        var recompute = PlanSummary.Setting(plan, "recompute") ?? "none";
        var generates = PlanSummary.Generates(plan);
        return part switch
        {
            FlopsParts.Core when again > 0 =>
                "flash attention's backward makes the scores again (2.5 x forward, not 2 x); "
                    + "and recompute runs the forward kernel twice",
            FlopsParts.Core when generates =>
                "scores of all places of the cache, in the space of the latent; the formula's of one sequence, backward too",
            FlopsParts.Core => "flash attention's backward makes the scores again: 2.5 x forward, not 2 x",
            FlopsParts.Logits when difference > 0 =>
                "cross-entropy over a split vocabulary makes the logits again in the backward pass",
            FlopsParts.Norms => "the formula counts one product for each latent feature; a norm is 8 operations an element",
            FlopsParts.Router => "the formula leaves the router out: its product, sigmoid, top-k and probabilities",
            FlopsParts.Balance => "the formula leaves the balance loss out",
            FlopsParts.Rotation => "the formula leaves rotation out",
            FlopsParts.Activations => "the formula counts matrix products only: SwiGLU",
            FlopsParts.Loss => "the formula counts matrix products only: softmax and cross-entropy",
            FlopsParts.Additions => "the formula counts matrix products only: residual sums, gradient sums, casts",
            FlopsParts.Optimizer => "the formula leaves the step's end out: norm, clip, AdamW",
            _ when difference > 0 && recompute != "none" => $"computed again in the backward pass: {recompute}",
            _ when difference > 0 => "computed on more than one rank",
            _ when generates => "a plan that generates has no backward pass",
            _ => "a gradient that nothing reads is not computed",
        };
    }
}

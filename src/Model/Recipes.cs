// Named jobs: a model and how it is trained on which cluster.

using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// A model with its recipe: all that a plan is compiled from.
public sealed record NamedRecipe(DeepSeekV3Config Config, Recipe Recipe)
{
    public string Name => Recipe.Name;

    /// The plan of every rank.
    public PlanSet Compile() => new DeepSeekV3(Config).Compile(Recipe);
}

/// Jobs that are known by name.
public static class Recipes
{
    /// Eight ranks that two cores can feed: tensor, pipeline, expert and data parallel by two.
    public static NamedRecipe Tiny { get; } = new(
        Presets.Tiny,
        Recipe.Default
            .WithName("deepseek_v3_tiny")
            .WithParallelism(tensor: 2, pipeline: 2, expert: 2, data: 2)
            .WithLayout("Ettt|tmL")
            .WithBatch(globalBatch: 8, microBatch: 1, seqLength: 128));

    /// One accelerator, bf16, DeepSeek-V3's widths.
    public static NamedRecipe Proxy { get; } = new(
        Presets.Proxy,
        Recipe.Default
            .WithName("deepseek_v3_proxy")
            .WithParallelism(tensor: 1, pipeline: 1, expert: 1, data: 1)
            .WithBatch(globalBatch: 4, microBatch: 1, seqLength: 4096)
            .WithDType(DType.BFloat16));

    /// 671B on 1024 accelerators, as Megatron Bridge trains it: TP 2, PP 16, EP 64, sequence parallel.
    public static NamedRecipe Pretrain { get; } = new(
        Presets.V3,
        Recipe.Default
            .WithName("deepseek_v3_pretrain")
            .WithParallelism(tensor: 2, pipeline: 16, expert: 64, data: 32)
            .WithBatch(globalBatch: 4096, microBatch: 1, seqLength: 4096)
            .WithDType(DType.BFloat16)
            .WithRecompute("core_attn"));

    /// All of them.
    public static IReadOnlyList<NamedRecipe> All { get; } = [Tiny, Proxy, Pretrain];

    /// Job by name; DSG0706 lists the names for any other.
    public static NamedRecipe Named(string name)
        => All.FirstOrDefault(r => r.Name == name) ?? throw DiagnosticException.Of(
            Codes.UnknownModel,
            "recipe",
            $"there is no recipe '{name}'",
            $"choose from {string.Join(" ", All.Select(r => r.Name))}");
}

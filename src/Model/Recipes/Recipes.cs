// Jobs that are known by name, with their defaults.

namespace DeepSeekGraph.Models;

/// What `dsg recipes` lists.
public static class Recipes
{
    /// Eight ranks that two cores can feed: tensor, pipeline, expert and data parallel by two.
    public static NamedRecipe Tiny { get; } = DeepSeekV3Recipes.Tiny();

    /// One accelerator, bf16, DeepSeek-V3's widths.
    public static NamedRecipe Proxy { get; } = DeepSeekV3Recipes.Proxy();

    /// 671B on 1024 accelerators: TP 2, PP 16, EP 64.
    public static NamedRecipe Pretrain { get; } = DeepSeekV3Recipes.Pretrain();

    /// 671B on 256 accelerators: TP 2, PP 8, EP 32.
    public static NamedRecipe Pretrain32Nodes { get; } = DeepSeekV3Recipes.Pretrain32Nodes();

    /// All of them.
    public static IReadOnlyList<NamedRecipe> All { get; } = [Tiny, Proxy, Pretrain, Pretrain32Nodes];

    /// Job by name; DSG0706 lists the names for any other.
    public static NamedRecipe Named(string name)
        => All.FirstOrDefault(r => r.Name == name) ?? throw DiagnosticException.Of(
            Codes.UnknownModel,
            "recipe",
            $"there is no recipe '{name}'",
            $"choose from {string.Join(" ", All.Select(r => r.Name))}");
}

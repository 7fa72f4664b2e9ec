// From choices to a checked plan: the recipe, changed as the command line says, compiled.

using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime;

namespace DeepSeekGraph.Cli;

internal static class Jobs
{
    /// The job that the command line asks for: the recipe, its shorthand options, then every `--set` in order.
    /// Says which element type was measured to be faster (`faster`; without, by this process) where that was asked for. `training` changes the recipe's own settings.
    public static NamedRecipe Chosen(
        JobChoices choices, Func<TrainingSettings, TrainingSettings>? training = null, Func<DType>? faster = null)
    {
        var named = Named(choices.Recipe);
        if (training is not null)
            named = named with { Training = training(named.Training) };
        return Overrides.Apply(named with { Recipe = Change(named.Recipe, choices, faster ?? (static () => DTypeProbe.Faster)) }, choices.Set);
    }

    /// The recipe, or DSG0706 with the nearest names first.
    public static NamedRecipe Named(string name)
        => Recipes.All.FirstOrDefault(recipe => recipe.Name == name) ?? throw DiagnosticException.Of(
            Codes.UnknownModel,
            "RECIPE",
            $"there is no recipe '{name}'",
            Nearest.Help(name, Recipes.All.Select(recipe => recipe.Name)));

    /// Throws what is wrong with a plan of unknown origin; compiling checks its own.
    public static void Check(PlanSet plan, string source)
    {
        if (Compiler.Check.run(plan) is { IsEmpty: false } wrong)
        {
            throw new DiagnosticException(
                [.. wrong.Select(d => new Diagnostic(d.Code, $"{source}, {d.At}", d.Message, d.Help))]);
        }
    }

    private static Recipe Change(Recipe recipe, JobChoices choices, Func<DType> faster)
    {
        int?[] degrees =
            [choices.Tensor, choices.Pipeline, choices.Expert, choices.Data, choices.ExpertTensor, choices.Context];
        if (degrees.Any(degree => degree is not null))
        {
            // the recipe's layout was made for its own number of stages
            recipe = recipe
                .WithParallelism(choices.Tensor ?? 0, choices.Pipeline ?? 0, choices.Expert ?? 0, choices.Data ?? 0)
                .WithExpertTensorParallel(choices.ExpertTensor ?? 0)
                .WithContextParallel(choices.Context ?? 0)
                .WithVirtualPipeline(1)
                .WithLayout("");
        }

        if (choices.VirtualPipeline is not null || choices.MicrobatchGroup is not null)
        {
            recipe = recipe.WithVirtualPipeline(
                choices.VirtualPipeline ?? recipe.VirtualPipeline, choices.MicrobatchGroup ?? recipe.MicrobatchGroup);
            if (choices.VirtualPipeline is not null)
                recipe = recipe.WithLayout("");
        }

        if (choices.Layout is { } layout)
            recipe = recipe.WithLayout(layout);
        if (choices.Schedule is { } schedule)
            recipe = recipe.WithSchedule(ScheduleOf(schedule));
        if (choices.NoFuse)
            recipe = recipe.WithFusion(false);
        if (choices.Recompute is { } recompute)
            recipe = Recomputed(recipe, recompute);
        return recipe
            .WithBatch(
                choices.GlobalBatch ?? recipe.GlobalBatch,
                choices.MicroBatch ?? recipe.MicroBatch,
                choices.SeqLength ?? recipe.SeqLength)
            .WithDType(DTypeOf(choices, recipe, faster))
            .WithFp8(choices.DType switch { "fp8" => 128, null => recipe.Fp8Block, _ => 0 });
    }

    private static Recipe Recomputed(Recipe recipe, string names)
        => RecipeSettings.withRecomputation(recipe, names) is { } changed
            ? changed.Value
            : throw DiagnosticException.Of(
                Codes.OptionValue,
                "--recompute",
                $"'{names}' names no single budget",
                $"give names, budget=BYTES or both, with commas between; BYTES is {ByteSize.forms}");

    private static Schedule ScheduleOf(string name)
        => Schedule.All.FirstOrDefault(s => s.Name.Equals(name, StringComparison.OrdinalIgnoreCase))
            ?? throw DiagnosticException.Of(
                Codes.ScheduleName,
                "--schedule",
                $"there is no schedule '{name}'",
                Nearest.Help(name, Schedule.All.Select(s => s.Name)));

    /// Without a choice: bf16 where the recipe says so, else what is faster here.
    private static DType DTypeOf(JobChoices choices, Recipe recipe, Func<DType> faster)
    {
        var name = choices.DType;
        switch (name)
        {
            case "fp32":
                return DType.Float32;
            case "bf16" or "fp8":
                return DType.BFloat16;
            case null when recipe.DType.IsBFloat16 || choices.Set.Any(Overrides.IsDType):
                return recipe.DType;
            case null or "auto":
                var chosen = faster();
                Console.WriteLine($"dtype auto: {chosen.Name}, {DTypeProbe.Reason}");
                return chosen;
            default:
                throw DiagnosticException.Of(
                    Codes.OptionValue,
                    "--dtype",
                    $"there is no dtype '{name}'",
                    Nearest.Help(name, ["auto", "fp32", "bf16", "fp8"]));
        }
    }
}

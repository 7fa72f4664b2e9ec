// What a run does where the command line is silent: steps and learning rate of each recipe.

using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Cli;

internal static class Defaults
{
    /// About a minute on 2 cores.
    private const int TinySteps = 200;
    private const double TinyRate = 5e-3;

    /// DeepSeek-V3's own rate; ten steps show whether a job of such a size runs.
    private const int Steps = 10;
    private const double Rate = 2.2e-4;

    public static int StepsOf(string recipe) => recipe == JobOptions.DefaultRecipe ? TinySteps : Steps;

    /// Warm-up over a tenth of the steps, then a cosine down to a tenth.
    public static LearningRate RateOf(string recipe, double? given, long steps)
    {
        var peak = given ?? (recipe == JobOptions.DefaultRecipe ? TinyRate : Rate);
        return new LearningRate(peak, peak / 10, (steps + 9) / 10, steps);
    }
}

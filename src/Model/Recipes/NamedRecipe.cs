// A whole job: the model, how it is compiled, and how it is trained.

using DeepSeekGraph.Compiler;
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Models;

/// A model with its recipe: all that a plan is compiled from, and what a run of the plan starts with.
public sealed record NamedRecipe(DeepSeekV3Config Config, Recipe Recipe)
{
    /// Steps, learning rate, data and folder; none of it changes the plan.
    public TrainingSettings Training { get; init; } = new();

    public string Name => Recipe.Name;

    /// The plan of every rank.
    public PlanSet Compile() => new DeepSeekV3(Config).Compile(Recipe);
}

/// How a job is trained, in Megatron's words and with its defaults.
public sealed record TrainingSettings
{
    /// Optimizer steps.
    public int TrainIters { get; init; } = 1_000_000;

    /// Highest learning rate, after the warm-up.
    public double Lr { get; init; } = 3e-4;

    /// Where the cosine ends.
    public double MinLr { get; init; } = 3e-5;

    /// Steps of the linear warm-up.
    public int LrWarmupIters { get; init; } = 2000;

    /// Step at which the cosine reaches MinLr; 0: the last one.
    public int LrDecayIters { get; init; }

    /// Of initial weights and of the order of the data.
    public ulong Seed { get; init; } = 1234;

    /// Text to train on, joined in this order; none: the documentation that .NET SDKs install.
    public IReadOnlyList<string> DataPaths { get; init; } = [];

    /// tokenizer.json of a Hugging Face checkpoint, or its folder; null: a token is a byte of UTF-8.
    public string? Tokenizer { get; init; }

    /// New or empty folder for results; null: the next of runs/0001, runs/0002, ...
    public string? Dir { get; init; }

    /// A checkpoint to go on from: its folder, the root that holds several, or a run's folder; null: from the start.
    public string? Load { get; init; }

    /// Root of the checkpoints that are saved; null: `checkpoints` in the run's folder.
    public string? Save { get; init; }

    /// Steps from one checkpoint to the next; the last step is saved too. 0: none.
    public int SaveInterval { get; init; }

    /// Training goes on while a copy of the state is written.
    public bool AsyncSave { get; init; } = true;

    /// Checkpoints that stay, the last ones; 0: all.
    public int MostRecentK { get; init; }

    /// The schedule of a run of TrainIters steps; a short one warms up for at most a tenth of it.
    public LearningRate Schedule() => new(
        Peak: Lr,
        Minimum: MinLr,
        WarmupSteps: Math.Min(LrWarmupIters, (TrainIters + 9L) / 10),
        TotalSteps: LrDecayIters > 0 ? LrDecayIters : TrainIters);
}

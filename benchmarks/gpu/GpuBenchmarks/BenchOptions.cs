// What the benchmark is asked for, and the job it makes of that.
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Benchmarks;

/// <summary>Options of one run of GpuBenchmarks.</summary>
internal sealed record BenchOptions
{
    public int? Layers { get; init; }

    /// <summary>Gradient clipping; 0: none, as the peers train.</summary>
    public double Clip { get; init; }

    public int Steps { get; init; } = 3;

    public double LearningRate { get; init; } = 1e-4;

    public int Repeats { get; init; } = 11;

    /// <summary>Waits after each kernel and counts its time: the sum is more than a step takes.</summary>
    public bool Profile { get; init; }

    /// <summary>Kernels one by one instead of steps.</summary>
    public bool Kernels { get; init; }

    /// <summary>The one batch of every step.</summary>
    public bool SameTokens { get; init; }

    /// <summary>Folder of raw weights to start from.</summary>
    public string? Weights { get; init; }

    /// <summary>Folder to write the initial weights to, raw.</summary>
    public string? DumpTo { get; init; }

    /// <summary>File of losses and gradient norms, a line a step.</summary>
    public string? LossFile { get; init; }

    /// <summary>As the peers are built: no YaRN, no balance loss.</summary>
    public bool LikePeer { get; init; }

    public IReadOnlyList<string> Set { get; init; } = [];

    public static BenchOptions Parse(string[] args)
    {
        var options = new BenchOptions();
        var set = new List<string>();
        for (var i = 0; i < args.Length; i++)
        {
            string Value() => ++i < args.Length ? args[i] : throw new ArgumentException($"{args[i - 1]} needs a value");
            options = args[i] switch
            {
                "--layers" => options with { Layers = int.Parse(Value()) },
                "--clip" => options with { Clip = double.Parse(Value()) },
                "--steps" => options with { Steps = int.Parse(Value()) },
                "--lr" => options with { LearningRate = double.Parse(Value()) },
                "--repeats" => options with { Repeats = int.Parse(Value()) },
                "--profile" => options with { Profile = true },
                "--kernels" => options with { Kernels = true },
                "--same" => options with { SameTokens = true },
                "--weights" => options with { Weights = Value() },
                "--dump" => options with { DumpTo = Value() },
                "--losses" => options with { LossFile = Value() },
                "--like-peer" => options with { LikePeer = true },
                "--set" => Added(Value()),
                var other => throw new ArgumentException($"there is no option {other}"),
            };
            BenchOptions Added(string assignment)
            {
                set.Add(assignment);
                return options;
            }
        }

        return options with { Set = set };
    }

    /// <summary>The proxy recipe with one sequence a step, and what was asked for.</summary>
    public NamedRecipe Job()
    {
        var job = Recipes.Proxy;
        var config = job.Config;
        if (Layers is { } layers)
            config = config with { NumHiddenLayers = layers };
        if (LikePeer)
            config = config with { SeqAuxLossAlpha = 0, BiasUpdateSpeed = 0, RopeScaling = null };
        var recipe = job.Recipe.WithBatch(1, 1, job.Recipe.SeqLength).WithDType(DType.BFloat16);
        foreach (var assignment in (string[])[$"optimizer.clip_grad={Clip}", .. Set])
        {
            var at = assignment.IndexOf('=', StringComparison.Ordinal);
            var setting = RecipeSettings.all.First(s => s.Key == assignment[..at]);
            if (!setting.TryChange(recipe, assignment[(at + 1)..], out recipe))
                throw new ArgumentException($"--set {assignment}: {setting.Values}");
        }

        return job with { Config = config, Recipe = recipe };
    }
}

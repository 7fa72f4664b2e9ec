// The options that say how a plan is run: steps, data, seed, learning rate and where results go.

using System.CommandLine;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Cli;

/// The choices as given; null where the recipe decides.
internal sealed record RunChoices
{
    public int? Steps { get; init; }
    public string? Data { get; init; }
    public string? Tokenizer { get; init; }
    public string? Out { get; init; }
    public ulong? Seed { get; init; }
    public double? LearningRate { get; init; }
    public Executor Executor { get; init; }

    /// The recipe's settings with those that were given instead.
    public TrainingSettings Over(TrainingSettings recipe)
    {
        var settings = recipe with
        {
            TrainIters = Steps ?? recipe.TrainIters,
            DataPaths = Data is { } path ? [path] : recipe.DataPaths,
            Tokenizer = Tokenizer ?? recipe.Tokenizer,
            Dir = Out ?? recipe.Dir,
            Seed = Seed ?? recipe.Seed,
        };
        if (settings.TrainIters < 1)
        {
            throw DiagnosticException.Of(
                Codes.OptionValue, "training.train_iters", $"{settings.TrainIters} steps are none", "give 1 or more");
        }

        // the rate falls to the same share of its peak
        return LearningRate is { } peak
            ? settings with { Lr = peak, MinLr = recipe.Lr > 0 ? peak * (recipe.MinLr / recipe.Lr) : 0 }
            : settings;
    }
}

internal sealed class RunOptions
{
    private readonly Option<int?> _steps = JobOptions.Number(
        "--steps", "Optimizer steps; without, the recipe's: about a minute's for deepseek_v3_tiny on 2 cores");

    private readonly Option<string?> _data = new("--data")
    {
        HelpName = "PATH",
        Description = "Text to train on: .txt, .jsonl or .nvjsonl ({\"text\": ...}), or a folder of them; "
            + "without, the reference documentation that .NET SDKs install",
    };

    private readonly Option<string?> _tokenizer = new("--tokenizer")
    {
        HelpName = "PATH",
        Description = "tokenizer.json of a Hugging Face checkpoint, or its folder; without, a token is a byte",
    };

    private readonly Option<string?> _out = new("--out")
    {
        HelpName = "DIR",
        Description = "New or empty folder for metrics.jsonl, plan and loss curve; "
            + "without, the next of runs/0001, runs/0002, ...",
    };

    private readonly Option<ulong?> _seed = new("--seed")
    {
        HelpName = "N",
        Description = "Of initial weights and of the order of the data; without, 1234",
    };

    private readonly Option<double?> _learningRate = new("--lr")
    {
        HelpName = "RATE",
        Description = "Highest learning rate, instead of the recipe's: warm-up, then a cosine down to the recipe's share of it",
    };

    private readonly Option<string?> _executor = new("--executor")
    {
        HelpName = "compiled|interpreter",
        Description = "What runs the plan: C# made from it (the default), or its steps one by one; the same bits",
    };

    public void AddTo(Command command)
    {
        foreach (var option in (Option[])[_steps, _data, _tokenizer, _out, _seed, _learningRate, _executor])
            command.Add(option);
    }

    public RunChoices Read(ParseResult parse)
    {
        var (steps, rate) = (parse.GetValue(_steps), parse.GetValue(_learningRate));
        if (steps < 1)
            throw Wrong("--steps", $"{steps}", "give 1 or more");
        if (rate is { } r && !(r >= 0 && double.IsFinite(r)))
            throw Wrong("--lr", $"{r}", "give a number such as 0.001");
        foreach (var path in (Option<string?>[])[_data, _tokenizer, _out])
        {
            if (parse.GetValue(path) == "")
                throw Wrong(path.Name, "", "give a path, or leave it out");
        }

        return new RunChoices
        {
            Steps = steps,
            Data = parse.GetValue(_data),
            Tokenizer = parse.GetValue(_tokenizer),
            Out = parse.GetValue(_out),
            Seed = parse.GetValue(_seed),
            LearningRate = rate,
            Executor = ExecutorOf(parse.GetValue(_executor)),
        };
    }

    private static Executor ExecutorOf(string? name)
        => name switch
        {
            null or "compiled" => Executor.Compiled,
            "interpreter" => Executor.Interpreter,
            _ => throw DiagnosticException.Of(
                Codes.OptionValue,
                "--executor",
                $"there is no executor '{name}'",
                Nearest.Help(name, ["compiled", "interpreter"])),
        };

    private static DiagnosticException Wrong(string option, string value, string help)
        => DiagnosticException.Of(Codes.OptionValue, option, $"'{value}' is no value for '{option}'", help);
}

// The options that say how a plan is run: steps, data, seed, learning rate and where results go.

using System.CommandLine;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Cuda;
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
    public RankDevice Device { get; init; } = RankDevice.Cpu;
    public string? Resume { get; init; }
    public int? SaveInterval { get; init; }
    public int? Keep { get; init; }
    public bool? Background { get; init; }
    public string? Trace { get; init; }
    public int? TraceStep { get; init; }

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
            Load = Resume ?? recipe.Load,
            SaveInterval = SaveInterval ?? recipe.SaveInterval,
            MostRecentK = Keep ?? recipe.MostRecentK,
            AsyncSave = Background ?? recipe.AsyncSave,
        };
        if (settings.TrainIters < 1)
        {
            throw DiagnosticException.Of(
                Codes.OptionValue, "training.train_iters", $"{settings.TrainIters} steps are none", "give 1 or more");
        }

        if (settings is { SaveInterval: < 0 } or { MostRecentK: < 0 })
        {
            throw DiagnosticException.Of(
                Codes.OptionValue,
                "training.save_interval, training.most_recent_k",
                $"checkpoints every {settings.SaveInterval} steps, of which {settings.MostRecentK} stay, are none",
                "give 0 or more; 0 saves none, or keeps all");
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

    private readonly Option<string?> _resume = new("--resume")
    {
        HelpName = "DIR",
        Description = "Go on from a checkpoint: its folder, one that holds several, or a run's; saved by any layout. "
            + "Steps, rates and seed are its own where not given",
    };

    private readonly Option<int?> _saveInterval = JobOptions.Number(
        "--save-interval", "Save a checkpoint every N steps and after the last, in checkpoints of the run's folder");

    private readonly Option<int?> _keep = JobOptions.Number("--keep", "Checkpoints that stay, the last ones; without, all");

    private readonly Option<string?> _save = new("--save")
    {
        HelpName = "background|sync",
        Description = "Write checkpoints while training goes on, from a copy of the state (the default), or wait for each",
    };

    private readonly Option<string?> _executor = new("--executor")
    {
        HelpName = "compiled|interpreter",
        Description = "What runs the plan: C# made from it (the default), or its steps one by one; the same bits",
    };

    private readonly Option<string?> _trace = new("--trace")
    {
        HelpName = "DIR",
        Description = "Record one step of every rank in DIR/rank-R.json, for Perfetto or chrome://tracing, and say what share of "
            + "communication was hidden behind compute",
    };

    private readonly Option<int?> _traceStep = JobOptions.Number(
        "--trace-step", $"The step that --trace records, from where the run starts; without, the {Tracing.WarmedUp}th, or the last of fewer");

    private readonly DeviceOption _device = new();

    public void AddTo(Command command)
    {
        _device.AddTo(command);
        foreach (var option in (Option[])[
            _steps, _data, _tokenizer, _out, _seed, _learningRate, _resume, _saveInterval, _keep, _save, _executor, _trace, _traceStep])
            command.Add(option);
    }

    public RunChoices Read(ParseResult parse, Launched? launched = null)
    {
        var (steps, rate) = (parse.GetValue(_steps), parse.GetValue(_learningRate));
        if (steps < 1)
            throw Wrong("--steps", $"{steps}", "give 1 or more");
        if (rate is { } r && !(r >= 0 && double.IsFinite(r)))
            throw Wrong("--lr", $"{r}", "give a number such as 0.001");
        foreach (var count in (Option<int?>[])[_saveInterval, _keep, _traceStep])
        {
            if (parse.GetValue(count) < 1)
                throw Wrong(count.Name, $"{parse.GetValue(count)}", "give 1 or more, or leave it out");
        }

        foreach (var path in (Option<string?>[])[_data, _tokenizer, _out, _resume, _trace])
        {
            if (parse.GetValue(path) == "")
                throw Wrong(path.Name, "", "give a path, or leave it out");
        }

        if (parse.GetValue(_traceStep) is { } traced && parse.GetValue(_trace) is null)
            throw Wrong("--trace-step", $"{traced}", "give --trace DIR too: nothing is recorded without it");

        return new RunChoices
        {
            Steps = steps,
            Data = parse.GetValue(_data),
            Tokenizer = parse.GetValue(_tokenizer),
            Out = parse.GetValue(_out),
            Seed = parse.GetValue(_seed),
            LearningRate = rate,
            Resume = parse.GetValue(_resume),
            SaveInterval = parse.GetValue(_saveInterval),
            Keep = parse.GetValue(_keep),
            Background = BackgroundOf(parse.GetValue(_save)),
            Trace = parse.GetValue(_trace),
            TraceStep = parse.GetValue(_traceStep),
            Executor = ExecutorOf(parse.GetValue(_executor)),
            Device = _device.Read(parse, launched),
        };
    }

    internal static Executor ExecutorOf(string? name)
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

    private static bool? BackgroundOf(string? name)
        => name switch
        {
            null => null,
            "background" => true,
            "sync" => false,
            _ => throw Wrong("--save", name, Nearest.Help(name, ["background", "sync"])),
        };

    private static DiagnosticException Wrong(string option, string value, string help)
        => DiagnosticException.Of(Codes.OptionValue, option, $"'{value}' is no value for '{option}'", help);
}

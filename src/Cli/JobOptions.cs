// The options that say what is compiled: recipe, degrees of parallelism, batch and precision.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

/// The choices as given; null where the recipe decides.
internal sealed record JobChoices(string Recipe)
{
    public int? Tensor { get; init; }
    public int? Pipeline { get; init; }
    public int? Expert { get; init; }
    public int? Data { get; init; }
    public int? ExpertTensor { get; init; }
    public int? Context { get; init; }
    public int? VirtualPipeline { get; init; }
    public int? MicrobatchGroup { get; init; }
    public string? Layout { get; init; }
    public string? Schedule { get; init; }
    public int? MicroBatch { get; init; }
    public int? GlobalBatch { get; init; }
    public int? SeqLength { get; init; }
    public string? DType { get; init; }
    public bool NoFuse { get; init; }
    public string? Recompute { get; init; }
    /// Assignments such as recipe.global_batch_size=64, in the order given.
    public IReadOnlyList<string> Set { get; init; } = [];

    /// No degree of parallelism is given: a GPU is one rank then.
    public bool IsSilentOnDegrees
        => (Tensor ?? Pipeline ?? Expert ?? Data ?? ExpertTensor ?? Context ?? VirtualPipeline) is null && Layout is null
            && !Set.Any(assignment => assignment.StartsWith("recipe.", StringComparison.Ordinal));
}

internal sealed class JobOptions
{
    public const string DefaultRecipe = "deepseek_v3_tiny";

    private readonly Argument<string?> _recipe = new("RECIPE")
    {
        Description = $"A recipe of `dsg recipes`; without, {DefaultRecipe}",
        Arity = ArgumentArity.ZeroOrOne,
    };

    private readonly Option<string?> _recipeOption = new("--recipe")
    {
        HelpName = "RECIPE",
        Description = "The same as an option",
    };

    private readonly Option<string[]> _set = SetOption();

    private readonly Option<int?> _tensor = Number(
        "--tp", "Tensor parallel degree; where any degree is given, the others are 1 and not the recipe's");

    private readonly Option<int?> _pipeline = Number("--pp", "Pipeline parallel degree: stages");
    private readonly Option<int?> _virtualPipeline = Number(
        "--vp", "Chunks of the model on each pipeline rank; 2 and more interleave: pp x vp stages, less waiting");

    private readonly Option<int?> _microbatchGroup = Number(
        "--microbatch-group", "Microbatches that a chunk runs before the rank's next chunk; without, pp");

    private readonly Option<int?> _expert = Number("--ep", "Expert parallel degree");
    private readonly Option<int?> _data = Number(
        "--dp", "Data parallel degree; beside others, the smallest for which etp x ep divides tp x cp x dp");

    private readonly Option<int?> _expertTensor = Number("--etp", "Tensor parallel degree of the experts");
    private readonly Option<int?> _context = Number("--cp", "Context parallel degree");

    private readonly Option<string?> _layout = new("--layout")
    {
        HelpName = "LAYOUT",
        Description = "What each stage holds, such as 'Et|t|t|tmL': E embedding, t layer, m MTP, L head; "
            + "without, cut by cost",
    };

    private readonly Option<string?> _schedule = new("--schedule")
    {
        HelpName = "1F1B|Interleaved1F1B|GPipe",
        Description = "Order of the microbatches in the pipeline",
    };

    private readonly Option<int?> _microBatch = Number(
        "--micro-batch", "Sequences of a microbatch on one data parallel rank");

    private readonly Option<int?> _globalBatch = Number("--global-batch", "Sequences of a step, over all ranks");
    private readonly Option<int?> _seqLength = Number("--seq-length", "Tokens of a sequence");

    private readonly Option<string?> _dtype = new("--dtype")
    {
        HelpName = "auto|fp32|bf16|fp8",
        Description = "What matrices are multiplied in; "
            + "auto: what this machine multiplies faster, by a short probe; fp8: linear layers in E4M3, emulated on the CPU",
    };

    private readonly Option<bool> _noFuse = new("--no-fuse")
    {
        Description = "Leave RoPE, permute and unpermute as primitive ops, to compare",
    };

    private readonly Option<string?> _recompute = new("--recompute")
    {
        HelpName = "NAMES",
        // spelled out: help must not load the compiler
        Description = "Compute these again in the backward pass instead of keeping them: none, or "
            + "core_attn,mla_up_proj,layernorm,moe_act,shared_experts,mlp,moe,full; "
            + "budget=40GiB chooses the cheapest that fit a rank",
    };

    public void AddTo(Command command)
    {
        command.Add(_recipe);
        foreach (var option in (Option[])[
            _recipeOption, _set, _tensor, _pipeline, _virtualPipeline, _microbatchGroup, _expert, _data, _expertTensor,
            _context, _layout, _schedule, _microBatch, _globalBatch, _seqLength, _dtype, _noFuse, _recompute])
            command.Add(option);
    }

    public JobChoices Read(ParseResult parse) => new(RecipeOf(parse))
    {
        Set = parse.GetValue(_set) ?? [],
        Tensor = Degree(parse, _tensor),
        Pipeline = Degree(parse, _pipeline),
        Expert = Degree(parse, _expert),
        Data = Degree(parse, _data),
        ExpertTensor = Degree(parse, _expertTensor),
        Context = Degree(parse, _context),
        VirtualPipeline = Degree(parse, _virtualPipeline),
        MicrobatchGroup = Degree(parse, _microbatchGroup),
        Layout = parse.GetValue(_layout),
        Schedule = parse.GetValue(_schedule),
        MicroBatch = parse.GetValue(_microBatch),
        GlobalBatch = parse.GetValue(_globalBatch),
        SeqLength = parse.GetValue(_seqLength),
        DType = parse.GetValue(_dtype),
        NoFuse = parse.GetValue(_noFuse),
        Recompute = parse.GetValue(_recompute),
    };

    public static Option<string[]> SetOption() => new("--set")
    {
        HelpName = "KEY=VALUE",
        Description = "Change one setting of `dsg recipes show`, such as model.num_layers=12 "
            + "or recipe.global_batch_size=64; may be given again, applied last and in order",
    };

    /// One recipe, however it is given.
    private string RecipeOf(ParseResult parse)
    {
        var (word, option) = (parse.GetValue(_recipe), parse.GetValue(_recipeOption));
        return word is null || option is null || word == option
            ? option ?? word ?? DefaultRecipe
            : throw DiagnosticException.Of(
                Codes.OptionValue,
                "--recipe",
                $"two recipes are named: '{word}' and '{option}'",
                "name one of them");
    }

    public static Option<int?> Number(string name, string description)
        => new(name) { HelpName = "N", Description = description };

    /// The value of an option that a verb cannot do without.
    public static string Required(ParseResult parse, Option<string?> option)
        => parse.GetValue(option) is { Length: > 0 } value
            ? value
            : throw DiagnosticException.Of(
                Codes.OptionValue, option.Name, $"'{option.Name} {option.HelpName}' is not given", $"{option.Name}: {option.Description}");

    /// The element type of a --dtype that has two choices; null where it is not given.
    public static DType? DTypeOf(string? name) => name switch
    {
        null => null,
        "fp32" => DType.Float32,
        "bf16" => DType.BFloat16,
        _ => throw DiagnosticException.Of(
            Codes.OptionValue, "--dtype", $"there is no dtype '{name}' here", Nearest.Help(name, ["fp32", "bf16"])),
    };

    /// A recipe takes 0 for a degree that is not given; on the command line it is a mistake.
    public static int? Degree(ParseResult parse, Option<int?> option)
        => parse.GetValue(option) is { } degree && degree < 1
            ? throw DiagnosticException.Of(
                Codes.MeshDegree,
                option.Name,
                $"the degree '{option.Name}' is {degree}; a degree is at least 1",
                $"give a positive '{option.Name}', or leave it out")
            : parse.GetValue(option);
}

// dsg generate: goes on with prompts, with the weights of a published checkpoint or of one of a run.

using System.CommandLine;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Generation;
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Cli;

/// The choices as given.
internal sealed record GenerateChoices
{
    public string? HuggingFace { get; init; }
    public string? Checkpoint { get; init; }
    public string? Tokenizer { get; init; }
    public IReadOnlyList<string> Prompts { get; init; } = [];
    public IReadOnlyList<string> PromptIds { get; init; } = [];
    public int MaxNewTokens { get; init; }
    public bool Chat { get; init; }
    public bool Json { get; init; }
    public string? DType { get; init; }
    public string? Plans { get; init; }
    public required Recipe Recipe { get; init; }
    public required Sampling Sampling { get; init; }
    public Executor Executor { get; init; }
    public RankDevice Device { get; init; } = RankDevice.Cpu;
}

internal static class Generate
{
    private const int DefaultTokens = 128;

    public static Command Verb()
    {
        var published = Path("--hf", "DIR", "Weights: a checkpoint of Hugging Face, or its name in the local cache");
        var checkpoint = Path("--checkpoint", "DIR", "Weights: a checkpoint, the folder that holds several, or that of a run");
        var tokenizer = Path("--tokenizer", "PATH", "tokenizer.json, or its folder; without, the checkpoint's, or bytes");
        var prompts = Many("--prompt", "TEXT", "A text to go on with; may be given again, all are gone on with together");
        var ids = Many("--prompt-ids", "N,N,...", "The same as token ids, which need no tokenizer");
        var most = JobOptions.Number("--max-new-tokens", $"Tokens to make for each prompt at most; without, {DefaultTokens}");
        var temperature = Real("--temperature", "0, the default, takes the likeliest token; otherwise tokens are drawn, such as at 0.7");
        var topP = Real("--top-p", "Draw from the fewest likeliest tokens whose probabilities reach this sum; without, 1");
        var topK = JobOptions.Number("--top-k", "Draw from so many of the likeliest tokens; without, all");
        var seed = new Option<ulong?>("--seed") { HelpName = "N", Description = "Of the draws; without, 1234" };
        var chat = new Option<bool>("--chat") { Description = "Prompts are messages of a user, put in the tokenizer's chat template" };
        var json = new Option<bool>("--json") { Description = "One JSON object a prompt, at the end, instead of text as it comes" };
        var dtype = Path("--dtype", "fp32|bf16", "What is computed in; without, fp32 for fp32 weights, else what is faster here");
        var executor = Path("--executor", "compiled|interpreter", "As of dsg pretrain");
        var degrees = new DegreeOptions();
        var plans = Path("--plans", "DIR", "Also write prefill.txt and decode.txt, the plans, for dsg show, check and explain");
        var verb = new Command("generate", "Go on with prompts: token after token, over a cache of latents")
        {
            published, checkpoint, tokenizer, prompts, ids, most, temperature, topP, topK, seed, chat, json, dtype, executor, plans,
        };
        degrees.AddTo(verb);
        var device = new DeviceOption();
        device.AddTo(verb);
        verb.SetAction(parse => Generation.Run(new GenerateChoices
        {
            HuggingFace = parse.GetValue(published),
            Checkpoint = parse.GetValue(checkpoint),
            Tokenizer = parse.GetValue(tokenizer),
            Prompts = parse.GetValue(prompts) ?? [],
            PromptIds = parse.GetValue(ids) ?? [],
            MaxNewTokens = parse.GetValue(most) ?? DefaultTokens,
            Chat = parse.GetValue(chat),
            Json = parse.GetValue(json),
            DType = parse.GetValue(dtype),
            Plans = parse.GetValue(plans),
            Executor = RunOptions.ExecutorOf(parse.GetValue(executor)),
            Device = device.Read(parse),
            Recipe = degrees.Over(Recipe.Default.WithName("generate"), parse),
            Sampling = new Sampling
            {
                Temperature = parse.GetValue(temperature) ?? 0,
                TopP = parse.GetValue(topP) ?? 1,
                TopK = parse.GetValue(topK) ?? 0,
                Seed = parse.GetValue(seed) ?? 1234,
            },
        }));
        return verb;
    }

    private static Option<string?> Path(string name, string help, string description)
        => new(name) { HelpName = help, Description = description };

    private static Option<string[]> Many(string name, string help, string description)
        => new(name) { HelpName = help, Description = description };

    private static Option<double?> Real(string name, string description) => new(name) { HelpName = "X", Description = description };
}

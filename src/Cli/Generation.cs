// A generation: weights and tokenizer of a checkpoint, two plans that fit the prompts, and texts as they come.

using System.Globalization;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime;
using DeepSeekGraph.Runtime.Generation;

namespace DeepSeekGraph.Cli;

internal static class Generation
{
    /// Plans are compiled for lengths rounded up to these, so that code that was compiled for one prompt serves others.
    private const int LengthStep = 32, PlacesStep = 128;

    public static int Run(GenerateChoices choices)
    {
        Launched.RequireAlone("generate");
        using var signals = new StopSignals();
        return RunAsync(choices, signals).GetAwaiter().GetResult();
    }

    private static async Task<int> RunAsync(GenerateChoices choices, StopSignals signals)
    {
        choices.Sampling.Check();
        if (choices.MaxNewTokens < 1)
            throw Wrong("--max-new-tokens", $"{choices.MaxNewTokens} tokens are none", "give 1 or more");
        using var source = ModelSource.Open(choices);
        var text = TextCodec.Of(choices, source);
        var prompts = PromptsOf(choices, text, source.Config.VocabSize);
        var longest = Up(prompts.Max(prompt => prompt.Count), LengthStep);
        var places = Up(longest + choices.MaxNewTokens, PlacesStep);
        var plans = GenerationPlans.Compile(
            new DeepSeekV3(source.Config), choices.Recipe.WithDType(source.DTypeOf(choices.DType)), prompts.Count, longest, places);
        if (choices.Plans is { } folder)
        {
            folder = RunFolder.Create(folder);
            PlanFile.Write(Path.Combine(folder, "prefill.txt"), plans.Prefill);
            PlanFile.Write(Path.Combine(folder, "decode.txt"), plans.Decode);
        }

        ThisMachine.RequireRoomFor(plans.Prefill, device: choices.Device);

        var generator = await Generator.StartAsync(plans.Prefill, plans.Decode, source.Options with
        {
            ThreadsPerRank = ThisMachine.ThreadsPerRank(plans.Prefill),
            Executor = choices.Executor,
            Device = choices.Device,
        }).ConfigureAwait(false);
        await using (generator.ConfigureAwait(false))
        {
            source.Dispose();
            foreach (var remark in generator.Remarks)
                Console.Error.WriteLine(remark);
            signals.Arm();
            var writer = new Completions(choices, prompts, text);
            try
            {
                var tokens = generator.RunAsync(prompts, choices.MaxNewTokens, choices.Sampling, text.Stops, signals.Token);
                await foreach (var token in tokens.ConfigureAwait(false))
                    writer.Add(token);
            }
            catch (OperationCanceledException) when (signals.Token.IsCancellationRequested)
            {
                // what was made so far is the result
            }

            writer.Close();
        }

        return signals.ExitCodeOfSignal;
    }

    private static IReadOnlyList<IReadOnlyList<long>> PromptsOf(GenerateChoices choices, TextCodec text, int vocabulary)
    {
        List<IReadOnlyList<long>> prompts = [.. choices.Prompts.Select(prompt => text.Encode(prompt, choices.Chat)), .. choices.PromptIds.Select(IdsOf)];
        if (prompts.Count == 0)
            throw Wrong("--prompt", "no prompt is given", "give --prompt TEXT, or --prompt-ids N,N,...");
        for (var i = 0; i < prompts.Count; i++)
        {
            if (prompts[i].Count == 0)
                throw Wrong("--prompt", $"prompt {i + 1} has no token", "give a text that is not empty");
            if (prompts[i].Where(id => id < 0 || id >= vocabulary).Take(1).ToArray() is [var wrong])
                throw Wrong("--prompt", $"prompt {i + 1} has the token {wrong}, the model's vocabulary {vocabulary}", $"give ids from 0 to {vocabulary - 1}");
        }

        return prompts;
    }

    private static IReadOnlyList<long> IdsOf(string text)
        => [.. text.Split(',', StringSplitOptions.TrimEntries | StringSplitOptions.RemoveEmptyEntries).Select(word =>
            long.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture, out var id)
                ? id
                : throw Wrong("--prompt-ids", $"'{word}' is no token id", "give whole numbers with commas between"))];

    private static int Up(int n, int step) => (n + step - 1) / step * step;

    internal static DiagnosticException Wrong(string option, string what, string help)
        => DiagnosticException.Of(Codes.OptionValue, option, what, help);
}

// Generates: a prefill plan reads the prompts, a decoding plan makes token after token, both over the same weights and caches.

using System.Runtime.CompilerServices;
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Training;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Generation;

/// A token that a prompt (by its place in the batch) goes on with.
public readonly record struct GeneratedToken(int Prompt, long Token);

/// How generation is run; sampling and prompts come with each call.
public sealed record GeneratorOptions
{
    /// Weights by parameter name, whole; null keeps the plan's own initial value.
    public Func<string, Tensor?>? Weights { get; init; }

    /// Weights from a checkpoint of any layout, instead; open until the generator has started.
    public CheckpointReader? Checkpoint { get; init; }

    /// Seed of initial values, where there are no weights.
    public ulong Seed { get; init; } = 1234;

    /// LibTorch threads of each rank.
    public int ThreadsPerRank { get; init; } = 1;

    public Executor Executor { get; init; }

    /// Where ranks compute.
    public RankDevice Device { get; init; } = RankDevice.Cpu;

    /// Folder of compiled plans; null: the user's cache.
    public string? CodeFolder { get; init; }
}

/// All ranks in this process. One generation at a time; once a rank failed or a run was cancelled, only Dispose is left to do.
public sealed class Generator : IAsyncDisposable
{
    private readonly LocalRanks _prefill;
    private readonly LocalRanks _decode;

    private Generator(PlanSet prefill, PlanSet decode, GeneratorOptions options)
    {
        (Prefill, Decode) = (prefill, decode);
        var how = new RankOptions
        {
            ThreadsPerRank = options.ThreadsPerRank,
            Executor = options.Executor,
            CodeFolder = options.CodeFolder,
            Device = options.Device,
        };
        _prefill = new LocalRanks(prefill, how);
        _decode = new LocalRanks(decode, how with { Sharing = _prefill });
    }

    /// The plan that reads prompts; its input `tokens` is [batch, longest prompt].
    public PlanSet Prefill { get; }

    /// The plan that reads one token of each sequence.
    public PlanSet Decode { get; }

    /// Prompts that one call takes at most.
    public int Batch => Tokens(Prefill).Extents[0];

    /// Tokens that a prompt has at most.
    public int PromptLength => Tokens(Prefill).Extents[1];

    /// Tokens of a prompt and what follows at most: rows of the cache.
    public int Places { get; private set; }

    /// That plans are interpreted, or not kept, and why; each once.
    public IReadOnlyList<string> Remarks => [.. _prefill.Remarks.Union(_decode.Remarks)];

    /// Bytes of weights and caches that the ranks hold, each.
    public IReadOnlyList<(long Weights, long Caches)> Held
        => [.. _prefill.Runners.Select(r => (r.Memory.LiveOf(SlotKind.Parameter), r.Memory.LiveOf(SlotKind.Cache)))];

    /// Allocates and fills all ranks. Both plans are of one model, mesh and cache. DSG0806, DSG0844 where weights do not fit.
    public static async Task<Generator> StartAsync(
        PlanSet prefill, PlanSet decode, GeneratorOptions options, CancellationToken cancellationToken = default)
    {
        LibTorch.Load();
        var sources = options.Checkpoint is { } checkpoint ? StateSources.Of(prefill, checkpoint, part: true) : null;
        var generator = new Generator(prefill, decode, options);
        try
        {
            await generator._prefill.OnAllAsync(
                ParameterState.Filler(sources, options.Seed, options.Weights), cancellationToken).ConfigureAwait(false);
            await generator._decode.OnAllAsync(RequireSameState, cancellationToken).ConfigureAwait(false);
            generator.Places = generator._prefill.Runners
                .SelectMany(r => r.Persistent)
                .Where(slot => slot.Info.Kind.IsCache)
                .Min(slot => slot.Info.Extents[1]);
            return generator;
        }
        catch
        {
            await generator.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// Goes on with every prompt for up to `most` tokens, or until one of `stops`, which is yielded last. Tokens come step by
    /// step, in each step by prompt. Cancellation stops within a kernel's time.
    public async IAsyncEnumerable<GeneratedToken> RunAsync(
        IReadOnlyList<IReadOnlyList<long>> prompts,
        int most,
        Sampling sampling,
        IReadOnlySet<long>? stops = null,
        [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        sampling.Check();
        Require(prompts, most);
        var open = new bool[prompts.Count];
        Array.Fill(open, most > 0);
        var next = new long[prompts.Count];
        for (var step = 0; step < most && open.Contains(true); step++)
        {
            cancellationToken.ThrowIfCancellationRequested();
            using var logits = step == 0
                ? await PassAsync(_prefill, Prefill, Rows(PromptLength, Whole()), cancellationToken).ConfigureAwait(false)
                : await PassAsync(_decode, Decode, Rows(1, Next(step)), cancellationToken).ConfigureAwait(false);
            for (var i = 0; i < prompts.Count; i++)
            {
                if (!open[i])
                    continue;
                next[i] = sampling.Next(Row(logits, i), i, step);
                open[i] = stops is null || !stops.Contains(next[i]);
                yield return new GeneratedToken(i, next[i]);
            }
        }

        IEnumerable<(int, IReadOnlyList<long>, int)> Whole() => prompts.Select((prompt, i) => (i, prompt, 0));

        IEnumerable<(int, IReadOnlyList<long>, int)> Next(int step)
        {
            for (var i = 0; i < prompts.Count; i++)
            {
                if (open[i])
                    yield return (i, [next[i]], prompts[i].Count + step - 1);
            }
        }
    }

    public async ValueTask DisposeAsync()
    {
        await _decode.DisposeAsync().ConfigureAwait(false);
        await _prefill.DisposeAsync().ConfigureAwait(false);
    }

    private static InputInfo Tokens(PlanSet plan) => plan.Inputs.Single(input => input.Name == "tokens");

    /// Both plans must find the same weights and caches under the same names.
    private static void RequireSameState(RankRunner runner)
    {
        if (runner.Memory.LiveOf(SlotKind.Parameter) + runner.Memory.LiveOf(SlotKind.Cache) > 0)
            throw new ArgumentException("the decoding plan has parameters or caches that the prefill plan lacks");
    }

    private void Require(IReadOnlyList<IReadOnlyList<long>> prompts, int most)
    {
        if (prompts.Count > Batch)
            throw Wrong($"{prompts.Count} prompts are given", $"the plans take {Batch}");
        for (var i = 0; i < prompts.Count; i++)
        {
            if (prompts[i].Count == 0)
                throw Wrong($"prompt {i + 1} is empty", "a prompt has at least one token");
            if (prompts[i].Count > PromptLength)
                throw Wrong($"prompt {i + 1} has {prompts[i].Count} tokens", $"the plans take {PromptLength}");
            if (prompts[i].Count + most - 1 > Places)
                throw Wrong($"prompt {i + 1} of {prompts[i].Count} tokens goes on for {most}", $"the cache has {Places} places");
        }

        static DiagnosticException Wrong(string what, string limit)
            => DiagnosticException.Of(Codes.PromptIllegal, "prompt", $"{what}; {limit}", "compile plans for longer prompts or more of them, or ask for less");
    }

    /// Ids, positions and which tokens' successors are asked for: of each row the tokens given, the first at position `begin`.
    /// Rows without tokens and places behind them are padding.
    private (long[] Ids, long[] Positions, float[] Last) Rows(
        int columns, IEnumerable<(int Row, IReadOnlyList<long> Tokens, int Begin)> given)
    {
        var (ids, positions, last) = (new long[Batch * columns], new long[Batch * columns], new float[Batch * columns]);
        Array.Fill(positions, -1);
        foreach (var (row, tokens, begin) in given)
        {
            var place = row * columns;
            for (var s = 0; s < tokens.Count; s++)
                (ids[place + s], positions[place + s]) = (tokens[s], begin + s);
            last[place + tokens.Count - 1] = 1;
        }

        return (ids, positions, last);
    }

    /// One run of a plan; logits [batch, vocab] fp32, which the caller disposes.
    private static async Task<Tensor> PassAsync(
        LocalRanks ranks, PlanSet plan, (long[] Ids, long[] Positions, float[] Last) rows, CancellationToken cancellationToken)
    {
        var shape = Tokens(plan).Extents.Select(e => (long)e).ToArray();
        using var ids = tensor(rows.Ids, shape);
        using var positions = tensor(rows.Positions, shape);
        using var last = tensor(rows.Last, shape);
        using var mask = tensor(rows.Positions.Select(p => p < 0 ? 0f : 1f).ToArray(), shape);
        var inputs = new TensorInputs(
            plan,
            [new Dictionary<string, Tensor> { ["tokens"] = ids, ["positions"] = positions, ["last"] = last, ["token_mask"] = mask }]);
        await ranks.OnAllAsync(runner => runner.RunStep(1, inputs), cancellationToken).ConfigureAwait(false);
        const string logits = "observe:logits";
        var stage = ranks.Runners.First(r => r.Find(logits) is not null).Rank.Stage;
        return Gathering.Slot(ranks.Runners, stage, logits);
    }

    private static unsafe ReadOnlySpan<float> Row(Tensor logits, int row)
    {
        var vocabulary = (int)logits.shape[1];
        return new((float*)logits.Pointer() + ((long)row * vocabulary), vocabulary);
    }
}

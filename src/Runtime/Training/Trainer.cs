// Trains: the ranks of a plan that this process owns, all or one of many processes', one step after the other.
using System.Diagnostics;
using System.Runtime.CompilerServices;
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Telemetry;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Training;

/// <summary>Runs a plan. Once a rank failed or a step was cancelled, only Dispose is left to do.</summary>
public sealed class Trainer : IAsyncDisposable
{
    private static readonly string[] s_metrics = ["metric:loss", "metric:mtp_loss", "metric:balance_loss", "metric:grad_norm"];

    private readonly LocalRanks _ranks;
    private readonly List<StepTrace> _traces = [];
    private IReadOnlyList<string> _resumed = [];

    private Trainer(PlanSet plan, TrainerOptions options)
    {
        Plan = plan;
        Options = options;
        var how = new RankOptions
        {
            ThreadsPerRank = options.ThreadsPerRank,
            Executor = options.Executor,
            CodeFolder = options.CodeFolder,
            Traffic = options.Traffic,
            Device = options.Device,
            World = options.World,
        };
        _ranks = new LocalRanks(plan, how, runner =>
        {
            runner.Trace = options.Trace;
            runner.Profile = options.Profile ? new StepProfile() : null;
        });
    }

    public PlanSet Plan { get; }

    public TrainerOptions Options { get; }

    /// <summary>Steps completed; a run that is resumed counts on from its checkpoint's.</summary>
    public long Step { get; set; }

    /// <summary>Sequences that steps have read, over all ranks; counted on like Step.</summary>
    public long Sequences { get; private set; }

    /// <summary>What this process is part of.</summary>
    public IWorld World => _ranks.World;

    /// <summary>The ranks of this process, by number; touch their slots between steps only.</summary>
    public IReadOnlyList<RankRunner> Ranks => _ranks.Runners;

    /// <summary>
    /// What is not as asked for without being wrong, each once: that plans are interpreted, or not kept, or resumed from weights only, and why.
    /// </summary>
    public IReadOnlyList<string> Remarks => [.. _resumed, .. _ranks.Remarks];

    /// <summary>Stages whose code was compiled for this trainer; the others were interpreted or kept from an earlier run.</summary>
    public int CompiledStages => _ranks.CompiledStages;

    /// <summary>Bytes held at most, measured: by stage, the largest of its ranks in this process.</summary>
    public IReadOnlyList<MemoryRow> PeakBytes => PeakMemory.Of(Ranks);

    /// <summary>The same over all processes; of this one alone where others have ended. All processes call it.</summary>
    public IReadOnlyList<MemoryRow> GatherPeakBytes() => PeakMemory.Of(World, Ranks);

    /// <summary>What the ranks of this process did in TrainerOptions.TracedStep, by rank; none before it.</summary>
    public IReadOnlyList<StepTrace> Traces => [.. _traces.OrderBy(t => t.Rank)];

    /// <summary>Allocates all ranks, and initialises them or loads them from the checkpoint; DSG0844 where that is of another model.</summary>
    public static async Task<Trainer> StartAsync(PlanSet plan, TrainerOptions options, CancellationToken cancellationToken = default)
    {
        LibTorch.Load();
        if (options.KeepFreedMemory && !options.Device.IsCuda)
            FreedMemory.Keep();
        var sources = options.Checkpoint is { } checkpoint ? StateSources.Of(plan, checkpoint) : null;
        var trainer = new Trainer(plan, options);
        try
        {
            await trainer.OnAllAsync(ParameterState.Filler(sources, options.Seed, options.Weights), cancellationToken).ConfigureAwait(false);
            if (options.Checkpoint is { Manifest: var manifest })
                (trainer.Step, trainer.Sequences, trainer._resumed) = (manifest.Step, manifest.Sequences, sources!.Remarks);
            return trainer;
        }
        catch
        {
            await trainer.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Trains for `steps` more steps and yields what each measured. Cancellation stops within a kernel's time.</summary>
    public async IAsyncEnumerable<StepMetrics> RunAsync(long steps, [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        var batches = Options.Batches ?? throw new InvalidOperationException("training needs TrainerOptions.Batches");
        for (var i = 0L; i < steps; i++)
        {
            cancellationToken.ThrowIfCancellationRequested();
            var begin = Stopwatch.GetTimestamp();
            var step = Step + 1;
            var rate = Options.LearningRate.At(step);
            var inputs = new BatchInputs(Plan, batches.Get(step - 1));
            await OnAllAsync(
                runner =>
                {
                    if (step + 1 == Options.TracedStep)
                        runner.BeginTrace();
                    SetScalars(runner, step, rate, inputs.Count);
                    if (step == Options.TracedStep)
                    {
                        var trace = runner.RunTraced(step, inputs);
                        lock (_traces)
                            _traces.Add(trace);
                        return;
                    }

                    runner.RunStep(step, inputs);
                    runner.Device.FinishCompute();
                },
                cancellationToken).ConfigureAwait(false);
            Step = step;
            Sequences += (long)Plan.Microbatches * Plan.MicroBatch;
            var numbers = SharedNumbers.Of(World, [.. s_metrics.Select(Metric)]);
            var seconds = Stopwatch.GetElapsedTime(begin).TotalSeconds;
            yield return new StepMetrics
            {
                Step = step,
                Loss = numbers[0] ?? double.NaN,
                MtpLoss = numbers[1],
                BalanceLoss = numbers[2],
                Lr = rate,
                GradNorm = numbers[3] ?? double.NaN,
                Tokens = inputs.Tokens,
                TokensPerS = inputs.Tokens / seconds,
                Seconds = seconds,
            };
        }
    }

    /// <summary>One step without its epilogue on given microbatches (input name -> whole tensor): gradients and metrics stay in their slots, unreduced.</summary>
    public async Task ForwardBackwardAsync(
        IReadOnlyList<IReadOnlyDictionary<string, Tensor>> microbatches,
        System.Action<RankRunner, SlotValue, int>? observe = null,
        CancellationToken cancellationToken = default)
    {
        var inputs = new TensorInputs(Plan, microbatches);
        await OnAllAsync(
            runner =>
            {
                SetScalars(runner, Step + 1, Options.LearningRate.At(Step + 1), inputs.Count);
                foreach (var slot in runner.Persistent.Where(s => s.Info.Kind.IsCounter || s.Info.Kind.IsGradient))
                    slot.Tensor.zero_().On(slot.Tensor);
                runner.RunStep(Step + 1, inputs, false, observe is null ? null : (value, microbatch) => observe(runner, value, microbatch));
            },
            cancellationToken).ConfigureAwait(false);
    }

    /// <summary>The inputs of a step, for runs of single steps on the ranks' own threads.</summary>
    public IInputSource InputsOf(long step)
        => new BatchInputs(Plan, (Options.Batches ?? throw new InvalidOperationException("inputs need TrainerOptions.Batches")).Get(step - 1));

    /// <summary>A metric of the last step; null when no rank of this process has one of that name.</summary>
    public double? Metric(string name)
        => Ranks.Reverse().Where(r => r.Rank.Coordinates.All(c => c == 0)).Select(r => r.Find(name)).FirstOrDefault(v => v is not null) is { } slot
            ? Number(slot.Tensor)
            : null;

    private static double Number(Tensor scalar)
    {
        using var host = scalar.OnHost();
        return StepKernels.Number(host);
    }

    /// <summary>A metric before the epilogue has reduced it: the sum of its accumulators (`acc:` and the name) over ranks and stages.</summary>
    public double GatherMetric(string name)
    {
        RequireAllRanks();
        int[] stages = [.. Ranks.Where(r => r.Find("acc:" + name) is not null).Select(r => r.Rank.Stage).Distinct()];
        using var sum = Gathering.Sum(Ranks, stages, "acc:" + name);
        return Number(sum);
    }

    /// <summary>Whole parameters by name, in their compute type; the caller disposes them.</summary>
    public IReadOnlyDictionary<string, Tensor> GatherParameters()
    {
        RequireAllRanks();
        return Plan.Parameters.ToDictionary(p => p.Name, p => Gathering.Slot(Ranks, p.Stages[0], p.Name));
    }

    /// <summary>Whole gradients by parameter name, summed over what is still partial; the caller disposes them.</summary>
    public IReadOnlyDictionary<string, Tensor> GatherGradients()
    {
        RequireAllRanks();
        return Plan.Parameters.Where(p => Ranks.Any(r => r.Find("grad:" + p.Name) is not null))
            .ToDictionary(p => p.Name, p => Gathering.Sum(Ranks, p.Stages, "grad:" + p.Name));
    }

    /// <summary>Runs work on every rank's own thread, as a checkpoint does; the first error is thrown.</summary>
    public Task OnAllAsync(System.Action<RankRunner> work, CancellationToken cancellationToken = default)
        => _ranks.OnAllAsync(work, cancellationToken);

    public ValueTask DisposeAsync() => _ranks.DisposeAsync();

    /// One over the valid tokens of an objective is `inv_tokens`, or `inv_` and the objective: its mask is `loss_mask`, or the objective's.
    private static void SetScalars(RankRunner runner, long step, double rate, Func<string, long> tokens)
    {
        foreach (var slot in runner.Persistent.Where(s => s.Info.Kind.IsScalar))
        {
            double? value = slot.Info.Name switch
            {
                "step" => step,
                "lr" => rate,
                "inv_tokens" => Inverse("loss_mask"),
                var name when name.StartsWith("inv_", StringComparison.Ordinal) && name.EndsWith("_tokens", StringComparison.Ordinal)
                    => Inverse(name[4..^7] + "_mask"),
                _ => null,
            };
            if (value is null)
                continue;
            using var scalar = (TorchSharp.Scalar)value.Value;
            slot.Tensor.fill_(scalar).On(slot.Tensor);
        }

        double Inverse(string mask) => tokens(mask) is var count and not 0 ? 1.0 / count : 0;
    }

    /// <summary>DSG0863 where other processes have ranks of the plan.</summary>
    private void RequireAllRanks()
    {
        if (World.Processes > 1)
        {
            throw DiagnosticException.Of(
                Codes.OneProcessOnly,
                $"rank {World.Process}",
                $"whole tensors are put together in one process; this job has {World.Processes}",
                "run the plan in one process, or save a checkpoint and read that");
        }
    }
}

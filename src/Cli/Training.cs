// A run: the ranks of a plan in this process, all or its own, step by step, with what is shown and saved meanwhile.

using System.Globalization;
using System.Runtime.ExceptionServices;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime;
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Data;
using DeepSeekGraph.Runtime.Data.Tokenizers;
using DeepSeekGraph.Runtime.Launch;
using DeepSeekGraph.Runtime.Telemetry;
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Cli;

internal static class Training
{
    /// Nothing is written before plan, data and ranks are known to be good.
    public static int Run(PlanSet plan, TrainingSettings settings, RunChoices how, Resumed? resumed, Launched launched)
    {
        using var signals = new StopSignals();
        return RunAsync(plan, settings, how, resumed, launched, signals).GetAwaiter().GetResult();
    }

    private static async Task<int> RunAsync(
        PlanSet plan, TrainingSettings settings, RunChoices how, Resumed? resumed, Launched launched, StopSignals signals)
    {
        if (launched.World is { } several)
            Agreement.RequireSize(several, PlanSummary.Ranks(plan));
        ThisMachine.RequireRoomFor(plan, launched, how.Device);
        if (launched is { IsFirst: true, Restart: null })
            RefuseUsed(settings.Dir);
        var (steps, rate) = (settings.TrainIters, settings.Schedule());
        var done = resumed?.Manifest.Step ?? 0;
        RequireStepsLeft(steps, done);
        var tracing = Tracing.Of(how, steps, done, launched);

        ITokenizer tokenizer = settings.Tokenizer is { } path ? HuggingFaceTokenizer.Load(path) : ByteTokenizer.Instance;
        RequireVocabularyOf(plan, tokenizer);
        var corpus = Corpus.OpenAll(settings.DataPaths);
        Console.WriteLine($"data: {corpus}");
        var tokens = TokenStream.Of(corpus, tokenizer);
        if (settings.Tokenizer is not null)
            Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"tokens: {tokens.Length:N0}, by {tokenizer.Name}"));
        var data = new CheckpointData(tokenizer.Name, tokens.Length, tokens.Checksum, plan.SeqLength);
        var options = new TrainerOptions
        {
            Batches = new SampledBatches(Sampler(plan, tokens, settings.Seed), done, resumed?.Sequences(plan) ?? 0),
            Checkpoint = resumed?.Checkpoint,
            Seed = settings.Seed,
            LearningRate = rate,
            ThreadsPerRank = ThisMachine.ThreadsPerRank(plan, launched),
            Executor = how.Executor,
            Device = how.Device,
            World = launched.World,
            TracedStep = tracing?.Step,
        };
        Console.WriteLine(Heading(plan, steps, rate, settings.Seed));
        if (DeviceOption.Remark(how.Device, launched.World is null ? PlanSummary.Ranks(plan) : 1) is { } shared)
            Console.WriteLine(shared);
        if (launched.World is { } world)
        {
            Agreement.Require(world, [
                ("the plan", PlanFile.Hash(plan)),
                ("the data's checksum", data.Checksum),
                ("the run", $"{settings.TrainIters} steps, seed {settings.Seed}, {rate}"),
                ("the traced step", tracing is null ? "none" : $"{tracing.Step}"),
                ("checkpoints", $"{settings.SaveInterval} {settings.MostRecentK} {settings.AsyncSave} {settings.Save}"),
            ]);
        }

        var trainer = await Trainer.StartAsync(plan, options, CancellationToken.None).ConfigureAwait(false);
        await using (trainer.ConfigureAwait(false))
        {
            foreach (var remark in (resumed?.Remarks(plan, data, settings) ?? []).Concat(trainer.Remarks))
                Console.WriteLine(remark);
            var folder = FolderOf(settings, launched);
            var saving = new Saving(trainer, settings, folder, data, KeptFiles.Of(settings, resumed));
            await using (saving.ConfigureAwait(false))
            {
                saving.Prepare();
                if (launched.IsFirst)
                    tracing?.Prepare();
                signals.Arm();
                if (launched.IsFirst)
                {
                    Launcher.Record(new RunRecord(folder, Path.GetFullPath(Saving.RootOf(settings, folder))));
                    PlanFile.Write(Path.Combine(folder, Files.Plan), plan);
                }

                var seen = await StepsAsync(trainer, steps, launched.IsFirst ? folder : null, saving, tracing, signals.Token).ConfigureAwait(false);
                await saving.FinishAsync().ConfigureAwait(false);
                if (trainer.World.FirstError is { } error and not OperationCanceledException)
                    ExceptionDispatchInfo.Throw(error);
                if (trainer.World is ProcessWorld { HostWait: { } wait } && seen.Count > 0)
                    Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"host wait for rows: {wait.TotalMilliseconds / seen.Count:F2} ms a step"));
                var peak = trainer.GatherPeakBytes();
                if (launched.IsFirst)
                    Report.Print(new Outcome(plan, steps - (int)Math.Min(done, seen.FirstOrDefault()?.Step - 1 ?? done), seen, peak, folder) { Saved = saving.Summary });
                return signals.ExitCodeOfSignal != 0 ? signals.ExitCodeOfSignal
                    : trainer.World.FirstError is JobCancelledException ? ExitCode.Terminated
                    : saving.ExitCode;
            }
        }
    }

    /// Process 0 makes the folder of the run, and all know it.
    private static string FolderOf(TrainingSettings settings, Launched launched)
        => launched.Restart is { } before ? before.Folder
            : launched.World is { } world ? SharedWork.OnFirst(world, "folder", [], _ => RunFolder.Create(settings.Dir))
                : RunFolder.Create(settings.Dir);

    /// Trains until the last step or a signal, to this process or another; a line a step in metrics.jsonl where a folder is given.
    private static async Task<IReadOnlyList<StepMetrics>> StepsAsync(
        Trainer trainer, int steps, string? folder, Saving saving, Tracing? tracing, CancellationToken stop)
    {
        var path = folder is null ? null : Path.Combine(folder, Files.Metrics);
        var seen = new List<StepMetrics>(path is not null && File.Exists(path) ? MetricsFile.Keep(path, trainer.Step) : []);
        var progress = new Progress(steps, trainer.Step);
        using var metrics = path is null ? null : File.Exists(path) ? MetricsWriter.Append(path) : new MetricsWriter(path);
        try
        {
            await foreach (var step in trainer.RunAsync(steps - trainer.Step, stop).ConfigureAwait(false))
            {
                metrics?.Write(step);
                seen.Add(step);
                progress.Show(step);
                if (step.Step == tracing?.Step)
                {
                    progress.Close();
                    tracing.Tell(trainer);
                }

                await saving.AfterAsync(step.Step).ConfigureAwait(false);
            }
        }
        catch (OperationCanceledException e) when (stop.IsCancellationRequested || e is JobCancelledException)
        {
            // what was trained so far is the result
        }
        finally
        {
            progress.Close();
        }

        return seen;
    }

    private static BatchSampler Sampler(PlanSet plan, TokenStream tokens, ulong seed)
    {
        var columns = plan.Inputs.Single(input => input.Name == "tokens").Extents[1];
        return new BatchSampler(
            tokens, plan.Microbatches * plan.MicroBatch, plan.SeqLength, columns - plan.SeqLength, seed);
    }

    /// A run counts from its first step, not from where it was resumed.
    private static void RequireStepsLeft(int steps, long done)
    {
        if (done >= steps)
        {
            throw DiagnosticException.Of(
                Codes.NothingLeft,
                "--resume",
                $"the checkpoint is of step {done}, the run has {steps}",
                $"give more with --steps: {steps} more are --steps {done + steps}");
        }
    }

    /// Ids beyond the model's vocabulary would be looked up as zeros.
    private static void RequireVocabularyOf(PlanSet plan, ITokenizer tokenizer)
    {
        var extents = plan.Parameters
            .SelectMany(parameter => parameter.Axes.Zip(parameter.Extents))
            .Where(dim => dim.First == "vocab")
            .Select(dim => dim.Second)
            .ToArray();
        if (extents.Length > 0 && extents.Min() < tokenizer.Vocabulary)
        {
            throw DiagnosticException.Of(
                Codes.VocabularySmaller,
                "--tokenizer",
                $"the tokenizer ({tokenizer.Name}) has {tokenizer.Vocabulary} ids, the model's vocabulary {extents.Min()}",
                $"compile with --set model.vocab_size={(tokenizer.Vocabulary + 127) / 128 * 128}, or another number from {tokenizer.Vocabulary} up");
        }
    }

    /// Before the work rather than after it; RunFolder has the words.
    private static void RefuseUsed(string? folder)
    {
        if (File.Exists(folder) || (Directory.Exists(folder) && Directory.EnumerateFileSystemEntries(folder).Any()))
            RunFolder.Create(folder);
    }

    private static string Heading(PlanSet plan, int steps, LearningRate rate, ulong seed)
    {
        var mesh = plan.Mesh;
        return string.Create(
            CultureInfo.InvariantCulture,
            $"plan: {PlanSummary.Name(plan)}, {PlanSummary.Parameters(plan):N0} parameters on {PlanSummary.Count(PlanSummary.Ranks(plan), "rank")}"
            + $" (TP {mesh.Tensor} x PP {mesh.Pipeline} x DP {mesh.Data}, EP {mesh.Expert}), {plan.Layout}\n"
            + $"run: {steps} steps, learning rate {rate.Peak}, seed {seed}");
    }
}

/// Names of what a run writes.
internal static class Files
{
    public const string Metrics = "metrics.jsonl";
    public const string Plan = "plan.txt";
    public const string Curve = "loss.png";
}

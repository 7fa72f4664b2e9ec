// A checkpoint that a run goes on from, and what of its settings the run takes where none are given.

using System.Globalization;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Checkpoints;

namespace DeepSeekGraph.Cli;

/// Open until the ranks have read it.
internal sealed class Resumed : IDisposable
{
    private const string LoadKey = "training.load=";

    /// Settings that a checkpoint keeps: those that its learning rate follows from.
    private static readonly string[] s_kept = ["train_iters", "lr", "min_lr", "lr_warmup_iters", "lr_decay_iters"];

    private Resumed(CheckpointReader checkpoint) => Checkpoint = checkpoint;

    public CheckpointReader Checkpoint { get; }

    public CheckpointManifest Manifest => Checkpoint.Manifest;

    /// What --resume, else the last --set training.load, names; null where a run starts anew.
    public static Resumed? Open(RunChoices run, Launched launched, JobChoices? job = null)
    {
        var path = Newest(launched)
            ?? run.Resume
            ?? job?.Set.LastOrDefault(set => set.StartsWith(LoadKey, StringComparison.Ordinal))?[LoadKey.Length..];
        return path is null ? null
            : new Resumed(launched.World is { } world ? CheckpointReader.Open(path, world) : CheckpointReader.Open(path));
    }

    /// Of a job that is started again, what its earlier start has saved; null where it has nothing yet.
    private static string? Newest(Launched launched)
    {
        if (launched is not { Restart: { } run, World: { } world })
            return null;
        var answer = world.Meet(
            "restart", [], _ => [Directory.Exists(run.Checkpoints) && CheckpointRoot.Steps(run.Checkpoints).Count > 0 ? (byte)1 : (byte)0], world.Stop);
        return answer is [1] ? run.Checkpoints : null;
    }

    /// A run's settings as a checkpoint keeps them.
    public static IReadOnlyList<string> Lines(TrainingSettings settings)
        => [.. RecordFields.Of(settings).Where(field => s_kept.Contains(field.Key)).Select(field => $"{field.Key}={field.Text}")];

    /// A recipe's settings with the checkpoint's own; weights that were imported have none.
    public TrainingSettings Over(TrainingSettings recipe)
    {
        if (Manifest.Training.Count == 0)
            return recipe;
        var settings = recipe with { Seed = Manifest.Seed };
        foreach (var line in Manifest.Training)
        {
            if (line.Split('=', 2) is not [var key, var text] || !s_kept.Contains(key)
                || RecordFields.With(settings, key, text) is not { } changed)
            {
                throw DiagnosticException.Of(
                    Codes.CheckpointMalformed,
                    Path.Combine(Checkpoint.Folder, CheckpointManifest.FileName),
                    $"the checkpoint's setting '{line}' is none",
                    "copy it again, or resume from another one");
            }

            settings = changed;
        }

        return settings;
    }

    /// The job's choices with the checkpoint's element type, which a probe of another day could choose otherwise.
    public JobChoices Over(JobChoices choices)
        => choices.DType is null && !choices.Set.Any(Overrides.IsDType) && DTypeOf(Manifest) is { } dtype
            ? choices with { DType = dtype }
            : choices;

    /// Where the data go on, in sequences of the plan's length.
    public long Sequences(PlanSet plan)
        => Manifest.Data is { } data && data.SequenceLength != plan.SeqLength
            ? (long)((Int128)Manifest.Sequences * data.SequenceLength / plan.SeqLength)
            : Manifest.Sequences;

    /// Where the run comes from, and what differs from the run that saved it.
    public IEnumerable<string> Remarks(PlanSet plan, CheckpointData data, TrainingSettings settings)
    {
        yield return string.Create(
            CultureInfo.InvariantCulture,
            $"resumed: {Checkpoint.Folder}, step {Manifest.Step}, behind {Sequences(plan):N0} sequences of the data");
        if (Manifest.Data is not { } before)
            yield break;
        if (settings.Seed != Manifest.Seed)
            yield return $"seed {settings.Seed}, the checkpoint's is {Manifest.Seed}: the data come in another order from here on";
        if (before.SequenceLength != data.SequenceLength)
            yield return $"sequences of {data.SequenceLength} tokens, the checkpoint's had {before.SequenceLength}: its place is counted in tokens";
        if (before.Checksum != data.Checksum)
        {
            yield return string.Create(
                CultureInfo.InvariantCulture,
                $"other data: {data.Tokens:N0} tokens by {data.Tokenizer}, the checkpoint read {before.Tokens:N0} by {before.Tokenizer}");
        }
    }

    public void Dispose() => Checkpoint.Dispose();

    private static string? DTypeOf(CheckpointManifest manifest)
    {
        const string key = "dtype=";
        var line = manifest.Training.Count == 0 ? null : manifest.Recipe.FirstOrDefault(l => l.StartsWith(key, StringComparison.Ordinal));
        return line?[key.Length..] is "fp32" or "bf16" or "fp8" ? line[key.Length..] : null;
    }
}

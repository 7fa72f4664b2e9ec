// Checkpoints of a run: every so many steps and after the last; a failure is told, and the run goes on.

using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Cli;

/// Nothing at all without --save-interval.
internal sealed class Saving : IAsyncDisposable
{
    private readonly Trainer _trainer;
    private readonly TrainingSettings _settings;
    private readonly CheckpointSaver? _saver;
    private readonly string _root;
    private int _failed;

    public Saving(
        Trainer trainer, TrainingSettings settings, string folder, CheckpointData data, IReadOnlyList<(string, byte[])> kept)
    {
        _trainer = trainer;
        _settings = settings;
        _root = RootOf(settings, folder);
        if (settings.SaveInterval == 0)
            return;
        _saver = new CheckpointSaver(trainer, new CheckpointOptions
        {
            Root = _root,
            Background = settings.AsyncSave,
            Keep = settings.MostRecentK,
            Data = data,
            Training = Resumed.Lines(settings),
            Kept = kept,
        });
    }

    /// Where a run saves.
    public static string RootOf(TrainingSettings settings, string folder) => settings.Save ?? Path.Combine(folder, CheckpointRoot.InRun);

    /// 1 once a save failed.
    public int ExitCode => _failed > 0 ? Cli.ExitCode.Diagnostics : Cli.ExitCode.Ok;

    /// What lies where; null where nothing was asked for.
    public string? Summary
    {
        get
        {
            if (_saver is null)
                return null;
            var steps = CheckpointRoot.Steps(_root);
            var folder = Path.GetRelativePath(Environment.CurrentDirectory, _root);
            return (steps.Count == 0 ? $"none in {folder}" : $"{steps.Count} in {folder}, the last of step {steps[^1]}")
                + (_failed > 0 ? $"; {PlanSummary.Count(_failed, "save")} failed" : "");
        }
    }

    /// Before the first step: the folder is there, and nobody else saves to it.
    public void Prepare() => _saver?.Prepare();

    /// After a step. What became of the save before is told now.
    public async Task AfterAsync(long step)
    {
        if (_saver is null || (step % _settings.SaveInterval != 0 && step != _settings.TrainIters))
            return;
        await TellAsync(_saver.FinishAsync).ConfigureAwait(false);
        await TellAsync(_saver.SaveAsync).ConfigureAwait(false);
    }

    /// The save under way is finished, also after a signal.
    public Task FinishAsync() => _saver is null ? Task.CompletedTask : TellAsync(_saver.FinishAsync);

    public ValueTask DisposeAsync() => _saver?.DisposeAsync() ?? ValueTask.CompletedTask;

    private async Task TellAsync(Func<Task> work)
    {
        try
        {
            await work().ConfigureAwait(false);
        }
        catch (OperationCanceledException)
        {
            // another process ended before it was finished: nothing is left of it
            _failed++;
        }
        catch (DiagnosticException e)
        {
            _failed++;
            if (_trainer.World.Process != 0)
                return;
            Console.WriteLine();
            Render.Diagnostics(e.Diagnostics);
        }
    }
}

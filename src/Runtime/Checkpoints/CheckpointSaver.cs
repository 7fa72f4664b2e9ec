// Saves a trainer's state between two steps: at once, or from a copy while training goes on; all processes of a job together.

using System.Collections.Concurrent;
using System.Runtime.ExceptionServices;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Launch;
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// How and where checkpoints are saved.
public sealed record CheckpointOptions
{
    /// Root of the checkpoints; made when the first one is saved.
    public required string Root { get; init; }

    /// Steps go on while a copy of the state is written: memory for one more checkpoint. Else ranks wait, and nothing is copied.
    public bool Background { get; init; } = true;

    /// Checkpoints that stay, the last ones; 0: all.
    public int Keep { get; init; }

    /// What was read; for the manifest.
    public CheckpointData? Data { get; init; }

    /// Settings of the run as `key=value` lines; for the manifest.
    public IReadOnlyList<string> Training { get; init; } = [];

    /// Small files that export gives back.
    public IReadOnlyList<(string Name, byte[] Bytes)> Kept { get; init; } = [];
}

/// Not for several threads at once. Of a save that fails nothing is left, training can go on, and the call after it throws why.
public sealed class CheckpointSaver : IAsyncDisposable
{
    private readonly Trainer _trainer;
    private readonly CheckpointOptions _options;
    private readonly StateMap _map;
    private readonly Dictionary<int, StateCopy> _copies = [];
    private IDisposable? _claim;
    private bool _prepared;
    private Task _pending = Task.CompletedTask;

    public CheckpointSaver(Trainer trainer, CheckpointOptions options)
    {
        (_trainer, _options) = (trainer, options);
        _map = new StateMap(trainer.Plan, StateSlot.Of(trainer.Plan));
    }

    /// Makes the root and takes away what a killed process left in it; nobody else saves there until Dispose. DSG0845, DSG0816.
    public void Prepare()
    {
        if (_prepared)
            return;
        SharedWork.OnFirst(_trainer.World, "checkpoint root", [], _ =>
        {
            _claim = CheckpointWriter.OnDisk(_options.Root, () => CheckpointRoot.Claim(_options.Root));
            return "";
        });
        _prepared = true;
    }

    /// Saves the state after the last step. Waits for the save before; where that one failed, throws why (DSG0816, DSG0845) without beginning
    /// this one. In the background it returns as soon as the state is copied.
    public async Task SaveAsync()
    {
        await FinishAsync().ConfigureAwait(false);
        var manifest = new CheckpointManifest
        {
            Version = CheckpointManifest.CurrentVersion,
            Step = _trainer.Step,
            Sequences = _trainer.Sequences,
            Seed = _trainer.Options.Seed,
            Data = _options.Data,
            Recipe = _trainer.Plan.Recipe,
            Training = _options.Training,
            Files = [],
            Kept = [],
            Tensors = _map.Tensors(),
        };
        Prepare();
        if (_options.Background)
        {
            await _trainer.OnAllAsync(runner => Snapshot(runner)).ConfigureAwait(false);
            _pending = Task.Factory.StartNew(
                () => WriteAll(manifest), CancellationToken.None, TaskCreationOptions.LongRunning, TaskScheduler.Default);
            return;
        }

        var writer = Open(manifest.Step);
        using (writer)
        {
            var files = new ConcurrentBag<StoredFile>();
            var failures = new ConcurrentBag<Exception>();
            await _trainer.OnAllAsync(runner =>
            {
                // a rank that throws ends the training of all
                try
                {
                    if (Write(writer, runner.Rank.Rank, MemoryOf(runner)) is { } file)
                        files.Add(file);
                }
                catch (Exception e)
                {
                    failures.Add(e);
                }
            }).ConfigureAwait(false);
            Commit(writer, manifest, [.. files], failures.FirstOrDefault());
        }
    }

    /// Waits for the save under way; throws why the last one failed, once.
    public async Task FinishAsync()
    {
        var pending = _pending;
        _pending = Task.CompletedTask;
        await pending.ConfigureAwait(false);
    }

    /// Waits for the save under way, whatever becomes of it.
    public async ValueTask DisposeAsync()
    {
        await FinishAsync().ConfigureAwait(ConfigureAwaitOptions.SuppressThrowing);
        foreach (var copy in _copies.Values)
            copy.Dispose();
        _copies.Clear();
        _claim?.Dispose();
        _claim = null;
    }

    /// The rank's own memory, or a copy of what lies in a GPU's.
    private Func<StateSlot, nint> MemoryOf(RankRunner runner)
    {
        if (!runner.Device.IsCuda)
            return slot => StateCopy.MemoryOf(runner.Find(slot.Name)!);
        var copy = Snapshot(runner);
        return slot => copy.Of(slot.Name);
    }

    /// A copy of what the rank stores, in memory that is used again by the next one.
    private StateCopy Snapshot(RankRunner runner)
    {
        var slots = _map.Of(runner.Rank.Rank);
        StateCopy? copy;
        lock (_copies)
        {
            if (!_copies.TryGetValue(runner.Rank.Rank, out copy))
                _copies.Add(runner.Rank.Rank, copy = new StateCopy(slots));
        }

        foreach (var slot in slots)
            copy.Take(slot.Name, runner.Find(slot.Name)!);
        return copy;
    }

    private void WriteAll(CheckpointManifest manifest)
    {
        using var writer = Open(manifest.Step);
        var files = new List<StoredFile>();
        Exception? failure = null;
        try
        {
            foreach (var rank in _map.Ranks.Where(_trainer.World.Owns))
                files.Add(Write(writer, rank, slot => _copies[rank].Of(slot.Name))!);
        }
        catch (DiagnosticException e)
        {
            failure = e;
        }

        Commit(writer, manifest, files, failure);
    }

    /// Process 0 creates the folder, the others write into it too.
    private CheckpointWriter Open(long step)
    {
        CheckpointWriter? first = null;
        var folder = SharedWork.OnFirst(_trainer.World, "checkpoint", [], _ => (first = CheckpointWriter.Create(_options.Root, step)).Folder);
        return first ?? CheckpointWriter.Join(_options.Root, step, folder);
    }

    /// A rank's file; null where it stores nothing.
    private unsafe StoredFile? Write(CheckpointWriter writer, int rank, Func<StateSlot, nint> memory)
    {
        if (_map.Of(rank) is not { Count: > 0 } slots)
            return null;
        var byName = slots.ToDictionary(slot => slot.Name, StringComparer.Ordinal);
        using var file = writer.Begin(rank, _map.Specs(rank));
        return CheckpointWriter.OnDisk(_options.Root, () =>
        {
            foreach (var tensor in file.Tensors)
                file.AppendStable((byte*)memory(byName[tensor.Name]), tensor.Bytes);
            return file.Finish();
        });
    }

    /// Once all processes have said which files are on disk, process 0 writes the manifest and gives the folder its name. Where one of them
    /// failed, all throw why.
    private void Commit(CheckpointWriter writer, CheckpointManifest manifest, IReadOnlyList<StoredFile> files, Exception? failure)
    {
        var world = _trainer.World;
        if (failure is not null && world.Processes == 1)
            ExceptionDispatchInfo.Throw(failure);
        SharedWork.OnFirst(world, "checkpoint", StoredFiles.Pack(world.Process, files, failure), all =>
        {
            StoredFile[] whole = [.. all.SelectMany(StoredFiles.Unpack).OrderBy(file => file.Name, StringComparer.Ordinal)];
            writer.RequireThere(whole);
            var kept = _options.Kept.Select(file => writer.Keep(file.Name, file.Bytes)).ToArray();
            writer.Commit(manifest with { Files = whole, Kept = kept }, _options.Keep);
            return "";
        });
    }
}

// Writes one checkpoint: files of tensors, then the manifest; the folder appears in one step.

using System.IO.Hashing;
using DeepSeekGraph.Runtime.Native;
using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// Until Commit nothing is there. Files may be written by several threads at once, each by one. The caller holds the root's claim.
/// Any failure to write is DSG0816.
internal sealed class CheckpointWriter : IDisposable
{
    private readonly StagedFolder? _stage;
    private readonly string _root;
    private readonly long _step;

    private CheckpointWriter(string root, long step, string folder, StagedFolder? stage) => (_root, _step, Folder, _stage) = (root, step, folder, stage);

    /// The folder that holds this checkpoint and others.
    public string Root => _root;

    /// Where files are written until Commit.
    public string Folder { get; }

    /// A checkpoint of a step that is there already is replaced whole.
    public static CheckpointWriter Create(string root, long step)
        => OnDisk(root, () =>
        {
            var stage = StagedFolder.Create(Path.Combine(root, CheckpointRoot.NameOf(step)), static _ => true);
            return new CheckpointWriter(root, step, stage.Path, stage);
        });

    /// For a process that adds its ranks' files to a folder that process 0 created, and will commit. DSG0866.
    public static CheckpointWriter Join(string root, long step, string folder)
        => Directory.Exists(folder) ? new CheckpointWriter(root, step, folder, null) : throw NotShared(root, $"'{folder}' is not there on this node");

    /// Does this process see the files that all have written?
    public void RequireThere(IEnumerable<StoredFile> files)
    {
        foreach (var file in files)
        {
            var info = new FileInfo(Path.Combine(Folder, file.Name));
            if (!info.Exists || info.Length != file.Bytes)
                throw NotShared(_root, $"rank 0 sees {(info.Exists ? $"{info.Length} bytes" : "nothing")} of '{file.Name}', of which its rank wrote {file.Bytes}");
        }
    }

    /// The file of a rank, for tensors of these specs.
    public RankFile Begin(int rank, IEnumerable<SafeTensorSpec> specs)
    {
        var name = CheckpointManifest.RankFile(rank);
        return OnDisk(_root, () => new RankFile(Path.Combine(Folder, name), name, SafeTensorsLayout.Of(specs, null)));
    }

    /// A small file that export gives back.
    public StoredFile Keep(string name, byte[] bytes)
    {
        if (!CheckpointManifest.MayBeKept(name))
            throw new ArgumentException($"'{name}' is no name of a kept file", nameof(name));
        return OnDisk(_root, () =>
        {
            WriteFile(name, bytes);
            return new StoredFile(name, bytes.Length, Checksum.Of(bytes));
        });
    }

    /// All to disk, the folder in its place, `latest` on it, and older ones away.
    public void Commit(CheckpointManifest manifest, int keep)
        => OnDisk(_root, () =>
        {
            WriteFile(CheckpointManifest.FileName, ManifestText.Write(manifest));
            (_stage ?? throw new InvalidOperationException("who did not create the folder does not commit it")).Commit();
            CheckpointRoot.SetLatest(_root, _step);
            CheckpointRoot.Prune(_root, keep, _step);
            return true;
        });

    public void Dispose() => _stage?.Dispose();

    /// Turns what the disk refuses into DSG0816.
    internal static T OnDisk<T>(string folder, Func<T> action)
    {
        try
        {
            return action();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentOutOfRangeException { ParamName: "value" })
        {
            // the last one is .NET's for a file beyond what system or user allow (EFBIG)
            throw DiagnosticException.Of(
                Codes.OutputUnwritable,
                folder,
                $"the checkpoint cannot be written: {e.Message}",
                "free some space, or write to another folder; checkpoints that were there before are untouched");
        }
    }

    private static DiagnosticException NotShared(string root, string what)
        => DiagnosticException.Of(
            Codes.FolderNotShared,
            root,
            $"the folder of checkpoints is not the same on all nodes: {what}",
            "save to a file system that all nodes share: --out DIR, or --set training.save=DIR");

    private void WriteFile(string name, byte[] bytes)
    {
        using var file = new FileStream(Path.Combine(Folder, name), FileMode.CreateNew, FileAccess.Write);
        file.Write(bytes);
        file.Flush(flushToDisk: true);
    }
}

/// One file of tensors, appended to from its first byte to its last, so that its checksum grows with it. Throws what the disk throws.
internal sealed unsafe class RankFile : IDisposable
{
    /// What is handed to the system at once: large enough for speed, small enough to be still in the cache when it is hashed.
    private const int Part = 1 << 20;

    /// What one of several threads writes at once.
    private const int Share = 1 << 21;

    private readonly Microsoft.Win32.SafeHandles.SafeFileHandle _file;
    private readonly XxHash128 _hash = new();
    private readonly List<Task> _writes = [];
    private readonly SafeTensorsLayout _layout;
    private readonly string _name;
    private long _at;

    internal RankFile(string path, string name, SafeTensorsLayout layout)
    {
        (_name, _layout) = (name, layout);
        _file = File.OpenHandle(path, FileMode.CreateNew, FileAccess.Write);
        try
        {
            Append(layout.Header);
        }
        catch
        {
            _file.Dispose();
            throw;
        }
    }

    /// In the order in which their bytes are appended.
    public IReadOnlyList<SafeTensorInfo> Tensors => _layout.Tensors;

    /// The next bytes.
    public void Append(ReadOnlySpan<byte> bytes)
    {
        for (var at = 0; at < bytes.Length; at += Part)
        {
            var part = bytes.Slice(at, Math.Min(Part, bytes.Length - at));
            _hash.Append(part);
            RandomAccess.Write(_file, part, _at);
            _at += part.Length;
        }
    }

    /// The next bytes, from memory of any size that stays as it is until Finish or Dispose: other threads write it while this one goes on.
    public void AppendStable(byte* start, long length)
    {
        for (long at = 0; at < length; at += Share)
        {
            var from = start + at;
            var (bytes, place) = ((int)Math.Min(Share, length - at), _at);
            _writes.Add(Task.Run(() => RandomAccess.Write(_file, new ReadOnlySpan<byte>(from, bytes), place)));
            for (var part = 0; part < bytes; part += Part)
                _hash.Append(new ReadOnlySpan<byte>(from + part, Math.Min(Part, bytes - part)));
            _at += bytes;
        }
    }

    /// On disk, with what the manifest says of it.
    public StoredFile Finish()
    {
        if (_at != _layout.FileBytes)
            throw new InvalidOperationException($"{_at} bytes of '{_name}' are written, it has {_layout.FileBytes}");
        Task.WhenAll(_writes).GetAwaiter().GetResult();
        RandomAccess.FlushToDisk(_file);
        return new StoredFile(_name, _at, Checksum.Text(_hash.GetCurrentHash()));
    }

    public void Dispose()
    {
        Task.WhenAll(_writes).ContinueWith(static _ => { }, CancellationToken.None, TaskContinuationOptions.None, TaskScheduler.Default).Wait();
        _file.Dispose();
    }
}

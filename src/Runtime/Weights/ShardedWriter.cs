// Writes a checkpoint tensor by tensor into shards of bounded size; the folder changes in one step, at the end.

using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using Microsoft.Win32.SafeHandles;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Weights;

/// What is written is declared first, so that headers and places are known; memory holds no more than the bytes in hand.
/// Until Commit the folder is as it was, whatever happens; other plain files of it stay. One thread at a time.
/// Mistakes of the caller are ArgumentException and InvalidOperationException, those of the disk DSG0816.
public sealed class ShardedWriter : IDisposable
{
    /// Largest shard where nothing else is said: 5 GB, as Hugging Face cuts them.
    public const long DefaultShardBytes = 5_000_000_000;

    private readonly StagedFolder _stage;
    private readonly string _folder;
    private readonly List<Shard> _shards = [];
    private readonly Dictionary<string, (Shard Shard, SafeTensorInfo Info)> _places = new(StringComparer.Ordinal);

    private ShardedWriter(string folder, StagedFolder stage) => (_folder, _stage) = (folder, stage);

    /// The file of each tensor.
    public IReadOnlyDictionary<string, string> Files
        => _places.ToDictionary(place => place.Key, place => place.Value.Shard.Name, StringComparer.Ordinal);

    /// Shards are filled in the order given up to `maxShardBytes` of data; a larger tensor has one for itself. One
    /// shard is named model.safetensors, more are numbered and have an index. DSG0815 for a folder that holds more than
    /// plain files, DSG0816 where it cannot be written or the disk has not enough room.
    public static ShardedWriter Create(
        string folder,
        IReadOnlyList<SafeTensorSpec> tensors,
        long maxShardBytes = DefaultShardBytes,
        IReadOnlyDictionary<string, string>? metadata = null)
    {
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(maxShardBytes);
        var layouts = Cut(tensors, maxShardBytes).Select(part => SafeTensorsLayout.Of(part, metadata)).ToList();
        return OnDisk(folder, () =>
        {
            var stage = StagedFolder.Create(folder, SafeTensorsIndex.IsWeights);
            var writer = new ShardedWriter(folder, stage);
            try
            {
                writer.Begin(layouts);
                return writer;
            }
            catch
            {
                writer.Dispose();
                throw;
            }
        });
    }

    /// A whole tensor, little-endian, row-major.
    public void Write(string name, ReadOnlySpan<byte> bytes)
    {
        var (_, info) = Place(name);
        if (bytes.Length != info.Bytes)
            throw new ArgumentException($"'{name}' has {info.Bytes} bytes, {bytes.Length} are given", nameof(bytes));
        WriteSlice(name, 0, bytes);
    }

    /// A whole tensor of the declared type, contiguous and of any size.
    public unsafe void Write(string name, Tensor values)
    {
        var (_, info) = Place(name);
        if (!values.is_contiguous() || values.dtype != SafeTensorTypes.ScalarTypeOf(info.DType) || values.numel() != info.Elements)
            throw new ArgumentException($"'{name}' is not {info.DType} [{string.Join(", ", info.Shape)}]", nameof(values));
        var start = (byte*)values.Pointer();
        const int part = 1 << 28;
        for (long at = 0; at < info.Bytes; at += part)
            WriteSlice(name, at, new ReadOnlySpan<byte>(start + at, (int)Math.Min(part, info.Bytes - at)));
    }

    /// Bytes [offset, offset + bytes.Length) of a tensor; parts may come in any order, each byte once.
    public void WriteSlice(string name, long offset, ReadOnlySpan<byte> bytes)
    {
        var (shard, info) = Place(name);
        ArgumentOutOfRangeException.ThrowIfNegative(offset);
        if (bytes.Length > info.Bytes - offset)
            throw new ArgumentException($"'{name}' has {info.Bytes} bytes, {bytes.Length} are given from {offset} on", nameof(bytes));
        shard.Cover(name, offset, bytes.Length);
        try
        {
            RandomAccess.Write(shard.Open(_stage.Path), bytes, shard.Layout.Header.Length + info.Begin + offset);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Unwritable(_folder, e);
        }
    }

    /// The whole tensor on the file's own memory, zero at first, to be filled slice by slice (an expert's weights in the
    /// bank of all); dispose it before Commit.
    public Tensor Map(string name)
    {
        var (shard, info) = Place(name);
        shard.Cover(name, 0, info.Bytes);
        return OnDisk(_folder, () =>
        {
            var type = SafeTensorTypes.ScalarTypeOf(info.DType);
            return info.Bytes == 0
                ? empty([.. info.Shape], dtype: type)
                : shard.Map(_stage.Path).Tensor(shard.Layout.Header.Length + info.Begin, info.Shape, type);
        });
    }

    /// Another file of the folder (config.json, tokenizer.json); it replaces one of that name.
    public void AddFile(string name, ReadOnlySpan<byte> bytes)
    {
        if (Path.GetFileName(name) != name || name is "" or "." or ".." || SafeTensorsIndex.IsWeights(name))
            throw new ArgumentException($"'{name}' is no plain name, or that of a file of weights", nameof(name));
        try
        {
            WriteFile(name, bytes);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Unwritable(_folder, e);
        }
    }

    /// Everything to disk, then the folder in its place; InvalidOperationException while a tensor is not whole.
    public void Commit()
    {
        foreach (var shard in _shards)
            shard.RequireWhole();
        OnDisk(_folder, () =>
        {
            foreach (var shard in _shards)
                shard.Close(_stage.Path);
            if (_shards.Count > 1)
                WriteFile(SafeTensorsIndex.FileName, SafeTensorsIndex.Write(Files, _places.Values.Sum(p => p.Info.Bytes)));
            _stage.Commit();
            return true;
        });
    }

    /// Without a Commit before, the folder is as it was.
    public void Dispose()
    {
        foreach (var shard in _shards)
            shard.Drop();
        _stage.Dispose();
    }

    private static List<List<SafeTensorSpec>> Cut(IReadOnlyList<SafeTensorSpec> tensors, long most)
    {
        var names = new HashSet<string>(StringComparer.Ordinal);
        List<List<SafeTensorSpec>> parts = [[]];
        var filled = 0L;
        foreach (var tensor in tensors)
        {
            if (!names.Add(tensor.Name))
                throw new ArgumentException($"the name '{tensor.Name}' is given twice", nameof(tensors));
            if (parts[^1].Count > 0 && tensor.Bytes > most - filled)
            {
                parts.Add([]);
                filled = 0;
            }

            parts[^1].Add(tensor);
            filled += tensor.Bytes;
        }

        return parts;
    }

    private void Begin(List<SafeTensorsLayout> layouts)
    {
        for (var i = 0; i < layouts.Count; i++)
        {
            var shard = new Shard(SafeTensorsIndex.ShardName(i, layouts.Count), layouts[i]);
            _shards.Add(shard);
            foreach (var tensor in shard.Layout.Tensors)
                _places.Add(tensor.Name, (shard, tensor));
        }

        var (needed, free) = (layouts.Sum(layout => layout.FileBytes), new DriveInfo(_stage.Path).AvailableFreeSpace);
        if (needed > free)
            throw new IOException($"{needed} bytes are needed, the disk has {free} free");
    }

    private void WriteFile(string name, ReadOnlySpan<byte> bytes)
    {
        using var file = new FileStream(Path.Combine(_stage.Path, name), FileMode.Create, FileAccess.Write);
        file.Write(bytes);
        file.Flush(flushToDisk: true);
    }

    private (Shard Shard, SafeTensorInfo Info) Place(string name)
        => _places.TryGetValue(name, out var place) ? place : throw new ArgumentException($"'{name}' was not declared", nameof(name));

    private static T OnDisk<T>(string folder, Func<T> action)
    {
        try
        {
            return action();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Unwritable(folder, e);
        }
    }

    private static DiagnosticException Unwritable(string folder, Exception e) => DiagnosticException.Of(
        Codes.OutputUnwritable,
        folder,
        $"the checkpoint cannot be written: {e.Message}",
        "free some space, or write to another folder; what was there before is untouched");

    /// One file that is being written.
    private sealed class Shard(string name, SafeTensorsLayout layout)
    {
        private readonly Dictionary<string, SortedList<long, long>> _covered = new(StringComparer.Ordinal);
        private SafeFileHandle? _file;
        private Mapping? _map;

        public string Name => name;

        public SafeTensorsLayout Layout => layout;

        /// The file with its header and the disk space of all its tensors.
        public SafeFileHandle Open(string folder)
        {
            if (_file is not null)
                return _file;
            var file = File.OpenHandle(Path.Combine(folder, name), FileMode.CreateNew, FileAccess.ReadWrite);
            try
            {
                FileCalls.Reserve(file, layout.FileBytes);
                RandomAccess.Write(file, layout.Header, 0);
                return _file = file;
            }
            catch
            {
                file.Dispose();
                throw;
            }
        }

        public Mapping Map(string folder)
        {
            Open(folder);
            return _map ??= Mapping.Open(
                new FileStream(Path.Combine(folder, name), FileMode.Open, FileAccess.ReadWrite, FileShare.ReadWrite),
                layout.FileBytes,
                shared: true);
        }

        /// Notes that bytes [begin, begin + length) of a tensor are written.
        public void Cover(string tensor, long begin, long length)
        {
            if (length == 0)
                return;
            if (!_covered.TryGetValue(tensor, out var parts))
                _covered.Add(tensor, parts = []);
            foreach (var (from, to) in parts)
            {
                if (begin < to && from < begin + length)
                    throw new InvalidOperationException($"bytes {Math.Max(begin, from)} and on of '{tensor}' are written twice");
            }

            // Touching parts become one, so that slices in order stay one entry.
            var (first, last) = (begin, begin + length);
            if (parts.FirstOrDefault(part => part.Value == first) is { Value: > 0 } left)
            {
                parts.Remove(left.Key);
                first = left.Key;
            }

            if (parts.Remove(last, out var end))
                last = end;
            parts.Add(first, last);
        }

        public void RequireWhole()
        {
            if (_map is { Tensors: > 0 })
                throw new InvalidOperationException($"a mapped tensor of '{name}' is still in use: dispose it first");
            foreach (var tensor in layout.Tensors)
            {
                if (tensor.Bytes > 0
                    && !(_covered.TryGetValue(tensor.Name, out var parts) && parts.TryGetValue(0, out var end) && end == tensor.Bytes))
                    throw new InvalidOperationException($"'{tensor.Name}' is not written whole");
            }
        }

        public void Close(string folder)
        {
            var file = Open(folder);
            _map?.Flush();
            RandomAccess.FlushToDisk(file);
            Drop();
        }

        public void Drop()
        {
            _map?.Dispose();
            _file?.Dispose();
        }
    }
}

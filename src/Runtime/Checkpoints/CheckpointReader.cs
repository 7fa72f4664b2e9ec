// An open checkpoint: manifest, mapped files whose checksums hold, and boxes of global tensors out of their blocks.

using System.Text;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Weights;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// Reads are safe from several threads. Pages are read on first use, so that each rank reads what it asks for.
public sealed unsafe class CheckpointReader : IDisposable
{
    private const long MostKept = 64_000_000;

    private readonly List<SafeTensorsFile> _files = [];
    private readonly Dictionary<string, StoredTensor> _tensors;

    private CheckpointReader(string folder, CheckpointManifest manifest)
    {
        Folder = folder;
        Manifest = manifest;
        _tensors = manifest.Tensors.ToDictionary(tensor => tensor.Name, StringComparer.Ordinal);
    }

    /// The checkpoint's own folder.
    public string Folder { get; }

    public CheckpointManifest Manifest { get; }

    /// Opens iter_N, or what a root or a run's folder says; every file is read once for its checksum. DSG0840 to DSG0843.
    public static CheckpointReader Open(string path) => Open(CheckpointRoot.Resolve(path), 0, 1);

    /// The same by all processes of a job, of the one that process 0 finds; each reads its share of the files for their checksums.
    public static CheckpointReader Open(string path, IWorld world)
    {
        var folder = Encoding.UTF8.GetString(
            world.Meet("resume", [], _ => Encoding.UTF8.GetBytes(Path.GetFullPath(CheckpointRoot.Resolve(path))), world.Stop));
        var reader = Open(folder, world.Process, world.Processes);
        try
        {
            world.Meet("resume", [], static _ => [], world.Stop);
            return reader;
        }
        catch
        {
            reader.Dispose();
            throw;
        }
    }

    /// Verifies every `parts`th file from `part` on.
    private static CheckpointReader Open(string folder, int part, int parts)
    {
        var place = Path.Combine(folder, CheckpointManifest.FileName);
        var reader = new CheckpointReader(folder, ManifestText.Read(Bytes(place, ManifestText.MostBytes), place));
        try
        {
            foreach (var file in reader.Manifest.Files)
                reader._files.Add(reader.OpenFile(file));
            Parallel.ForEach(
                reader.Manifest.Files.Zip(reader._files).Where((_, i) => i % parts == part),
                pair => reader.RequireChecksum(pair.First, pair.Second));
            foreach (var tensor in reader.Manifest.Tensors)
                reader.RequirePlaces(tensor);
            return reader;
        }
        catch (AggregateException e) when (e.InnerException is DiagnosticException first)
        {
            reader.Dispose();
            throw first;
        }
        catch
        {
            reader.Dispose();
            throw;
        }
    }

    /// A tensor of the manifest; null when it has none of this name.
    public StoredTensor? Find(string name) => _tensors.GetValueOrDefault(name);

    /// A kept file, its checksum verified; null when there is none of this name. DSG0843.
    public byte[]? Kept(string name)
    {
        if (Manifest.Kept.FirstOrDefault(file => file.Name == name) is not { } kept)
            return null;
        var bytes = Bytes(Path.Combine(Folder, name), MostKept);
        return bytes.Length == kept.Bytes && Checksum.Of(bytes) == kept.Checksum
            ? bytes
            : throw Damaged(name, "its bytes are not those that were written");
    }

    /// The elements of a box of a tensor, row-major, into memory for elements of type `to`.
    public void CopyBox(StoredTensor tensor, Shard box, string to, void* target)
    {
        foreach (var (index, block, common) in tensor.Grid.Overlapping(box))
        {
            var source = (void*)_files[tensor.Files[index]].Pointer(tensor.Name);
            BlockGrid.ForEachRun(common, block, box, (from, at, n) => Elements.Copy(tensor.Dtype, source, from, to, target, at, n));
        }
    }

    /// The bytes of a box of a tensor, row-major, in its own element type; at most 2 GB.
    public byte[] Box(StoredTensor tensor, Shard box)
    {
        var bytes = new byte[box.Extents.Aggregate(SafeTensorTypes.BytesOf(tensor.Dtype), (n, extent) => checked(n * extent))];
        fixed (byte* target = bytes)
            CopyBox(tensor, box, tensor.Dtype, target);
        return bytes;
    }

    /// A box of a tensor in another shape of as many elements: on the mapped file where it lies there in one piece, else copied.
    public Tensor Tensor(StoredTensor tensor, Shard box, IReadOnlyList<int> shape)
    {
        LibTorch.Load();
        long[] extents = [.. shape.Select(e => (long)e)];
        if (tensor.Grid.Overlapping(box).Take(2).ToArray() is [var (index, block, common)])
        {
            var (runs, first) = (0, 0L);
            BlockGrid.ForEachRun(common, block, box, (from, _, _) => (runs, first) = (runs + 1, from));
            if (runs == 1)
            {
                using var stored = _files[tensor.Files[index]].Tensor(tensor.Name);
                using var flat = stored.view(-1);
                using var part = flat.narrow(0, first, extents.Aggregate(1L, (n, extent) => n * extent));
                return part.view(extents);
            }
        }

        var copy = empty(extents, dtype: SafeTensorTypes.ScalarTypeOf(tensor.Dtype));
        CopyBox(tensor, box, tensor.Dtype, copy.Pointer());
        return copy;
    }

    public void Dispose()
    {
        foreach (var file in _files)
            file.Dispose();
    }

    /// At most so many bytes of a plain file.
    private static byte[] Bytes(string path, long most)
    {
        try
        {
            if (FileCalls.IsSpecial(path) || new FileInfo(path) is { LinkTarget: not null } or { Length: > int.MaxValue })
                throw new IOException("it is no regular file");
            var length = new FileInfo(path).Length;
            return length <= most ? File.ReadAllBytes(path) : throw new IOException($"it has {length} bytes, more than {most}");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw DiagnosticException.Of(
                Codes.CheckpointDamaged, path, $"the checkpoint's file cannot be read: {e.Message}", "copy the checkpoint again, or give another");
        }
    }

    private SafeTensorsFile OpenFile(StoredFile file)
    {
        var path = Path.Combine(Folder, file.Name);
        var info = new FileInfo(path);
        if (!info.Exists || info.LinkTarget is not null || info.Length != file.Bytes)
        {
            throw Damaged(
                file.Name,
                !info.Exists ? "it is missing" : info.LinkTarget is not null ? "it is a link" : $"it has {info.Length} bytes, {file.Bytes} were written");
        }

        return SafeTensorsFile.Open(path);
    }

    private void RequireChecksum(StoredFile file, SafeTensorsFile open)
    {
        var found = Checksum.Of((byte*)open.Start, open.FileBytes);
        if (found != file.Checksum)
            throw Damaged(file.Name, $"its checksum is {found}, that of what was written {file.Checksum}");
    }

    private void RequirePlaces(StoredTensor tensor)
    {
        foreach (var file in tensor.Files.Select(place => _files[place]))
        {
            if (file.Contains(tensor.Name) && file.Info(tensor.Name) is { } info && info.DType == tensor.Dtype
                && info.Shape.SequenceEqual(tensor.Block.Select(e => (long)e)))
                continue;
            throw ManifestText.Malformed(
                Path.Combine(Folder, CheckpointManifest.FileName),
                $"'{Path.GetFileName(file.Path)}' has no block of '{tensor.Name}' of {tensor.Dtype} [{string.Join(", ", tensor.Block)}]");
        }
    }

    private DiagnosticException Damaged(string file, string what) => DiagnosticException.Of(
        Codes.CheckpointDamaged,
        Path.Combine(Folder, file),
        $"the checkpoint's file '{file}' is damaged: {what}",
        "resume from another checkpoint, or copy this one again");
}

// The weights of a checkpoint: one safetensors file, or the shards that an index names, as one set of tensors.

using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Weights;

/// All files open and mapped, nothing read. Every tensor is in exactly the file that the index names: DSG0825 otherwise.
public sealed class SafeTensorsSet : IDisposable
{
    private readonly Dictionary<string, SafeTensorsFile> _holders = new(StringComparer.Ordinal);
    private readonly List<SafeTensorsFile> _files = [];

    private SafeTensorsSet(string path) => Path = path;

    /// As given to Open.
    public string Path { get; }

    /// Every file, by ordinal name.
    public IReadOnlyList<SafeTensorsFile> Files => _files;

    /// Every tensor's name, in ordinal order.
    public IReadOnlyList<string> Names { get; private set; } = [];

    /// Opens a checkpoint's folder, its index, or a single safetensors file; DSG0820, DSG0821, DSG0824, DSG0825.
    public static SafeTensorsSet Open(string path)
    {
        var set = new SafeTensorsSet(path);
        try
        {
            var weights = Directory.Exists(path) ? In(path) : path;
            if (weights.EndsWith(".json", StringComparison.OrdinalIgnoreCase))
                set.AddIndexed(weights);
            else
                set.Add(SafeTensorsFile.Open(weights));
            set.Names = set._holders.Keys.Order(StringComparer.Ordinal).ToArray();
            return set;
        }
        catch
        {
            set.Dispose();
            throw;
        }
    }

    /// True when the checkpoint has a tensor of this name.
    public bool Contains(string name) => _holders.ContainsKey(name);

    /// The file that holds a tensor; DSG0822 when none does.
    public SafeTensorsFile FileOf(string name)
        => _holders.TryGetValue(name, out var file)
            ? file
            : throw DiagnosticException.Of(
                Codes.SafeTensorsNoTensor,
                Path,
                $"the checkpoint has no tensor '{SafeTensorsHeader.Clip(name)}' among its {Names.Count}",
                Names.Count == 0 ? "" : $"tensors begin with {string.Join(", ", Names.Take(3).Select(SafeTensorsHeader.Clip))}");

    /// Type, shape and place of a tensor.
    public SafeTensorInfo Info(string name) => FileOf(name).Info(name);

    /// The tensor on mapped memory; SafeTensorsFile.Tensor has the rules.
    public Tensor Tensor(string name) => FileOf(name).Tensor(name);

    public void Dispose()
    {
        foreach (var file in _files)
            file.Dispose();
    }

    /// The index or the single file of a folder; both would be two checkpoints.
    private static string In(string folder)
    {
        folder = Real(folder);
        var index = System.IO.Path.Combine(folder, SafeTensorsIndex.FileName);
        var single = System.IO.Path.Combine(folder, SafeTensorsIndex.SingleFile);
        RequireInside(folder, index);
        RequireInside(folder, single);
        return (File.Exists(index), File.Exists(single)) switch
        {
            (true, false) => index,
            (false, true) => single,
            (true, true) => throw Disagree(
                folder,
                $"the folder holds both {SafeTensorsIndex.FileName} and {SafeTensorsIndex.SingleFile}",
                "remove the one that is not meant, or give its path"),
            (false, false) => throw DiagnosticException.Of(
                Codes.SafeTensorsUnreadable,
                folder,
                $"the folder has no {SafeTensorsIndex.FileName} and no {SafeTensorsIndex.SingleFile}",
                "give the folder of a checkpoint, or a .safetensors file"),
        };
    }

    private void AddIndexed(string indexPath)
    {
        var index = SafeTensorsIndex.Read(indexPath);
        var folder = Real(System.IO.Path.GetDirectoryName(System.IO.Path.GetFullPath(indexPath))!);
        foreach (var name in index.Files.Values.Distinct(StringComparer.Ordinal).Order(StringComparer.Ordinal))
        {
            var path = System.IO.Path.Combine(folder, name);
            if (!File.Exists(path))
                throw Disagree(indexPath, $"the index names '{name}', which is not beside it", "copy or download that file too");
            RequireInside(folder, path);
            Add(SafeTensorsFile.Open(path));
        }

        // Each tensor is in one file by now; is it the one that the index names, and does the index name it?
        foreach (var (tensor, name) in index.Files)
        {
            var found = _holders.TryGetValue(tensor, out var file) ? System.IO.Path.GetFileName(file.Path) : null;
            if (found != name)
            {
                throw Disagree(
                    indexPath,
                    $"the index says that '{SafeTensorsHeader.Clip(tensor)}' is in '{name}', it is {(found is null ? "in no file" : $"in '{found}'")}",
                    "the index belongs to other files: copy or download both again");
            }
        }

        if (_holders.Keys.FirstOrDefault(tensor => !index.Files.ContainsKey(tensor)) is { } extra)
        {
            throw Disagree(
                indexPath,
                $"'{System.IO.Path.GetFileName(_holders[extra].Path)}' holds '{SafeTensorsHeader.Clip(extra)}', which the index does not name",
                "the index belongs to other files: copy or download both again");
        }
    }

    private void Add(SafeTensorsFile file)
    {
        _files.Add(file);
        foreach (var name in file.Names)
        {
            if (!_holders.TryAdd(name, file))
            {
                throw Disagree(
                    Path,
                    $"the tensor '{SafeTensorsHeader.Clip(name)}' is in both '{System.IO.Path.GetFileName(_holders[name].Path)}' "
                        + $"and '{System.IO.Path.GetFileName(file.Path)}'",
                    "the files belong to different checkpoints: copy or download them again");
            }
        }
    }

    /// A link may lead to a file of the same folder, or into the blobs of Hugging Face's download cache
    /// (models--X/snapshots/REVISION/FILE -> models--X/blobs/HASH); nowhere else.
    private static void RequireInside(string folder, string path)
    {
        if (new FileInfo(path).LinkTarget is null || File.ResolveLinkTarget(path, returnFinalTarget: true) is not { } target)
            return;
        var holder = System.IO.Path.GetDirectoryName(target.FullName);
        var snapshots = System.IO.Path.GetDirectoryName(folder);
        var blobs = System.IO.Path.GetFileName(snapshots) == "snapshots"
            ? System.IO.Path.Combine(System.IO.Path.GetDirectoryName(snapshots)!, "blobs")
            : null;
        if (holder != folder && holder != blobs)
        {
            throw Disagree(
                path,
                $"the file is a link to '{target.FullName}', outside its folder",
                "put the file itself there; links into the blobs of Hugging Face's cache are followed");
        }
    }

    /// The folder itself where it is given by a link, since links in it are relative to it.
    private static string Real(string folder)
        => System.IO.Path.TrimEndingDirectorySeparator(
            new DirectoryInfo(folder).LinkTarget is null
                ? System.IO.Path.GetFullPath(folder)
                : Directory.ResolveLinkTarget(folder, returnFinalTarget: true)!.FullName);

    private static DiagnosticException Disagree(string path, string what, string help)
        => DiagnosticException.Of(Codes.SafeTensorsShards, path, what, help);
}

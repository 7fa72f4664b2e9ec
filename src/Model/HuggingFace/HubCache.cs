// Where a checkpoint lies: a folder, or a name of the Hugging Face hub that its download cache has.

using System.Text.RegularExpressions;

namespace DeepSeekGraph.Models.HuggingFace;

/// Reads the cache of huggingface_hub: models--ORG--NAME/refs/main names the revision, snapshots/REVISION is the folder.
internal static partial class HubCache
{
    /// The folder of a path or hub name; DSG0707 with the command that downloads it. Nothing is downloaded here.
    public static string FolderOf(string pathOrName)
    {
        if (Directory.Exists(pathOrName))
            return pathOrName;
        if (!HubName().IsMatch(pathOrName) || pathOrName.Contains("..", StringComparison.Ordinal))
        {
            throw Missing(
                pathOrName,
                $"there is no folder '{pathOrName}'",
                "give the folder of a checkpoint, with config.json and *.safetensors, or a hub name such as "
                    + "deepseek-ai/DeepSeek-V3");
        }

        var model = Path.Combine(Folder, "models--" + pathOrName.Replace("/", "--", StringComparison.Ordinal));
        var reference = Path.Combine(model, "refs", "main");
        var revision = File.Exists(reference) ? File.ReadAllText(reference).Trim() : "";
        var snapshot = Path.Combine(model, "snapshots", revision);
        return Revision().IsMatch(revision) && Directory.Exists(snapshot)
            ? snapshot
            : throw Missing(
                pathOrName,
                $"'{pathOrName}' is no folder, and the cache {Folder} has no main revision of a model of that name",
                $"hf download {pathOrName}");
    }

    /// HF_HUB_CACHE, or hub in HF_HOME, or huggingface/hub in XDG_CACHE_HOME, or ~/.cache/huggingface/hub.
    private static string Folder
        => Environment("HF_HUB_CACHE") is { } cache ? cache
            : Environment("HF_HOME") is { } home ? Path.Combine(home, "hub")
            : Path.Combine(
                Environment("XDG_CACHE_HOME")
                    ?? Path.Combine(System.Environment.GetFolderPath(System.Environment.SpecialFolder.UserProfile), ".cache"),
                "huggingface",
                "hub");

    private static string? Environment(string name)
        => System.Environment.GetEnvironmentVariable(name) is { Length: > 0 } value ? value : null;

    private static DiagnosticException Missing(string at, string message, string help)
        => DiagnosticException.Of(Codes.CheckpointMissing, at, message, help);

    [GeneratedRegex(@"^[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*)?\z")]
    private static partial Regex HubName();

    [GeneratedRegex(@"^[0-9a-f]{7,64}\z")]
    private static partial Regex Revision();
}

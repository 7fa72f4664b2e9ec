// The small files of a model that go along with its checkpoints, so that an export has them.

using DeepSeekGraph.Models;
using DeepSeekGraph.Models.HuggingFace;

namespace DeepSeekGraph.Cli;

internal static class KeptFiles
{
    /// Those of the checkpoint that is resumed, and of the tokenizer that the run uses.
    public static IReadOnlyList<(string Name, byte[] Bytes)> Of(TrainingSettings settings, Resumed? resumed)
    {
        var files = new SortedDictionary<string, byte[]>(StringComparer.Ordinal);
        foreach (var kept in resumed?.Manifest.Kept ?? [])
            files[kept.Name] = resumed!.Checkpoint.Kept(kept.Name)!;
        if (settings.Tokenizer is { } path)
        {
            var folder = Directory.Exists(path) ? path : Path.GetDirectoryName(Path.GetFullPath(path))!;
            foreach (var (name, bytes) in SmallFiles.In(folder, SmallFiles.OfText.Where(name => name.StartsWith("tokenizer", StringComparison.Ordinal))))
                files[name] = bytes;
        }

        return [.. files.Select(file => (file.Key, file.Value))];
    }
}

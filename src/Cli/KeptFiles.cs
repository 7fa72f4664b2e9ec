// The small files of a model that go along with its checkpoints, so that an export has them.

using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class KeptFiles
{
    private const long MostBytes = 32_000_000;

    /// What a published checkpoint has beside its weights, by name; code is never taken along.
    private static readonly string[] s_names =
    [
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "README.md", "LICENSE", "LICENSE-MODEL", "LICENSE-CODE",
    ];

    private static readonly string[] s_ofTokenizer = [.. s_names.Where(name => name.StartsWith("tokenizer", StringComparison.Ordinal))];

    /// Those of the checkpoint that is resumed, and of the tokenizer that the run uses.
    public static IReadOnlyList<(string Name, byte[] Bytes)> Of(TrainingSettings settings, Resumed? resumed)
    {
        var files = new SortedDictionary<string, byte[]>(StringComparer.Ordinal);
        foreach (var kept in resumed?.Manifest.Kept ?? [])
            files[kept.Name] = resumed!.Checkpoint.Kept(kept.Name)!;
        if (settings.Tokenizer is { } path)
        {
            var folder = Directory.Exists(path) ? path : Path.GetDirectoryName(Path.GetFullPath(path))!;
            foreach (var (name, bytes) in In(folder, s_ofTokenizer))
                files[name] = bytes;
        }

        return [.. files.Select(file => (file.Key, file.Value))];
    }

    /// Those of a published checkpoint's folder.
    public static IReadOnlyList<(string Name, byte[] Bytes)> In(string folder) => [.. In(folder, s_names)];

    /// Plain files of moderate size; links of Hugging Face's download cache are followed.
    private static IEnumerable<(string, byte[])> In(string folder, IEnumerable<string> names)
    {
        foreach (var name in names)
        {
            var file = new FileInfo(Path.Combine(folder, name));
            if (!file.Exists || file.Attributes.HasFlag(FileAttributes.Device))
                continue;
            var real = file.ResolveLinkTarget(returnFinalTarget: true) as FileInfo ?? file;
            if (real.Exists && real.Length <= MostBytes)
                yield return (name, File.ReadAllBytes(real.FullName));
        }
    }
}

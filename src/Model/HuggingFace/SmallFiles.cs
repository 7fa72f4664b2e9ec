// The small files beside the weights of a published checkpoint: what makes them usable elsewhere. Code is never taken along.

namespace DeepSeekGraph.Models.HuggingFace;

/// By name, in the order of the names asked for.
public static class SmallFiles
{
    private const long MostBytes = 32_000_000;

    /// How text becomes ids and ends.
    public static IReadOnlyList<string> OfText { get; } =
        ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

    /// All that is taken along.
    public static IReadOnlyList<string> All { get; } =
        ["config.json", .. OfText, "README.md", "LICENSE", "LICENSE-MODEL", "LICENSE-CODE"];

    /// Plain files of moderate size; links of Hugging Face's download cache are followed.
    public static IEnumerable<(string Name, byte[] Bytes)> In(string folder, IEnumerable<string> names)
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

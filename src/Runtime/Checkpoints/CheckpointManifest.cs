// What a checkpoint holds: manifest.json as data; ManifestText reads and writes it.

using System.Text.RegularExpressions;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// A file beside the manifest: its bytes, and their XXH128 as 32 hexadecimal digits.
public sealed record StoredFile(string Name, long Bytes, string Checksum);

/// The data that a run read, so that a resumed one can tell whether it reads the same.
public sealed record CheckpointData(string Tokenizer, long Tokens, string Checksum, int SequenceLength);

/// A global tensor, cut into equal blocks: those of a grid of Shape / Block, in row-major order, lie in Files (places in the
/// manifest's list), each under the tensor's name. So no block can be missing, overlap another or lie outside.
/// Kind: "parameter" or "optimizer"; Dtype as safetensors has it.
public sealed record StoredTensor(
    string Name, string Kind, string Dtype, IReadOnlyList<int> Shape, IReadOnlyList<int> Block, IReadOnlyList<int> Files)
{
    public const string Parameter = "parameter";
    public const string Optimizer = "optimizer";

    /// Where its blocks lie.
    internal BlockGrid Grid => new(Shape, Block);
}

/// Everything about a checkpoint but the numbers.
public sealed partial record CheckpointManifest
{
    /// The only version there is; raised when a field is added, changed or dropped.
    public const int CurrentVersion = 1;

    public const string FileName = "manifest.json";

    public required int Version { get; init; }

    /// Steps trained.
    public required long Step { get; init; }

    /// Sequences read from the data so far: where the next step begins.
    public required long Sequences { get; init; }

    /// Of initial weights and of the order of the data; there is no other random state.
    public required ulong Seed { get; init; }

    /// Null where nothing was trained.
    public required CheckpointData? Data { get; init; }

    /// Recipe and model of the plan, `key=value` lines.
    public required IReadOnlyList<string> Recipe { get; init; }

    /// Settings of the run, `key=value` lines; none for imported weights.
    public required IReadOnlyList<string> Training { get; init; }

    /// Files of tensors, by rank.
    public required IReadOnlyList<StoredFile> Files { get; init; }

    /// Small files that export gives back: config.json, tokenizer.json, ...
    public required IReadOnlyList<StoredFile> Kept { get; init; }

    /// In ordinal order of their names.
    public required IReadOnlyList<StoredTensor> Tensors { get; init; }

    /// The file of a rank's tensors.
    public static string RankFile(int rank) => $"rank_{rank:D5}.safetensors";

    internal static bool IsRankFile(string name) => RankFileName().IsMatch(name);

    /// A plain name that no other file of the folder has, and that nothing runs.
    public static bool MayBeKept(string name)
        => KeptName().IsMatch(name)
            && name != FileName
            && !name.EndsWith(".safetensors", StringComparison.OrdinalIgnoreCase)
            && !name.EndsWith(".py", StringComparison.OrdinalIgnoreCase);

    [GeneratedRegex(@"^rank_\d{5,9}\.safetensors\z")]
    private static partial Regex RankFileName();

    [GeneratedRegex(@"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\z")]
    private static partial Regex KeptName();
}

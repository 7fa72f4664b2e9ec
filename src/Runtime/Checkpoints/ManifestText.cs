// manifest.json: JSON that closes with a checksum of itself, read as if an enemy had written it.

using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization;
using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// DSG0842 for another version, DSG0841 for anything else that is wrong; never another exception.
public static class ManifestText
{
    /// A checkpoint of 671B on 1024 ranks has about 3 MB.
    internal const long MostBytes = 256_000_000;

    private const int MostDepth = 8;
    private const int MostDims = 8;
    private const int MostName = 500;
    private const string Seal = "\n\"checksum\": \"";
    private const int DigestDigits = 32;

    private static readonly JsonSerializerOptions s_strict = new(JsonSerializerOptions.Strict)
    {
        PropertyNamingPolicy = JsonNamingPolicy.SnakeCaseLower,
        MaxDepth = MostDepth,
    };

    /// A line for each file and tensor.
    public static byte[] Write(CheckpointManifest manifest)
    {
        var text = new StringBuilder("{\n");
        Field("version", manifest.Version);
        Field("step", manifest.Step);
        Field("sequences", manifest.Sequences);
        Field("seed", manifest.Seed);
        Field("data", manifest.Data);
        Lines("recipe", manifest.Recipe);
        Lines("training", manifest.Training);
        Lines("files", manifest.Files);
        Lines("kept", manifest.Kept);
        Lines("tensors", manifest.Tensors);
        text.Length -= 1;
        return Sealed(text.ToString());

        void Field<T>(string name, T value)
            => text.Append('"').Append(name).Append("\": ").Append(JsonSerializer.Serialize(value, s_strict)).Append(",\n");

        void Lines<T>(string name, IReadOnlyList<T> values)
        {
            var lines = values.Select(value => "\n  " + JsonSerializer.Serialize(value, s_strict));
            text.Append('"').Append(name).Append("\": [").AppendJoin(',', lines).Append("],\n");
        }
    }

    /// The text up to and with its last comma, with its checksum behind.
    internal static byte[] Sealed(string text)
    {
        var bytes = Encoding.UTF8.GetBytes(text);
        return [.. bytes, .. Encoding.ASCII.GetBytes($"{Seal}{Checksum.Of(bytes)}\"\n}}\n")];
    }

    /// Reads a manifest and checks all that can be known without its files; `path` is for messages.
    public static CheckpointManifest Read(byte[] json, string path)
    {
        try
        {
            var version = Version(json);
            if (version != CheckpointManifest.CurrentVersion)
            {
                throw DiagnosticException.Of(
                    Codes.CheckpointVersion,
                    path,
                    $"the checkpoint is of version {version} of the format, this program reads version {CheckpointManifest.CurrentVersion}",
                    "use the version of dsg that wrote it");
            }

            RequireSeal(json);
            var manifest = JsonSerializer.Deserialize<Form>(json, s_strict)?.Manifest ?? throw new JsonException("it is null");
            Check(manifest);
            return manifest;
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException or OverflowException or NotSupportedException)
        {
            // InvalidOperationException: a string with half of a surrogate pair
            throw Malformed(path, e.Message.Split('\n')[0]);
        }
    }

    internal static DiagnosticException Malformed(string path, string what) => DiagnosticException.Of(
        Codes.CheckpointMalformed,
        path,
        $"the checkpoint is damaged: {SafeTensorsHeader.Clip(what)}",
        "copy it again, or resume from another one");

    /// Of another version nothing else may be known, not even how it is sealed.
    private static long Version(byte[] json)
    {
        var reader = new Utf8JsonReader(json, new JsonReaderOptions { MaxDepth = MostDepth });
        Require(reader.Read() && reader.TokenType == JsonTokenType.StartObject, "it is no JSON object");
        while (reader.Read() && reader.TokenType == JsonTokenType.PropertyName)
        {
            var found = reader.ValueTextEquals("version");
            Require(reader.Read(), "it ends early");
            if (found)
            {
                Require(reader.TokenType == JsonTokenType.Number && reader.TryGetInt64(out _), "its version is no whole number");
                return reader.GetInt64();
            }

            reader.Skip();
        }

        throw new JsonException("it has no version");
    }

    private static void RequireSeal(byte[] json)
    {
        var at = json.AsSpan().LastIndexOf(Encoding.ASCII.GetBytes(Seal));
        Require(at >= 0, "it does not close with its checksum");
        var digest = Encoding.ASCII.GetString(json.AsSpan(at + Seal.Length, Math.Min(DigestDigits, json.Length - at - Seal.Length)));
        Require(digest == Checksum.Of(json.AsSpan(0, at)), "its text is not what was written: the checksum differs");
    }

    private static void Check(CheckpointManifest manifest)
    {
        // the reader lets null stand in lists
        Require(
            !manifest.Recipe.Contains(null!) && !manifest.Training.Contains(null!) && !manifest.Files.Contains(null!)
                && !manifest.Kept.Contains(null!) && !manifest.Tensors.Contains(null!),
            "a list holds null");
        Require(manifest.Step >= 0, $"its step is {manifest.Step}");
        Require(manifest.Sequences >= 0, $"it has read {manifest.Sequences} sequences");
        Require(manifest.Data is null or { Tokens: >= 0, SequenceLength: >= 1 }, "its data has a size that is none");
        var names = new HashSet<string>(StringComparer.Ordinal);
        foreach (var file in manifest.Files.Concat(manifest.Kept))
        {
            Require(names.Add(file.Name), $"the file '{file.Name}' occurs twice");
            Require(file.Bytes >= 0, $"'{file.Name}' has {file.Bytes} bytes");
            Require(
                file.Checksum.Length == DigestDigits && file.Checksum.All(char.IsAsciiHexDigitLower),
                $"the checksum of '{file.Name}' is none");
        }

        foreach (var file in manifest.Files)
            Require(CheckpointManifest.IsRankFile(file.Name), $"'{file.Name}' is no name of a rank's file");
        foreach (var file in manifest.Kept)
            Require(CheckpointManifest.MayBeKept(file.Name), $"'{file.Name}' is no plain name of a kept file");
        names.Clear();
        foreach (var tensor in manifest.Tensors)
        {
            Require(tensor.Name.Length is > 0 and <= MostName && !tensor.Name.Any(char.IsControl), $"'{tensor.Name}' is no name");
            Require(names.Add(tensor.Name), $"the tensor '{tensor.Name}' occurs twice");
            CheckTensor(tensor, manifest.Files.Count);
        }
    }

    private static void CheckTensor(StoredTensor tensor, int files)
    {
        var name = tensor.Name;
        Require(tensor.Kind is StoredTensor.Parameter or StoredTensor.Optimizer, $"'{name}' is of the kind '{tensor.Kind}'");
        Require(Elements.IsKnown(tensor.Dtype), $"'{name}' has elements of '{tensor.Dtype}'");
        Require(
            tensor.Shape.Count == tensor.Block.Count && tensor.Shape.Count <= MostDims,
            $"'{name}' has {tensor.Shape.Count} dims, its blocks {tensor.Block.Count}, the most is {MostDims}");
        long bytes = SafeTensorTypes.BytesOf(tensor.Dtype);
        for (var dim = 0; dim < tensor.Shape.Count; dim++)
        {
            var (extent, block) = (tensor.Shape[dim], tensor.Block[dim]);
            Require(extent >= 1 && block >= 1 && extent % block == 0, $"an extent of {extent} of '{name}' is not cut into blocks of {block}");
            bytes = checked(bytes * extent);
        }

        var count = tensor.Grid.Count;
        Require(tensor.Files.Count == count, $"'{name}' has {count} blocks, {tensor.Files.Count} files are named for them");
        var seen = new HashSet<int>();
        foreach (var file in tensor.Files)
        {
            Require(file >= 0 && file < files, $"'{name}' is said to be in file {file} of {files}");
            Require(seen.Add(file), $"two blocks of '{name}' are said to be in file {file}");
        }
    }

    private static void Require(bool holds, string otherwise)
    {
        if (!holds)
            throw new JsonException(otherwise);
    }

    /// The fields of the text, its seal among them.
    private sealed record Form(
        int Version,
        long Step,
        long Sequences,
        ulong Seed,
        CheckpointData? Data,
        IReadOnlyList<string> Recipe,
        IReadOnlyList<string> Training,
        IReadOnlyList<StoredFile> Files,
        IReadOnlyList<StoredFile> Kept,
        IReadOnlyList<StoredTensor> Tensors,
        string Checksum)
    {
        [JsonIgnore]
        public CheckpointManifest Manifest => new()
        {
            Version = Version,
            Step = Step,
            Sequences = Sequences,
            Seed = Seed,
            Data = Data,
            Recipe = Recipe,
            Training = Training,
            Files = Files,
            Kept = Kept,
            Tensors = Tensors,
        };
    }
}

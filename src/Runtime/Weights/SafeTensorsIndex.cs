// model.safetensors.index.json: which file of a sharded checkpoint holds which tensor.

using System.Globalization;
using System.Text.Json;
using System.Text.RegularExpressions;

namespace DeepSeekGraph.Runtime.Weights;

/// File names by tensor name. Files are plain names beside the index: DSG0824 for any other.
public sealed partial class SafeTensorsIndex
{
    /// The name that Hugging Face gives it.
    public const string FileName = "model.safetensors.index.json";

    /// The name of a checkpoint of one file.
    public const string SingleFile = "model.safetensors";

    private const string Extension = ".safetensors";
    private const int MostDepth = 8;

    private SafeTensorsIndex(IReadOnlyDictionary<string, string> files) => Files = files;

    /// The file of each tensor.
    public IReadOnlyDictionary<string, string> Files { get; }

    /// Reads an index; DSG0820 when it cannot be opened, DSG0824 when it is damaged or names what is not beside it.
    /// `metadata` is not looked at: published totals do not always match their files.
    public static SafeTensorsIndex Read(string path)
    {
        try
        {
            if (Native.FileCalls.IsSpecial(path))
                throw new IOException("it is no regular file");
            var size = new FileInfo(path).Length;
            return size <= SafeTensorsHeader.MostBytes
                ? Parse(File.ReadAllBytes(path), path)
                : throw Malformed(path, $"it has {size} bytes, more than {SafeTensorsHeader.MostBytes}");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException or NotSupportedException)
        {
            throw DiagnosticException.Of(
                Codes.SafeTensorsUnreadable,
                path,
                $"the index of the checkpoint cannot be opened: {e.Message}",
                "check the path and its permissions");
        }
    }

    /// Reads an index from its bytes; `path` is for messages.
    public static SafeTensorsIndex Parse(byte[] json, string path)
    {
        try
        {
            var reader = new Utf8JsonReader(json, new JsonReaderOptions { MaxDepth = MostDepth });
            Expect(ref reader, JsonTokenType.StartObject, "the index");
            var seen = new HashSet<string>(StringComparer.Ordinal);
            Dictionary<string, string>? files = null;
            while (Next(ref reader) != JsonTokenType.EndObject)
            {
                var name = reader.GetString()!;
                if (!seen.Add(name))
                    throw new JsonException($"'{SafeTensorsHeader.Clip(name)}' occurs twice");
                if (name == "weight_map")
                    files = WeightMap(ref reader);
                else
                    reader.Skip();
            }

            reader.Read();
            return new SafeTensorsIndex(files ?? throw new JsonException("it has no weight_map"));
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException)
        {
            // InvalidOperationException: a string with half of a surrogate pair.
            throw Malformed(path, e.Message);
        }
    }

    /// The index of these files as JSON, names in ordinal order; `totalBytes` of all tensors.
    public static byte[] Write(IReadOnlyDictionary<string, string> files, long totalBytes)
    {
        using var buffer = new MemoryStream();
        using (var json = new Utf8JsonWriter(buffer, new JsonWriterOptions { Indented = true }))
        {
            json.WriteStartObject();
            json.WriteStartObject("metadata");
            json.WriteNumber("total_size", totalBytes);
            json.WriteEndObject();
            json.WriteStartObject("weight_map");
            foreach (var (name, file) in files.OrderBy(pair => pair.Key, StringComparer.Ordinal))
                json.WriteString(name, file);
            json.WriteEndObject();
            json.WriteEndObject();
        }

        buffer.WriteByte((byte)'\n');
        return buffer.ToArray();
    }

    /// The name of shard `index` of `count`, as DeepSeek writes them: model-00001-of-000163.safetensors.
    public static string ShardName(int index, int count)
        => count == 1
            ? SingleFile
            : string.Create(CultureInfo.InvariantCulture, $"model-{index + 1:D5}-of-{count:D6}{Extension}");

    /// Is this a file that a checkpoint's writer makes: shard, single file or index?
    public static bool IsWeights(string name) => name is FileName or SingleFile || Shard().IsMatch(name);

    private static Dictionary<string, string> WeightMap(ref Utf8JsonReader reader)
    {
        Expect(ref reader, JsonTokenType.StartObject, "weight_map");
        var files = new Dictionary<string, string>(StringComparer.Ordinal);
        while (Next(ref reader) != JsonTokenType.EndObject)
        {
            var tensor = reader.GetString()!;
            var shown = SafeTensorsHeader.Clip(tensor);
            Expect(ref reader, JsonTokenType.String, $"the file of '{shown}'");
            var file = reader.GetString()!;
            if (!IsPlain(file))
            {
                throw new JsonException(
                    $"'{shown}' is said to be in '{SafeTensorsHeader.Clip(file)}', which is no plain name of a {Extension} file");
            }

            if (!files.TryAdd(tensor, file))
                throw new JsonException($"the tensor '{shown}' occurs twice");
        }

        return files;
    }

    /// No path, so that an index cannot lead out of its folder.
    private static bool IsPlain(string file)
        => file.EndsWith(Extension, StringComparison.Ordinal)
            && file.Length is > 12 and <= 255
            && file.AsSpan().IndexOfAny("/\\:") < 0
            && !file.Any(char.IsControl);

    private static JsonTokenType Next(ref Utf8JsonReader reader)
        => reader.Read() ? reader.TokenType : throw new JsonException("it ends early");

    private static void Expect(ref Utf8JsonReader reader, JsonTokenType token, string what)
    {
        if (Next(ref reader) != token)
            throw new JsonException($"{what} is {reader.TokenType}, not {token}");
    }

    private static DiagnosticException Malformed(string path, string what) => DiagnosticException.Of(
        Codes.SafeTensorsIndex,
        path,
        $"the index of the checkpoint is damaged: {what}",
        $"it holds {{\"weight_map\": {{tensor: file}}}}, each file beside it; copy or download it again");

    [GeneratedRegex(@"^model-\d{5,}-of-\d{5,}\.safetensors\z")]
    private static partial Regex Shard();
}

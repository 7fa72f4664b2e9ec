// The header of a safetensors file: its length, its JSON, and every rule that the offsets must obey.

using System.Buffers.Binary;
using System.Text.Json;

namespace DeepSeekGraph.Runtime.Weights;

/// Tensors in order of their bytes, which fill the file from DataStart to its end without a gap.
internal sealed record SafeTensorsHeader(
    long DataStart, IReadOnlyList<SafeTensorInfo> Tensors, IReadOnlyDictionary<string, string> Metadata)
{
    /// The format's own limit.
    public const long MostBytes = 100_000_000;

    /// The name that is no tensor but the file's notes.
    public const string MetadataName = "__metadata__";

    private const int MostDepth = 4;

    /// Checks everything before anything is mapped; DSG0821 tells which rule is broken.
    public static SafeTensorsHeader Read(Stream file, string path)
    {
        Exception Bad(string what) => Malformed(path, what);
        if (file.Length < 8)
        {
            throw Bad($"the file has {file.Length} bytes, too few for the 8 of the header's length");
        }

        Span<byte> prefix = stackalloc byte[8];
        file.ReadExactly(prefix);
        var length = BinaryPrimitives.ReadUInt64LittleEndian(prefix);
        if (length > MostBytes)
        {
            throw Bad($"the header claims {length} bytes, the format allows {MostBytes}");
        }

        if ((long)length > file.Length - 8)
        {
            throw Bad($"the header claims {length} bytes, the file has {file.Length - 8} after its length");
        }

        var json = new byte[length];
        file.ReadExactly(json);
        var (tensors, metadata) = Parse(json, path);
        CheckPlaces(tensors, file.Length - 8 - (long)length, path);
        return new SafeTensorsHeader(8 + (long)length, tensors, metadata);
    }

    private static (List<SafeTensorInfo> Tensors, Dictionary<string, string> Metadata) Parse(byte[] json, string path)
    {
        var tensors = new List<SafeTensorInfo>();
        var metadata = new Dictionary<string, string>(StringComparer.Ordinal);
        var names = new HashSet<string>(StringComparer.Ordinal);
        try
        {
            using var document = JsonDocument.Parse(json, new JsonDocumentOptions { MaxDepth = MostDepth });
            foreach (var property in Object(document.RootElement, "the header").EnumerateObject())
            {
                var name = property.Name;
                if (!names.Add(name))
                {
                    throw new JsonException($"the name '{name}' occurs twice");
                }

                if (name != MetadataName)
                {
                    tensors.Add(Tensor(name, Object(property.Value, $"'{name}'")));
                    continue;
                }

                foreach (var note in Object(property.Value, MetadataName).EnumerateObject())
                {
                    metadata[note.Name] = Text(note.Value, $"{MetadataName} '{note.Name}'");
                }
            }
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException or OverflowException)
        {
            // InvalidOperationException: a string with half of a surrogate pair.
            throw Malformed(path, e.Message);
        }

        tensors.Sort((a, b) => (a.Begin, a.End).CompareTo((b.Begin, b.End)));
        return (tensors, metadata);
    }

    private static SafeTensorInfo Tensor(string name, JsonElement entry)
    {
        string? dtype = null;
        long[]? shape = null, offsets = null;
        foreach (var property in entry.EnumerateObject())
        {
            var what = $"{property.Name} of '{name}'";
            if (property.NameEquals("dtype") && dtype is null)
            {
                dtype = Text(property.Value, what);
            }
            else if (property.NameEquals("shape") && shape is null)
            {
                shape = Numbers(property.Value, what);
            }
            else if (property.NameEquals("data_offsets") && offsets is null)
            {
                offsets = Numbers(property.Value, what);
            }
            else
            {
                throw new JsonException($"{what} is unknown or occurs twice");
            }
        }

        if (dtype is null || shape is null || offsets is not [var begin, var end])
        {
            throw new JsonException($"'{name}' needs dtype, shape and two data_offsets");
        }

        var width = SafeTensorTypes.BytesOf(dtype);
        if (width == 0)
        {
            throw new JsonException($"dtype '{dtype}' of '{name}' is not known");
        }

        // A zero extent makes the product 0 even where other extents alone would overflow.
        var bytes = shape.Contains(0)
            ? 0
            : shape.Aggregate((long)width, (product, extent) => checked(product * extent));
        if (end < begin || end - begin != bytes)
        {
            throw new JsonException(
                $"'{name}' of {dtype} [{string.Join(", ", shape)}] needs {bytes} bytes, "
                + $"its data_offsets [{begin}, {end}] differ");
        }

        return new SafeTensorInfo(name, dtype, shape, begin, end);
    }

    private static void CheckPlaces(List<SafeTensorInfo> tensors, long dataBytes, string path)
    {
        var filled = 0L;
        var before = "the header";
        foreach (var tensor in tensors)
        {
            if (tensor.Begin != filled)
            {
                var fault = tensor.Begin < filled ? "overlaps" : "leaves a gap after";
                throw Malformed(
                    path,
                    $"'{tensor.Name}' at [{tensor.Begin}, {tensor.End}] {fault} {before}, which ends at {filled}");
            }

            filled = tensor.End;
            before = $"'{tensor.Name}'";
        }

        if (filled != dataBytes)
        {
            throw Malformed(path, $"the tensors fill {filled} bytes, the file has {dataBytes} after its header");
        }
    }

    private static JsonElement Object(JsonElement value, string what)
        => value.ValueKind == JsonValueKind.Object
            ? value
            : throw new JsonException($"{what} is {value.ValueKind}, not an object");

    private static string Text(JsonElement value, string what)
        => value.ValueKind == JsonValueKind.String
            ? value.GetString()!
            : throw new JsonException($"{what} is {value.ValueKind}, not a string");

    private static long[] Numbers(JsonElement value, string what)
    {
        if (value.ValueKind != JsonValueKind.Array)
        {
            throw new JsonException($"{what} is {value.ValueKind}, not an array");
        }

        return value.EnumerateArray()
            .Select(item => item.ValueKind == JsonValueKind.Number && item.TryGetInt64(out var number) && number >= 0
                ? number
                : throw new JsonException($"{what} holds {item}, not a whole number from 0 up"))
            .ToArray();
    }

    private static DiagnosticException Malformed(string path, string what) => DiagnosticException.Of(
        Codes.SafeTensorsMalformed,
        path,
        $"the safetensors file is damaged: {what}",
        "copy or download the file again; a file that was cut short ends like this");
}

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

    /// As many dims as LibTorch iterates over.
    public const int MostDims = 64;

    private const int MostDepth = 4;
    private const int MostShown = 200;

    /// The header's end and all data.
    public long FileBytes => DataStart + (Tensors.Count == 0 ? 0 : Tensors[^1].End);

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
            // Token by token: a document tree would take many times the bytes of a hostile header.
            var reader = new Utf8JsonReader(json, new JsonReaderOptions { MaxDepth = MostDepth });
            Next(ref reader);
            Begin(ref reader, JsonTokenType.StartObject, "the header", "an object");
            while (Next(ref reader) != JsonTokenType.EndObject)
            {
                var name = reader.GetString()!;
                if (!names.Add(name))
                    throw new JsonException($"the name '{Clip(name)}' occurs twice");
                Next(ref reader);
                if (name == MetadataName)
                    Notes(ref reader, metadata);
                else
                    tensors.Add(Tensor(ref reader, name));
            }

            // Anything but blanks behind the object is an error of the reader.
            reader.Read();
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException or OverflowException)
        {
            // InvalidOperationException: a string with half of a surrogate pair.
            throw Malformed(path, e.Message);
        }

        tensors.Sort((a, b) => (a.Begin, a.End).CompareTo((b.Begin, b.End)));
        return (tensors, metadata);
    }

    private static void Notes(ref Utf8JsonReader reader, Dictionary<string, string> metadata)
    {
        Begin(ref reader, JsonTokenType.StartObject, MetadataName, "an object");
        while (Next(ref reader) != JsonTokenType.EndObject)
        {
            var key = reader.GetString()!;
            Next(ref reader);
            if (!metadata.TryAdd(key, Text(ref reader, $"{MetadataName} '{Clip(key)}'")))
                throw new JsonException($"the name '{Clip(key)}' of {MetadataName} occurs twice");
        }
    }

    private static SafeTensorInfo Tensor(ref Utf8JsonReader reader, string name)
    {
        var shown = Clip(name);
        Begin(ref reader, JsonTokenType.StartObject, $"'{shown}'", "an object");
        string? dtype = null;
        long[]? shape = null, offsets = null;
        while (Next(ref reader) != JsonTokenType.EndObject)
        {
            var property = reader.GetString()!;
            var what = $"{Clip(property)} of '{shown}'";
            Next(ref reader);
            switch (property)
            {
                case "dtype" when dtype is null:
                    dtype = Text(ref reader, what);
                    break;
                case "shape" when shape is null:
                    shape = Numbers(ref reader, what);
                    break;
                case "data_offsets" when offsets is null:
                    offsets = Numbers(ref reader, what);
                    break;
                default:
                    throw new JsonException($"{what} is unknown or occurs twice");
            }
        }

        if (dtype is null || shape is null || offsets is not [var begin, var end])
            throw new JsonException($"'{shown}' needs dtype, shape and two data_offsets");
        var width = SafeTensorTypes.BytesOf(dtype);
        if (width == 0)
            throw new JsonException($"dtype '{Clip(dtype)}' of '{shown}' is not known");

        // A zero extent makes the product 0 even where other extents alone would overflow.
        var bytes = shape.Contains(0)
            ? 0
            : shape.Aggregate((long)width, (product, extent) => checked(product * extent));
        return end >= begin && end - begin == bytes
            ? new SafeTensorInfo(name, dtype, shape, begin, end)
            : throw new JsonException(
                $"'{shown}' of {dtype} [{string.Join(", ", shape)}] needs {bytes} bytes, "
                + $"its data_offsets [{begin}, {end}] differ");
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
                    $"'{Clip(tensor.Name)}' at [{tensor.Begin}, {tensor.End}] {fault} {before}, which ends at {filled}");
            }

            filled = tensor.End;
            before = $"'{Clip(tensor.Name)}'";
        }

        if (filled != dataBytes)
        {
            throw Malformed(path, $"the tensors fill {filled} bytes, the file has {dataBytes} after its header");
        }
    }

    /// The next token; a header that ends early is an error of the reader.
    private static JsonTokenType Next(ref Utf8JsonReader reader)
        => reader.Read() ? reader.TokenType : throw new JsonException("the header is no JSON: it ends early");

    private static void Begin(ref Utf8JsonReader reader, JsonTokenType token, string what, string form)
    {
        if (reader.TokenType != token)
            throw new JsonException($"{what} is {reader.TokenType}, not {form}");
    }

    private static string Text(ref Utf8JsonReader reader, string what)
    {
        Begin(ref reader, JsonTokenType.String, what, "a string");
        return reader.GetString()!;
    }

    private static long[] Numbers(ref Utf8JsonReader reader, string what)
    {
        Begin(ref reader, JsonTokenType.StartArray, what, "an array");
        var numbers = new List<long>();
        while (Next(ref reader) != JsonTokenType.EndArray)
        {
            if (reader.TokenType != JsonTokenType.Number || !reader.TryGetInt64(out var number) || number < 0)
                throw new JsonException($"{what} holds a {reader.TokenType} that is not a whole number from 0 up");
            if (numbers.Count == MostDims)
                throw new JsonException($"{what} has more than {MostDims} numbers");
            numbers.Add(number);
        }

        return [.. numbers];
    }

    /// Names come from the file: neither their length nor their control characters reach a terminal.
    internal static string Clip(string name)
    {
        var plain = name.Any(char.IsControl) ? string.Concat(name.Select(c => char.IsControl(c) ? '?' : c)) : name;
        return plain.Length <= MostShown ? plain : plain[..MostShown] + "...";
    }

    private static DiagnosticException Malformed(string path, string what) => DiagnosticException.Of(
        Codes.SafeTensorsMalformed,
        path,
        $"the safetensors file is damaged: {what}",
        "copy or download the file again; a file that was cut short ends like this");
}

// Reads JSON files of a tokenizer, and says which field is wrong.

using System.Text.Json;
using DeepSeekGraph.Runtime.Native;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// A value of a file, with the place it is at. DSG0830 for a file that cannot be read, DSG0831 for a value of another
/// form than asked for, DSG0832 where the caller says that it is not supported.
internal readonly record struct JsonField(string File, string Place, JsonElement Value)
{
    private const int MostShown = 120;

    /// Opens a file of at most `most` bytes; objects name each field once.
    public static JsonDocument Open(string path, long most)
    {
        try
        {
            if (FileCalls.IsSpecial(path))
                throw new IOException("it is no regular file");
            var size = new FileInfo(path).Length;
            if (size > most)
                throw Wrong(Codes.TokenizerMalformed, path, "", $"the file has {size} bytes, at most {most} are read", "");
            var options = new JsonDocumentOptions { MaxDepth = 32, AllowDuplicateProperties = false };
            return JsonDocument.Parse(System.IO.File.ReadAllBytes(path), options);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException or NotSupportedException)
        {
            throw Wrong(
                Codes.TokenizerUnreadable,
                path,
                "",
                $"the file cannot be read: {e.Message}",
                "give tokenizer.json of a Hugging Face checkpoint, or the folder that holds it");
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException)
        {
            // InvalidOperationException: a name with half of a surrogate pair.
            throw Wrong(Codes.TokenizerMalformed, path, "", $"the file is no JSON: {e.Message}", "copy or download it again");
        }
    }

    public bool IsNull => Value.ValueKind is JsonValueKind.Null or JsonValueKind.Undefined;

    /// A field of an object; one that is not there is null.
    public JsonField this[string name]
    {
        get
        {
            Require(JsonValueKind.Object, "an object");
            return new(File, Place.Length == 0 ? name : $"{Place}.{name}", Value.TryGetProperty(name, out var value) ? value : default);
        }
    }

    /// The items of an array of at most `most`.
    public IEnumerable<JsonField> Items(int most)
    {
        Require(JsonValueKind.Array, "an array");
        var count = Value.GetArrayLength();
        if (count > most)
            throw Malformed($"has {count} items, at most {most} are read");
        var (file, place) = (File, Place);
        return Value.EnumerateArray().Select((item, i) => new JsonField(file, $"{place}[{i}]", item));
    }

    /// Text, not empty and of at most `most` characters.
    public string Text(int most)
    {
        Require(JsonValueKind.String, "a string");
        string text;
        try
        {
            text = Value.GetString()!;
        }
        catch (InvalidOperationException)
        {
            throw Malformed("is no text: half of a surrogate pair");
        }

        return text.Length > 0 && text.Length <= most ? text : throw Malformed($"has {text.Length} characters, 1 to {most} are read");
    }

    /// A whole number from 0 up, below `limit`.
    public int Number(int limit)
        => Value.ValueKind == JsonValueKind.Number && Value.TryGetInt32(out var number) && number >= 0 && number < limit
            ? number
            : throw Malformed($"is {Shown()}, not a whole number from 0 to {limit - 1}");

    public bool Bool()
        => Value.ValueKind is JsonValueKind.True or JsonValueKind.False ? Value.GetBoolean() : throw Malformed($"is {Shown()}, not true or false");

    /// Refuses anything but null, false, or what is neutral for the field.
    public void RequireNothing(string supported)
    {
        if (!(IsNull || Value.ValueKind == JsonValueKind.False))
            throw Unsupported(supported);
    }

    public void Require(JsonValueKind kind, string form)
    {
        if (Value.ValueKind != kind)
            throw Malformed($"is {Shown()}, not {form}");
    }

    public DiagnosticException Malformed(string what)
        => Wrong(Codes.TokenizerMalformed, File, Place, $"{(Place.Length == 0 ? "the file" : $"'{Place}'")} {what}", "copy or download the file again");

    public DiagnosticException Unsupported(string supported)
        => Wrong(Codes.TokenizerUnsupported, File, Place, $"'{Place}' is {Shown()}", $"supported: {supported}");

    /// The value, short and without control characters.
    public string Shown()
    {
        if (Value.ValueKind == JsonValueKind.Undefined)
            return "missing";
        var raw = Value.GetRawText();
        var plain = string.Concat(raw.Take(MostShown).Select(c => char.IsControl(c) ? ' ' : c));
        return raw.Length > MostShown ? plain + "..." : plain;
    }

    private static DiagnosticException Wrong(string code, string file, string place, string message, string help)
        => DiagnosticException.Of(code, place.Length == 0 ? file : $"{file}, {place}", message, help);
}

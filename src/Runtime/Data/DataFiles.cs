// Reads .txt (a document a file) and .jsonl or .nvjsonl (a document a line) given by --data.

using System.IO.Enumeration;
using System.Text;
using System.Text.Json;

namespace DeepSeekGraph.Runtime.Data;

/// Every failure is one diagnostic that names --data: DSG0810 unavailable, DSG0812 malformed.
internal static class DataFiles
{
    /// All tokens of a run lie in one array of bytes, so this is the most that can be used.
    private static readonly long s_maxBytes = Array.MaxLength;

    private static readonly UTF8Encoding s_strict = new(false, throwOnInvalidBytes: true);

    /// The texts of a file or folder, files in ordinal order of their relative path.
    public static IReadOnlyList<string> Read(string path)
    {
        try
        {
            var files = Find(path);
            var bytes = files.Sum(file => new FileInfo(file).Length);
            if (bytes > s_maxBytes)
            {
                throw Unavailable(
                    path, $"holds {bytes} bytes, more than the {s_maxBytes} that fit", "use a part of it");
            }

            return files.SelectMany(ReadFile).ToArray();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw Unavailable(path, $"cannot be read: {e.Message}", "check the path and its permissions");
        }
    }

    private static List<string> Find(string path)
    {
        if (File.Exists(path))
        {
            return IsData(path)
                ? [path]
                : throw Unavailable(
                    path,
                    $"is of an unknown kind '{Path.GetExtension(path)}'",
                    "give a .txt, .jsonl or .nvjsonl file, or a folder of them");
        }

        if (!Directory.Exists(path))
        {
            throw Unavailable(path, "does not exist", "give an existing file or folder, or leave --data out");
        }

        // Links to folders are not followed, so a loop of links cannot hang the search.
        var found = new FileSystemEnumerable<string>(
            path,
            (ref FileSystemEntry entry) => entry.ToFullPath(),
            new EnumerationOptions { RecurseSubdirectories = true, IgnoreInaccessible = false })
        {
            ShouldIncludePredicate = (ref FileSystemEntry entry) => !entry.IsDirectory && IsData(entry.FileName),
            ShouldRecursePredicate = (ref FileSystemEntry entry)
                => (entry.Attributes & FileAttributes.ReparsePoint) == 0,
        }.ToList();
        if (found.Count == 0)
        {
            throw Unavailable(
                path,
                "is a folder without any .txt, .jsonl or .nvjsonl file",
                "give a folder that has some, at any depth");
        }

        return found
            .OrderBy(file => Path.GetRelativePath(path, file).Replace('\\', '/'), StringComparer.Ordinal)
            .ToList();
    }

    private static bool IsData(ReadOnlySpan<char> name)
        => Path.GetExtension(name) is var kind
            && (kind.Equals(".txt", StringComparison.OrdinalIgnoreCase) || IsLines(kind));

    private static bool IsLines(ReadOnlySpan<char> kind)
        => kind.Equals(".jsonl", StringComparison.OrdinalIgnoreCase)
            || kind.Equals(".nvjsonl", StringComparison.OrdinalIgnoreCase);

    private static IEnumerable<string> ReadFile(string file)
    {
        // A pipe or device has length 0 and may never end: it counts as empty.
        if (new FileInfo(file).Length == 0)
        {
            return [];
        }

        return IsLines(Path.GetExtension(file)) ? ReadLines(file) : [ReadText(file)];
    }

    private static string ReadText(string file)
    {
        try
        {
            return File.ReadAllText(file, s_strict);
        }
        catch (DecoderFallbackException)
        {
            throw NotUtf8(file);
        }
    }

    private static IEnumerable<string> ReadLines(string file)
    {
        using var reader = new StreamReader(file, s_strict);
        for (var number = 1; ; number++)
        {
            string? line;
            try
            {
                line = reader.ReadLine();
            }
            catch (DecoderFallbackException)
            {
                throw NotUtf8($"{file}:{number}");
            }

            if (line is null)
            {
                yield break;
            }

            if (!string.IsNullOrWhiteSpace(line))
            {
                yield return TextOf(line, $"{file}:{number}");
            }
        }
    }

    private static string TextOf(string line, string at)
    {
        try
        {
            using var json = JsonDocument.Parse(line);
            if (json.RootElement.ValueKind == JsonValueKind.Object
                && json.RootElement.TryGetProperty("text", out var text)
                && text.ValueKind == JsonValueKind.String)
            {
                return text.GetString()!;
            }

            throw Malformed(at, "the line is JSON, but has no string named 'text'");
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException or ArgumentException)
        {
            // InvalidOperationException: half of a surrogate pair, as in "\ud800".
            throw Malformed(at, $"the line is not JSON text: {e.Message}");
        }
    }

    private static DiagnosticException Malformed(string at, string message) => DiagnosticException.Of(
        Codes.DataMalformed,
        at,
        message,
        """every line of a --data .jsonl file is an object such as {"text": "Once upon a time"}""");

    private static DiagnosticException NotUtf8(string at) => DiagnosticException.Of(
        Codes.DataMalformed, at, "the text is not UTF-8", "convert the --data file to UTF-8");

    private static DiagnosticException Unavailable(string path, string what, string help)
        => DiagnosticException.Of(Codes.DataUnavailable, "--data", $"the training data '{path}' {what}", help);
}

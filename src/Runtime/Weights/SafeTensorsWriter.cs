// Writes safetensors files: whole or not at all, and the same bytes for the same tensors.

using System.Text.Json;

namespace DeepSeekGraph.Runtime.Weights;

/// A tensor to write: element type as the format names it, shape, little-endian bytes in row-major order.
public sealed record SafeTensorEntry(string Name, string DType, IReadOnlyList<long> Shape, ReadOnlyMemory<byte> Data);

/// Tensors go widest element first, then by ordinal name, so that each is aligned to its own width.
public static class SafeTensorsWriter
{
    /// Replaces `path` in one step once all is on disk; DSG0816 when it cannot be written.
    public static void Write(
        string path,
        IEnumerable<SafeTensorEntry> entries,
        IReadOnlyDictionary<string, string>? metadata = null)
    {
        var ordered = entries
            .OrderByDescending(entry => SafeTensorTypes.BytesOf(entry.DType))
            .ThenBy(entry => entry.Name, StringComparer.Ordinal)
            .ToArray();
        Check(ordered);
        var header = Header(ordered, metadata);
        var temporary = $"{path}.{Guid.NewGuid():N}.tmp";
        try
        {
            using (var file = new FileStream(temporary, FileMode.CreateNew, FileAccess.Write))
            {
                file.Write(BitConverter.GetBytes((ulong)header.Length));
                file.Write(header);
                foreach (var entry in ordered)
                {
                    file.Write(entry.Data.Span);
                }

                file.Flush(flushToDisk: true);
            }

            File.Move(temporary, path, overwrite: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw DiagnosticException.Of(
                Codes.OutputUnwritable,
                path,
                $"the safetensors file cannot be written: {e.Message}",
                "free some space, or write to another folder");
        }
        finally
        {
            DeleteQuietly(temporary);
        }
    }

    private static void Check(SafeTensorEntry[] entries)
    {
        var names = new HashSet<string>(StringComparer.Ordinal) { SafeTensorsHeader.MetadataName };
        foreach (var entry in entries)
        {
            if (!names.Add(entry.Name))
            {
                throw new ArgumentException($"the name '{entry.Name}' is given twice or reserved", nameof(entries));
            }

            var width = SafeTensorTypes.BytesOf(entry.DType);
            var bytes = entry.Shape.Aggregate((long)width, (product, extent) => checked(product * extent));
            if (width == 0 || entry.Shape.Any(extent => extent < 0) || bytes != entry.Data.Length)
            {
                throw new ArgumentException(
                    $"'{entry.Name}' of {entry.DType} [{string.Join(", ", entry.Shape)}] "
                    + $"does not have {entry.Data.Length} bytes",
                    nameof(entries));
            }
        }
    }

    private static byte[] Header(SafeTensorEntry[] entries, IReadOnlyDictionary<string, string>? metadata)
    {
        using var buffer = new MemoryStream();
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            if (metadata is { Count: > 0 })
            {
                json.WriteStartObject(SafeTensorsHeader.MetadataName);
                foreach (var (key, value) in metadata.OrderBy(note => note.Key, StringComparer.Ordinal))
                {
                    json.WriteString(key, value);
                }

                json.WriteEndObject();
            }

            var begin = 0L;
            foreach (var entry in entries)
            {
                json.WriteStartObject(entry.Name);
                json.WriteString("dtype", entry.DType);
                WriteNumbers(json, "shape", entry.Shape);
                WriteNumbers(json, "data_offsets", [begin, begin + entry.Data.Length]);
                json.WriteEndObject();
                begin += entry.Data.Length;
            }

            json.WriteEndObject();
        }

        // Blanks up to a multiple of 8, so that the data part is aligned in the map.
        while (buffer.Length % 8 != 0)
        {
            buffer.WriteByte((byte)' ');
        }

        return buffer.Length <= SafeTensorsHeader.MostBytes
            ? buffer.ToArray()
            : throw new ArgumentException($"the header has {buffer.Length} bytes, too many", nameof(entries));
    }

    private static void WriteNumbers(Utf8JsonWriter json, string name, IReadOnlyList<long> numbers)
    {
        json.WriteStartArray(name);
        foreach (var number in numbers)
        {
            json.WriteNumberValue(number);
        }

        json.WriteEndArray();
    }

    /// After a success there is nothing to delete.
    private static void DeleteQuietly(string temporary)
    {
        try
        {
            File.Delete(temporary);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // The first failure is the one to report.
        }
    }
}

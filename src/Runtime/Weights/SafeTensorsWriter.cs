// Writes safetensors files: whole or not at all, and the same bytes for the same tensors.

namespace DeepSeekGraph.Runtime.Weights;

/// A tensor to write: element type as the format names it, shape, little-endian bytes in row-major order.
public sealed record SafeTensorEntry(string Name, string DType, IReadOnlyList<long> Shape, ReadOnlyMemory<byte> Data)
{
    internal SafeTensorSpec Spec => new(Name, DType, Shape);
}

/// One file, all of whose bytes are at hand; ShardedWriter is for more.
public static class SafeTensorsWriter
{
    /// Replaces `path` in one step once all is on disk; DSG0816 when it cannot be written.
    public static void Write(
        string path,
        IEnumerable<SafeTensorEntry> entries,
        IReadOnlyDictionary<string, string>? metadata = null)
    {
        var all = entries.ToArray();
        foreach (var entry in all)
        {
            if (entry.Spec.Bytes != entry.Data.Length)
            {
                throw new ArgumentException(
                    $"'{entry.Name}' of {entry.DType} [{string.Join(", ", entry.Shape)}] "
                    + $"does not have {entry.Data.Length} bytes",
                    nameof(entries));
            }
        }

        var layout = SafeTensorsLayout.Of(all.Select(entry => entry.Spec), metadata);
        var data = all.ToDictionary(entry => entry.Name, entry => entry.Data, StringComparer.Ordinal);
        var temporary = $"{path}.{Guid.NewGuid():N}.tmp";
        try
        {
            using (var file = new FileStream(temporary, FileMode.CreateNew, FileAccess.Write))
            {
                file.Write(layout.Header);
                foreach (var tensor in layout.Tensors)
                    file.Write(data[tensor.Name].Span);

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

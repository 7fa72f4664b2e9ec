// Where the tensors of a file to be written lie: their order, their offsets, and the header that says so.

using System.Text.Json;

namespace DeepSeekGraph.Runtime.Weights;

/// What a tensor to write is, without its bytes; element type as the format names it.
public sealed record SafeTensorSpec(string Name, string DType, IReadOnlyList<long> Shape)
{
    /// Bytes of the tensor; ArgumentException for an unknown type or a shape that is none.
    public long Bytes
    {
        get
        {
            var width = SafeTensorTypes.BytesOf(DType);
            return width > 0 && Shape.Count <= SafeTensorsHeader.MostDims && Shape.All(extent => extent >= 0)
                ? Shape.Aggregate((long)width, (product, extent) => checked(product * extent))
                : throw new ArgumentException($"'{Name}' of {DType} [{string.Join(", ", Shape)}] is no tensor");
        }
    }
}

/// Tensors go widest element first, then by ordinal name, so that each is aligned to its own width and the same tensors
/// always give the same bytes.
internal sealed record SafeTensorsLayout(IReadOnlyList<SafeTensorInfo> Tensors, byte[] Header)
{
    /// Bytes of header and data.
    public long FileBytes => Header.Length + (Tensors.Count == 0 ? 0 : Tensors[^1].End);

    /// Names are distinct; ArgumentException for a name twice and for a header larger than the format allows.
    public static SafeTensorsLayout Of(IEnumerable<SafeTensorSpec> specs, IReadOnlyDictionary<string, string>? metadata)
    {
        var names = new HashSet<string>(StringComparer.Ordinal) { SafeTensorsHeader.MetadataName };
        var tensors = new List<SafeTensorInfo>();
        var begin = 0L;
        foreach (var spec in specs
            .OrderByDescending(spec => SafeTensorTypes.BytesOf(spec.DType))
            .ThenBy(spec => spec.Name, StringComparer.Ordinal))
        {
            if (!names.Add(spec.Name))
                throw new ArgumentException($"the name '{spec.Name}' is given twice or reserved", nameof(specs));
            var end = checked(begin + spec.Bytes);
            tensors.Add(new SafeTensorInfo(spec.Name, spec.DType, spec.Shape, begin, end));
            begin = end;
        }

        return new SafeTensorsLayout(tensors, HeaderOf(tensors, metadata));
    }

    /// The length of the JSON, the JSON, and blanks up to a multiple of 8, so that the data part is aligned in the map.
    private static byte[] HeaderOf(List<SafeTensorInfo> tensors, IReadOnlyDictionary<string, string>? metadata)
    {
        using var buffer = new MemoryStream();
        buffer.Write(new byte[8]);
        using (var json = new Utf8JsonWriter(buffer))
        {
            json.WriteStartObject();
            if (metadata is { Count: > 0 })
            {
                json.WriteStartObject(SafeTensorsHeader.MetadataName);
                foreach (var (key, value) in metadata.OrderBy(note => note.Key, StringComparer.Ordinal))
                    json.WriteString(key, value);
                json.WriteEndObject();
            }

            foreach (var tensor in tensors)
            {
                json.WriteStartObject(tensor.Name);
                json.WriteString("dtype", tensor.DType);
                WriteNumbers(json, "shape", tensor.Shape);
                WriteNumbers(json, "data_offsets", [tensor.Begin, tensor.End]);
                json.WriteEndObject();
            }

            json.WriteEndObject();
        }

        while (buffer.Length % 8 != 0)
            buffer.WriteByte((byte)' ');
        var bytes = buffer.ToArray();
        var length = bytes.Length - 8;
        if (length > SafeTensorsHeader.MostBytes)
            throw new ArgumentException($"the header has {length} bytes, too many", nameof(tensors));
        BitConverter.TryWriteBytes(bytes, (ulong)length);
        return bytes;
    }

    private static void WriteNumbers(Utf8JsonWriter json, string name, IReadOnlyList<long> numbers)
    {
        json.WriteStartArray(name);
        foreach (var number in numbers)
            json.WriteNumberValue(number);
        json.WriteEndArray();
    }
}

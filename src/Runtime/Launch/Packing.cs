// Small values as bytes and back.
using System.Text;

namespace DeepSeekGraph.Runtime.Launch;

internal static class Packing
{
    public static byte[] Pack(System.Action<BinaryWriter> write)
    {
        using var bytes = new MemoryStream();
        using (var writer = new BinaryWriter(bytes, Encoding.UTF8, leaveOpen: true))
            write(writer);
        return bytes.ToArray();
    }

    /// <summary>InvalidDataException where the bytes end early or are none of their kind.</summary>
    public static T Unpack<T>(byte[] bytes, Func<BinaryReader, T> read)
    {
        try
        {
            using var reader = new BinaryReader(new MemoryStream(bytes, writable: false), Encoding.UTF8);
            return read(reader);
        }
        catch (Exception e) when (e is EndOfStreamException or FormatException or ArgumentException)
        {
            throw new InvalidDataException("a message between processes ends early", e);
        }
    }

    public static void WriteBlob(this BinaryWriter writer, byte[] bytes)
    {
        writer.Write(bytes.Length);
        writer.Write(bytes);
    }

    public static byte[] ReadBlob(this BinaryReader reader)
    {
        var length = reader.ReadInt32();
        var left = reader.BaseStream.Length - reader.BaseStream.Position;
        return length >= 0 && length <= left ? reader.ReadBytes(length) : throw new InvalidDataException($"{length} bytes of {left}");
    }

    /// <summary>How many follow, each of at least a byte.</summary>
    public static int ReadCount(this BinaryReader reader)
    {
        var count = reader.ReadInt32();
        var left = reader.BaseStream.Length - reader.BaseStream.Position;
        return count >= 0 && count <= left ? count : throw new InvalidDataException($"{count} values in {left} bytes");
    }
}

// The byte form of a parcel: a header that says what is in it, then the elements of its tensors as they lie in memory.
using System.Runtime.InteropServices;
using System.Text;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>Headers are read as if an enemy had written them: InvalidDataException, and nothing is allocated that they do not pay for.</summary>
internal static class ParcelBytes
{
    /// <summary>Bytes of a header at most: rows by token take a bit for each token and expert.</summary>
    public const int MostHeader = 1 << 28;

    /// <summary>Elements' bytes of one tensor at most.</summary>
    public const long MostTensor = 1L << 38;

    private const int MostValues = 4096;
    private const int MostDims = 8;
    private const int MostPadding = 1 << 12;

    private enum Value : byte
    {
        Nothing,
        Tensor,
        RowsByExpert,
        RowsByToken,
    }

    private static readonly ScalarType[] s_types = [ScalarType.Float32, ScalarType.BFloat16, ScalarType.Int64, ScalarType.Int32, ScalarType.Bool];

    /// <summary>The header of a message.</summary>
    public static byte[] Header(MessageKey key, Parcel parcel)
    {
        using var bytes = new MemoryStream();
        using (var writer = new BinaryWriter(bytes, Encoding.UTF8, leaveOpen: true))
        {
            writer.Write(key.Group);
            writer.Write(key.BetweenStages);
            writer.Write(key.Number);
            writer.Write(parcel.Tensors.Length);
            for (var i = 0; i < parcel.Tensors.Length; i++)
            {
                if (parcel.Tensors[i] is { } tensor)
                    Write(writer, tensor);
                else if (parcel.Rows[i] is { } rows)
                    Write(writer, rows);
                else
                    writer.Write((byte)Value.Nothing);
            }
        }

        return bytes.ToArray();
    }

    /// <summary>The message that a header describes; its tensors have room for their elements, which follow in order.</summary>
    public static (MessageKey Key, Parcel Parcel) Read(byte[] header)
    {
        var made = new List<Tensor>();
        try
        {
            using var reader = new BinaryReader(new MemoryStream(header, writable: false), Encoding.UTF8);
            var key = new MessageKey(reader.ReadInt32(), reader.ReadBoolean(), reader.ReadInt64());
            var count = reader.ReadInt32();
            Require(count is >= 0 and <= MostValues, $"{count} values");
            var tensors = new Tensor?[count];
            var rows = new RowSet?[count];
            for (var i = 0; i < count; i++)
            {
                switch ((Value)reader.ReadByte())
                {
                    case Value.Nothing:
                        break;
                    case Value.Tensor:
                        made.Add(tensors[i] = ReadTensor(reader));
                        break;
                    case Value.RowsByExpert:
                        rows[i] = ReadByExpert(reader);
                        break;
                    case Value.RowsByToken:
                        rows[i] = ReadByToken(reader);
                        break;
                    default:
                        throw new InvalidDataException("a value of a kind that there is not");
                }
            }

            Require(reader.BaseStream.Position == header.Length, "bytes behind its end");
            return (key, new Parcel(tensors, rows));
        }
        catch (Exception e)
        {
            foreach (var tensor in made)
                tensor.Dispose();
            if (e is EndOfStreamException or OverflowException)
                throw new InvalidDataException("a message ends early or counts beyond its size", e);
            throw;
        }
    }

    private static void Write(BinaryWriter writer, Tensor tensor)
    {
        if (tensor.device_type != TorchSharp.DeviceType.CPU)
            throw new InvalidOperationException("a message is written from the processor's memory; this is a bug in dsg");
        writer.Write((byte)Value.Tensor);
        writer.Write((byte)Array.IndexOf(s_types, tensor.dtype));
        writer.Write((byte)tensor.shape.Length);
        foreach (var extent in tensor.shape)
            writer.Write(extent);
    }

    private static void Write(BinaryWriter writer, RowSet rows)
    {
        writer.Write((byte)(rows.ByToken ? Value.RowsByToken : Value.RowsByExpert));
        writer.Write(rows.Padding);
        writer.Write(rows.ByToken ? rows.Tokens : rows.MemberCounts.Length);
        writer.Write(rows.Experts);
        if (!rows.ByToken)
        {
            foreach (var counts in rows.MemberCounts)
            {
                foreach (var count in counts)
                    writer.Write(count);
            }

            return;
        }

        // a bit for each token and expert: rows are ordered by expert, then by token, so that this is all there is to know
        var mask = new byte[MaskBytes(rows.Tokens, rows.Experts)];
        for (var e = 0; e < rows.Experts; e++)
        {
            for (var row = rows.Offsets[e]; row < rows.Offsets[e] + rows.Counts[e]; row++)
            {
                var bit = ((long)rows.TokenIndex[row] * rows.Experts) + e;
                mask[bit >> 3] |= (byte)(1 << (int)(bit & 7));
            }
        }

        writer.Write(mask);
    }

    private static Tensor ReadTensor(BinaryReader reader)
    {
        var type = reader.ReadByte();
        Require(type < s_types.Length, $"elements of type {type}");
        var shape = new long[reader.ReadByte()];
        Require(shape.Length <= MostDims, $"a tensor of {shape.Length} dims");
        var bytes = (long)TensorMemory.Width(s_types[type]);
        for (var i = 0; i < shape.Length; i++)
        {
            shape[i] = reader.ReadInt64();
            Require(shape[i] >= 0, $"an extent of {shape[i]}");
            bytes = checked(bytes * Math.Max(1, shape[i]));
            Require(bytes <= MostTensor, $"a tensor of {bytes} bytes");
        }

        try
        {
            return empty(shape, dtype: s_types[type]);
        }
        catch (ExternalException e)
        {
            throw new InvalidDataException($"a message has a tensor of {bytes} bytes, for which there is no memory", e);
        }
    }

    private static (int Padding, int First, int Experts) ReadExtents(BinaryReader reader)
    {
        var (padding, first, experts) = (reader.ReadInt32(), reader.ReadInt32(), reader.ReadInt32());
        Require(padding is >= 1 and <= MostPadding && first >= 0 && experts >= 0, $"rows of {experts} experts, {first} tokens or members, in blocks of {padding}");
        return (padding, first, experts);
    }

    private static RowSet ReadByExpert(BinaryReader reader)
    {
        var (padding, members, experts) = ReadExtents(reader);
        Require(members >= 1 && (long)members * experts * sizeof(int) <= Left(reader), $"counts of {members} members for {experts} experts");
        var counts = new int[members][];
        for (var m = 0; m < members; m++)
        {
            counts[m] = new int[experts];
            for (var e = 0; e < experts; e++)
            {
                counts[m][e] = reader.ReadInt32();
                Require(counts[m][e] >= 0, $"{counts[m][e]} rows");
            }
        }

        for (var e = 0; e < experts; e++)
            Require(counts.Sum(m => (long)m[e]) + padding <= int.MaxValue, "more rows than can be counted");
        return RowSet.FromMembers(counts, padding);
    }

    private static RowSet ReadByToken(BinaryReader reader)
    {
        var (padding, tokens, experts) = ReadExtents(reader);
        Require((long)tokens * experts <= Array.MaxLength, $"{tokens} tokens for {experts} experts");
        Require(MaskBytes(tokens, experts) <= Left(reader), $"routes of {tokens} tokens for {experts} experts");
        var bits = reader.ReadBytes(MaskBytes(tokens, experts));
        var mask = new byte[tokens * experts];
        for (var i = 0; i < mask.Length; i++)
            mask[i] = (byte)((bits[i >> 3] >> (i & 7)) & 1);
        return RowSet.FromMask(mask, tokens, experts, padding);
    }

    private static int MaskBytes(int tokens, int experts) => (int)((((long)tokens * experts) + 7) / 8);

    private static long Left(BinaryReader reader) => reader.BaseStream.Length - reader.BaseStream.Position;

    private static void Require(bool holds, string what)
    {
        if (!holds)
            throw new InvalidDataException($"a message has {what}");
    }
}

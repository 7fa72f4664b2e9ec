// What goes over a control connection: frames of a length, a kind and bytes, behind a handshake that proves the job's token.
using System.Buffers.Binary;
using System.Security.Cryptography;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>Kinds of frames between a process and the hub.</summary>
internal enum FrameKind : byte
{
    /// <summary>To the hub: world size, version and the port for messages.</summary>
    Join,

    /// <summary>From the hub: addresses of all.</summary>
    Welcome,

    /// <summary>To the hub: bytes for a meeting.</summary>
    Give,

    /// <summary>To process 0: everybody's bytes.</summary>
    Gathered,

    /// <summary>From process 0 to the hub, and on to all: what the meeting decided.</summary>
    Answer,

    /// <summary>From the hub: a meeting that never will be whole.</summary>
    Broken,

    /// <summary>Both ways, every second: still here, and where.</summary>
    Beat,

    /// <summary>Both ways: what ends the job.</summary>
    Fault,

    /// <summary>To the hub: nothing more will come.</summary>
    Bye,
}

/// <summary>Reads and writes frames. IOException where the other end is gone, InvalidDataException where it is not one of ours.</summary>
internal static class Frames
{
    /// <summary>Of one frame, at most.</summary>
    public const int Most = 1 << 26;

    public static void Write(Stream stream, FrameKind kind, ReadOnlySpan<byte> bytes)
    {
        var frame = new byte[5 + bytes.Length];
        BinaryPrimitives.WriteInt32LittleEndian(frame, bytes.Length);
        frame[4] = (byte)kind;
        bytes.CopyTo(frame.AsSpan(5));
        stream.Write(frame);
    }

    /// <summary>The next frame; null where the other end closed between two.</summary>
    public static (FrameKind Kind, byte[] Bytes)? Read(Stream stream)
    {
        var head = new byte[5];
        var got = stream.ReadAtLeast(head, head.Length, throwOnEndOfStream: false);
        if (got == 0)
            return null;
        if (got < head.Length)
            throw new EndOfStreamException("a frame ends early");
        var length = BinaryPrimitives.ReadInt32LittleEndian(head);
        if (length is < 0 or > Most || head[4] > (byte)FrameKind.Bye)
            throw new InvalidDataException($"a frame of {length} bytes and kind {head[4]}");
        var bytes = new byte[length];
        stream.ReadExactly(bytes);
        return ((FrameKind)head[4], bytes);
    }
}

/// <summary>What a connection is for.</summary>
internal enum Purpose : byte
{
    Control,
    Messages,
}

/// <summary>
/// Who connects proves that it knows the job's token, by an HMAC of what the other end just drew: a stranger, and another job on the
/// same port, are refused before they can say anything.
/// </summary>
internal static class Handshake
{
    private const uint Magic = 0x44534731;
    private const int NonceBytes = 32;
    private const int HelloBytes = 9;
    private const byte Accepted = 1;

    /// <summary>The end that listens; null for a stranger.</summary>
    public static (Purpose Purpose, int Rank)? Accept(Stream stream, byte[] token)
    {
        var nonce = RandomNumberGenerator.GetBytes(NonceBytes);
        stream.Write(nonce);
        var hello = new byte[HelloBytes + HMACSHA256.HashSizeInBytes];
        stream.ReadExactly(hello);
        var proof = Proof(token, nonce, hello.AsSpan(0, HelloBytes));
        var known = BinaryPrimitives.ReadUInt32LittleEndian(hello) == Magic
            && CryptographicOperations.FixedTimeEquals(proof, hello.AsSpan(HelloBytes)) && hello[8] <= (byte)Purpose.Messages;
        stream.WriteByte(known ? Accepted : (byte)0);
        return known ? ((Purpose)hello[8], BinaryPrimitives.ReadInt32LittleEndian(hello.AsSpan(4))) : null;
    }

    /// <summary>The end that connects; false where it is refused.</summary>
    public static bool Present(Stream stream, byte[] token, Purpose purpose, int rank)
    {
        var nonce = new byte[NonceBytes];
        stream.ReadExactly(nonce);
        var hello = new byte[HelloBytes];
        BinaryPrimitives.WriteUInt32LittleEndian(hello, Magic);
        BinaryPrimitives.WriteInt32LittleEndian(hello.AsSpan(4), rank);
        hello[8] = (byte)purpose;
        stream.Write([.. hello, .. Proof(token, nonce, hello)]);
        return stream.ReadByte() == Accepted;
    }

    private static byte[] Proof(byte[] token, byte[] nonce, ReadOnlySpan<byte> hello)
        => HMACSHA256.HashData(token, (byte[])[.. nonce, .. hello]);
}

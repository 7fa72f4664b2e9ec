// XXH128 of bytes, as 32 hexadecimal digits: finds damage, not forgery, at the speed of memory.

using System.IO.Hashing;

namespace DeepSeekGraph.Runtime.Checkpoints;

internal static unsafe class Checksum
{
    private const int Part = 1 << 30;

    public static string Of(ReadOnlySpan<byte> bytes) => Text(XxHash128.Hash(bytes));

    /// Of memory of any size.
    public static string Of(byte* start, long length)
    {
        var hash = new XxHash128();
        for (long at = 0; at < length; at += Part)
            hash.Append(new ReadOnlySpan<byte>(start + at, (int)Math.Min(Part, length - at)));
        return Text(hash.GetCurrentHash());
    }

    public static string Text(byte[] hash) => Convert.ToHexStringLower(hash);
}

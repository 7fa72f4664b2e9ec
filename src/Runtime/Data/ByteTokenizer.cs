// The byte-level tokenizer: a token is a byte of UTF-8, and byte 0 separates documents.

using System.Text;

namespace DeepSeekGraph.Runtime.Data;

/// Needs no data file, and no text is outside its vocabulary.
public static class ByteTokenizer
{
    /// Ids 0..255.
    public const int Vocabulary = 256;

    /// Ends every document; zero characters of the text itself are dropped.
    public const int Separator = 0;

    /// The bytes of `text`, none of them the separator.
    public static byte[] Encode(string text)
    {
        var plain = text.Contains('\0', StringComparison.Ordinal)
            ? text.Replace("\0", "", StringComparison.Ordinal)
            : text;
        return Encoding.UTF8.GetBytes(plain);
    }

    /// Text of ids 0..255, separators as line ends; ids or bytes that are no text become U+FFFD.
    public static string Decode(ReadOnlySpan<long> tokens)
    {
        var bytes = new byte[tokens.Length];
        for (var i = 0; i < bytes.Length; i++)
        {
            bytes[i] = tokens[i] switch
            {
                Separator => (byte)'\n',
                > 0 and < Vocabulary => (byte)tokens[i],
                _ => 0xFF,  // never part of UTF-8
            };
        }

        return Encoding.UTF8.GetString(bytes);
    }
}

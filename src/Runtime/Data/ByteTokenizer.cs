// The byte-level tokenizer: a token is a byte of UTF-8, and byte 0 separates documents.

using System.Text;

namespace DeepSeekGraph.Runtime.Data;

/// Needs no data file, and no text is outside its vocabulary.
public sealed class ByteTokenizer : ITokenizer
{
    private ByteTokenizer()
    {
    }

    public static ByteTokenizer Instance { get; } = new();

    public string Name => "bytes of UTF-8";

    /// Ids 0..255.
    public int Vocabulary => 256;

    /// Ends every document; zero characters of the text itself are dropped.
    public int Separator => 0;

    /// The bytes of `text`, none of them the separator.
    public int[] EncodeText(string text)
        => Array.ConvertAll(Encoding.UTF8.GetBytes(text.Replace("\0", "", StringComparison.Ordinal)), b => (int)b);

    /// Text of ids 0..255, separators as line ends; ids or bytes that are no text become U+FFFD.
    public string Decode(ReadOnlySpan<long> tokens)
    {
        var bytes = new byte[tokens.Length];
        for (var i = 0; i < bytes.Length; i++)
        {
            bytes[i] = tokens[i] switch
            {
                0 => (byte)'\n',
                > 0 and < 256 => (byte)tokens[i],
                _ => 0xFF,  // never part of UTF-8
            };
        }

        return Encoding.UTF8.GetString(bytes);
    }
}

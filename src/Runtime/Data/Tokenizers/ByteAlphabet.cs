// The alphabet of byte-level BPE: a printable character for each byte, so that any bytes are a word.

using System.Text;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// As GPT-2 chose it (github.com/openai/gpt-2, src/encoder.py): printable Latin-1 stands for itself, the other 68 bytes
/// for U+0100 and on.
internal static class ByteAlphabet
{
    private static readonly char[] s_chars = Chars();
    private static readonly Dictionary<char, byte> s_bytes =
        Enumerable.Range(0, 256).ToDictionary(b => s_chars[b], b => (byte)b);

    /// The character of a byte.
    public static char CharOf(byte value) => s_chars[value];

    /// Text as a word of the alphabet, a character for each byte of its UTF-8.
    public static string Spell(ReadOnlySpan<char> text)
    {
        var bytes = new byte[Encoding.UTF8.GetByteCount(text)];
        Encoding.UTF8.GetBytes(text, bytes);
        return string.Create(bytes.Length, bytes, (chars, from) =>
        {
            for (var i = 0; i < from.Length; i++)
                chars[i] = s_chars[from[i]];
        });
    }

    /// The bytes of a token: of its letters if all are of the alphabet, else its UTF-8, as tokens added later have it.
    public static byte[] BytesOf(string token)
    {
        var bytes = new byte[token.Length];
        for (var i = 0; i < bytes.Length; i++)
        {
            if (!s_bytes.TryGetValue(token[i], out bytes[i]))
                return Encoding.UTF8.GetBytes(token);
        }

        return bytes;
    }

    private static char[] Chars()
    {
        var chars = new char[256];
        var next = (char)256;
        for (var b = 0; b < 256; b++)
            chars[b] = b is (>= '!' and <= '~') or (>= 0xA1 and <= 0xAC) or >= 0xAE ? (char)b : next++;
        return chars;
    }
}

// Decodes a text while it is generated: what is shown is never half of a character.

using System.Text;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// All texts of Next and the one of Flush, joined, are the text of all ids at once.
public sealed class StreamingDecoder
{
    private readonly HuggingFaceTokenizer _tokenizer;
    private readonly bool _skipSpecial;
    private readonly Decoder _utf8 = Encoding.UTF8.GetDecoder();

    internal StreamingDecoder(HuggingFaceTokenizer tokenizer, bool skipSpecial)
        => (_tokenizer, _skipSpecial) = (tokenizer, skipSpecial);

    /// The characters that are complete with this id; bytes of an incomplete one wait.
    public string Next(int id) => Take(_tokenizer.BytesOf(id, _skipSpecial), last: false);

    /// What still waits, as U+FFFD; afterwards a new text begins.
    public string Flush() => Take([], last: true);

    private string Take(ReadOnlySpan<byte> bytes, bool last)
    {
        // the decoder may hold up to three bytes back
        var chars = new char[Encoding.UTF8.GetMaxCharCount(bytes.Length + 3)];
        return new string(chars, 0, _utf8.GetChars(bytes, chars, last));
    }
}

// All tokens of a corpus in one array, documents one after the other with a separator behind each.

using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Data;

/// Kept as bytes where ids fit, an eighth of the size of the long tokens that a step takes, else as 32-bit numbers.
public sealed class TokenStream
{
    private readonly List<byte> _bytes = [];
    private readonly List<int> _ids = [];
    private readonly bool _narrow;

    private TokenStream(Corpus corpus, ITokenizer tokenizer)
    {
        Source = corpus.Source;
        Vocabulary = tokenizer.Vocabulary;
        _narrow = Vocabulary <= 256;

        // a token of a large vocabulary is four bytes of text or so
        if (_narrow)
            _bytes.Capacity = (int)Math.Min(corpus.Bytes + corpus.Documents.Count, Array.MaxLength);
        else
            _ids.Capacity = (int)Math.Min((corpus.Bytes / 4) + corpus.Documents.Count, Array.MaxLength);
    }

    /// Where the text comes from, for messages.
    public string Source { get; }

    /// Tokens, separators included.
    public long Length => _narrow ? _bytes.Count : _ids.Count;

    /// Ids are below this.
    public int Vocabulary { get; }

    /// The bytes of `corpus`; DSG0810 when they do not fit in one array.
    public static TokenStream Of(Corpus corpus) => Of(corpus, ByteTokenizer.Instance);

    /// Tokens of `corpus`; DSG0810 when they do not fit in one array.
    public static TokenStream Of(Corpus corpus, ITokenizer tokenizer)
    {
        var stream = new TokenStream(corpus, tokenizer);
        foreach (var document in corpus.Documents)
        {
            var tokens = tokenizer.EncodeText(document);
            if (stream.Length + tokens.Length >= Array.MaxLength)
            {
                throw DiagnosticException.Of(
                    Codes.DataUnavailable,
                    "--data",
                    $"the training data '{corpus.Source}' has more than the {Array.MaxLength} tokens that fit",
                    "use a part of it");
            }

            stream.Add(tokens, tokenizer.Separator);
        }

        stream._bytes.TrimExcess();
        stream._ids.TrimExcess();
        return stream;
    }

    /// Of all tokens, to tell whether two runs read the same.
    public string Checksum => Checkpoints.Checksum.Of(
        _narrow ? CollectionsMarshal.AsSpan(_bytes) : MemoryMarshal.AsBytes(CollectionsMarshal.AsSpan(_ids)));

    /// Copies tokens [start, start + target.Length).
    public void CopyTo(long start, Span<long> target)
    {
        var first = (int)start;
        for (var i = 0; i < target.Length; i++)
            target[i] = _narrow ? _bytes[first + i] : _ids[first + i];
    }

    private void Add(int[] tokens, int separator)
    {
        if (!_narrow)
        {
            _ids.AddRange(tokens);
            _ids.Add(separator);
            return;
        }

        foreach (var token in tokens)
            _bytes.Add((byte)token);
        _bytes.Add((byte)separator);
    }
}

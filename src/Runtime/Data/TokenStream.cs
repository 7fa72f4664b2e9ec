// All tokens of a corpus in one array, documents one after the other with a separator behind each.

namespace DeepSeekGraph.Runtime.Data;

/// Kept as bytes, an eighth of the size of the long tokens that a step takes.
public sealed class TokenStream
{
    private readonly byte[] _tokens;

    private TokenStream(string source, byte[] tokens)
    {
        Source = source;
        _tokens = tokens;
    }

    /// Where the text comes from, for messages.
    public string Source { get; }

    /// Tokens, separators included.
    public long Length => _tokens.Length;

    /// Ids are below this.
    public int Vocabulary => ByteTokenizer.Vocabulary;

    /// Tokens of `corpus`; DSG0810 when they do not fit in one array.
    public static TokenStream Of(Corpus corpus)
    {
        var length = corpus.Bytes + corpus.Documents.Count;
        if (length > Array.MaxLength)
        {
            throw DiagnosticException.Of(
                Codes.DataUnavailable,
                "--data",
                $"the training data '{corpus.Source}' has {length} tokens, more than the {Array.MaxLength} that fit",
                "use a part of it");
        }

        var tokens = new byte[length];
        var end = 0;
        foreach (var document in corpus.Documents)
        {
            var bytes = ByteTokenizer.Encode(document);
            bytes.CopyTo(tokens, end);
            end += bytes.Length;
            tokens[end++] = ByteTokenizer.Separator;
        }

        // Zero characters were dropped, so the array may have a tail to spare.
        return new TokenStream(corpus.Source, end == tokens.Length ? tokens : tokens[..end]);
    }

    /// Copies tokens [start, start + target.Length).
    public void CopyTo(long start, Span<long> target)
    {
        var from = _tokens.AsSpan((int)start, target.Length);
        for (var i = 0; i < from.Length; i++)
        {
            target[i] = from[i];
        }
    }
}

// What training needs of a tokenizer.

namespace DeepSeekGraph.Runtime.Data;

/// Text to ids and back.
public interface ITokenizer
{
    /// What it is, in words, for the log.
    string Name { get; }

    /// Ids are below this.
    int Vocabulary { get; }

    /// The id that ends every document.
    int Separator { get; }

    /// The ids of plain text; never the separator, whatever the text says.
    int[] EncodeText(string text);

    /// The text of ids; bytes that are no UTF-8 and ids that are none become U+FFFD.
    string Decode(ReadOnlySpan<long> tokens);
}

// The training text as a list of documents: the installed .NET reference documentation, or what --data names.

using System.Globalization;
using System.Text;

namespace DeepSeekGraph.Runtime.Data;

/// Documents in a fixed order, the same on every rank and run; at least one of them holds text.
public sealed class Corpus
{
    private Corpus(string source, IReadOnlyList<string> documents)
    {
        Source = source;
        Documents = documents;
        foreach (var document in documents)
        {
            Bytes += Encoding.UTF8.GetByteCount(document);
        }
    }

    /// Where the text comes from, in words, for the log.
    public string Source { get; }

    /// Never empty strings.
    public IReadOnlyList<string> Documents { get; }

    /// UTF-8 bytes of all documents, separators not counted.
    public long Bytes { get; }

    /// The corpus at `path` (.txt, .jsonl, .nvjsonl or a folder of them); null means the default one.
    public static Corpus Open(string? path) => path is null ? Default() : FromPath(path);

    /// The corpora at several paths, joined in this order; none means the default one.
    public static Corpus OpenAll(IReadOnlyList<string> paths) => paths switch
    {
        [] => Default(),
        [var one] => FromPath(one),
        _ => FromTexts(string.Join(", ", paths), paths.SelectMany(DataFiles.Read)),
    };

    /// The reference documentation that the .NET SDK installs; DSG0810 where there is none.
    public static Corpus Default() => ReferenceDocs.Load();

    /// Reads a file or, recursively and in ordinal order, a folder; DSG0810, DSG0811, DSG0812.
    public static Corpus FromPath(string path)
        => FromTexts(path, DataFiles.Read(path));

    /// Any texts as a corpus; empty ones are dropped, DSG0811 when none is left.
    public static Corpus FromTexts(string source, IEnumerable<string> texts)
    {
        var documents = texts.Where(text => !string.IsNullOrWhiteSpace(text)).ToArray();
        return documents.Length > 0
            ? new Corpus(source, documents)
            : throw DiagnosticException.Of(
                Codes.DataTooSmall,
                source,
                "the training data holds no text",
                "give --data a file or folder with text, or leave it out for the default corpus");
    }

    /// Documents, size and source in one line.
    public override string ToString() => string.Create(
        CultureInfo.InvariantCulture,
        $"{Documents.Count:N0} documents, {Bytes / 1e6:F1} MB, from {Source}");
}

// Cuts text into the pieces that BPE works on, as DeepSeek-V3's tokenizer.json says.

using System.Globalization;
using System.Text;
using System.Text.RegularExpressions;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// Three splits, one after the other: digits by three, runs of Chinese and Japanese, words with a blank or mark before them.
/// Each split sees each piece alone, and what it does not match stays a piece (Hugging Face calls that "Isolated").
internal static partial class DeepSeekPieces
{
    /// The patterns as the file spells them; no other is run, since a pattern is a program of whoever wrote the file.
    public static IReadOnlyList<string> Patterns { get; } = [Digits, Han, Words];

    private const string Digits = @"\p{N}{1,3}";
    private const string Han = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+";
    private const string Words =
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
        + "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        + "| ?[\\p{P}\\p{S}]+[\r\n]*"
        + @"|\s*[" + "\r\n" + @"]+|\s+(?!\S)|\s+";

    /// Offsets in `text` where pieces end, in order; the text has no half of a surrogate pair alone.
    public static List<int> Ends(ReadOnlySpan<char> text)
    {
        var flat = text.IndexOfAnyInRange('\uD800', '\uDFFF') < 0 ? text : Flat(text);
        List<int> ends = [flat.Length];
        foreach (var split in (ReadOnlySpan<Regex>)[DigitsRegex(), HanRegex(), WordsRegex()])
            ends = Split(split, flat, ends);
        return flat.Length == text.Length ? ends : Unflat(text, ends);
    }

    private static List<int> Split(Regex split, ReadOnlySpan<char> text, List<int> pieces)
    {
        var ends = new List<int>(pieces.Count);
        var start = 0;
        foreach (var end in pieces)
        {
            var done = start;
            foreach (var match in split.EnumerateMatches(text[start..end]))
            {
                if (match.Length == 0)
                    continue;
                if (start + match.Index > done)
                    ends.Add(start + match.Index);
                done = start + match.Index + match.Length;
                ends.Add(done);
            }

            if (done < end)
                ends.Add(end);
            start = end;
        }

        return ends;
    }

    /// .NET's patterns see UTF-16: one character of the same category stands for each rune above U+FFFF.
    private static ReadOnlySpan<char> Flat(ReadOnlySpan<char> text)
    {
        var flat = new StringBuilder(text.Length);
        foreach (var rune in text.EnumerateRunes())
            flat.Append(rune.IsBmp ? (char)rune.Value : StandIn(Rune.GetUnicodeCategory(rune)));
        return flat.ToString();
    }

    private static List<int> Unflat(ReadOnlySpan<char> text, List<int> flatEnds)
    {
        var ends = new List<int>(flatEnds.Count);
        var (flat, at) = (0, 0);
        foreach (var end in flatEnds)
        {
            for (; flat < end; flat++)
                at += char.IsHighSurrogate(text[at]) ? 2 : 1;
            ends.Add(at);
        }

        return ends;
    }

    private static char StandIn(UnicodeCategory category) => category switch
    {
        <= UnicodeCategory.OtherLetter => 'α',
        <= UnicodeCategory.EnclosingMark => '\u0300',
        <= UnicodeCategory.OtherNumber => '²',
        >= UnicodeCategory.ConnectorPunctuation and <= UnicodeCategory.OtherPunctuation => '§',
        >= UnicodeCategory.MathSymbol and <= UnicodeCategory.OtherSymbol => '©',
        _ => '\u0001',
    };

    [GeneratedRegex(Digits)]
    private static partial Regex DigitsRegex();

    [GeneratedRegex(Han)]
    private static partial Regex HanRegex();

    [GeneratedRegex(Words)]
    private static partial Regex WordsRegex();
}

// Joins pieces of documentation to readable text: blanks collapse, examples keep their lines.

using System.Text;

namespace DeepSeekGraph.Runtime.Data;

/// Builds a member's text: runs of blanks become one, examples keep their lines.
internal sealed class DocWriter
{
    private readonly StringBuilder _text = new();
    private string? _label;
    private bool _blank;
    private bool _break;

    /// True until a paragraph has said something.
    public bool IsEmpty => _text.Length == 0;

    /// Begins a line with `label`, which is written only if text follows.
    public void BeginParagraph(string label)
    {
        _break = true;
        _label = label;
    }

    public void EndParagraph()
    {
        _label = null;
        _break = true;
    }

    /// The text that follows starts a line of its own.
    public void Break() => _break = true;

    /// Adds text, as it is when `verbatim` and it has lines; otherwise with blanks collapsed.
    public void Append(string text, bool verbatim)
    {
        if (verbatim && text.AsSpan().Trim().Contains('\n'))
        {
            _break = true;
            Separate();
            _text.AppendJoin('\n', WithoutMargin(text));
            _break = true;
            return;
        }

        foreach (var c in text)
        {
            if (char.IsWhiteSpace(c))
            {
                _blank = true;
                continue;
            }

            Separate();
            _text.Append(c);
        }
    }

    private void Separate()
    {
        if (_break && _text.Length > 0)
        {
            _text.Append('\n');
        }
        else if (_blank && !_break)
        {
            _text.Append(' ');
        }

        _text.Append(_label);
        _label = null;
        _break = false;
        _blank = false;
    }

    /// Lines of an example without the blanks that they all begin with, and without empty ends.
    private static IEnumerable<string> WithoutMargin(string text)
    {
        var lines = text.TrimEnd().Split('\n').SkipWhile(string.IsNullOrWhiteSpace).ToArray();
        var margin = lines
            .Where(line => !string.IsNullOrWhiteSpace(line))
            .Min(line => line.Length - line.TrimStart().Length);
        return lines.Select(line => line.Length > margin ? line[margin..].TrimEnd() : "");
    }

    public override string ToString() => _text.ToString();
}

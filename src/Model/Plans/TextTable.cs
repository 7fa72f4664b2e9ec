// A table as data: plain text for pipes and notebooks, or styled by whoever has a terminal.

using System.Text;

namespace DeepSeekGraph.Models;

/// Rows under a title and column heads; as text, the first column stands to the left, the others to the right.
public sealed record TextTable(string Title, IReadOnlyList<string> Head, IReadOnlyList<IReadOnlyList<string>> Rows)
{
    /// Widest cell of each column.
    public int[] Widths => [.. Head.Select((head, i) => Rows.Select(row => row[i].Length).Append(head.Length).Max())];

    /// Heads and rows without the title, two blanks in front.
    public string Plain()
    {
        var widths = Widths;
        var text = new StringBuilder();
        foreach (var row in Rows.Prepend(Head))
        {
            var cells = row.Select((cell, i) => i == 0 ? cell.PadRight(widths[i]) : cell.PadLeft(widths[i]));
            text.Append("  ").Append(string.Join("  ", cells).TrimEnd()).Append('\n');
        }

        return text.ToString();
    }
}

// Diagnostics and tables: styled on a terminal, plain text elsewhere.

using System.Runtime.CompilerServices;
using DeepSeekGraph.Models;
using Spectre.Console;
using Cell = Spectre.Console.Text;

namespace DeepSeekGraph.Cli;

internal static class Render
{
    /// More would hide the first, which often is the cause of the others.
    private const int MostFindings = 4;

    /// What a styled cell takes besides its text.
    private const int CellFrame = 3;

    /// A person looks at the output: not a file or pipe, and not told to be plain.
    public static bool IsTerminal { get; } = !Console.IsOutputRedirected && Fancy;

    private static bool Fancy => Environment.GetEnvironmentVariable("TERM") is { Length: > 0 } and not "dumb"
        && string.IsNullOrEmpty(Environment.GetEnvironmentVariable("NO_COLOR"));

    /// On the error stream, one for each code: further findings of a code follow its first.
    public static void Diagnostics(IReadOnlyList<Diagnostic> diagnostics)
    {
        foreach (var same in diagnostics.Distinct().GroupBy(d => d.Code))
        {
            var (first, others) = (same.First(), same.Skip(1).ToArray());
            var also = others.Take(MostFindings).Select(d => d.At == first.At ? d.Message : $"{d.Message} (at {d.At})");
            if (others.Length > MostFindings)
                also = also.Append($"{others.Length - MostFindings} more");
            Write(first, also);
        }
    }

    public static void Diagnostic(string code, string at, string message, string help)
        => Write(new Diagnostic(code, at, message, help), []);

    private static void Write(Diagnostic diagnostic, IEnumerable<string> also)
    {
        var text = diagnostic.ToString();
        if (!Console.IsErrorRedirected && Fancy)
            text = $"\e[1;31m{text[..5]}\e[0m{text[5..]}";
        Console.Error.WriteLine(text);
        foreach (var finding in also)
            Console.Error.WriteLine($"  also {finding}");
        Console.Error.WriteLine($"  see  dsg explain {diagnostic.Code}");
    }

    /// Names on the left, values on the right.
    public static void Pairs(IEnumerable<(string Name, string Value)> pairs)
    {
        var all = pairs.ToArray();
        var width = all.Max(pair => pair.Name.Length);
        foreach (var (name, value) in all)
            Console.WriteLine($"  {name.PadRight(width)}  {value}");
    }

    /// Title and rows.
    public static void Table(TextTable table)
    {
        Console.WriteLine(table.Title);
        Rows(table);
    }

    /// A table whose title is the command.
    public static void Table(IReadOnlyList<string> head, IReadOnlyList<IReadOnlyList<string>> rows)
        => Rows(new TextTable("", head, rows));

    private static void Rows(TextTable table)
    {
        if (IsTerminal && table.Widths.Sum(width => width + CellFrame) < Console.WindowWidth)
            Styled(table.Head, table.Rows);
        else
            Console.Write(table.Plain());
    }

    [MethodImpl(MethodImplOptions.NoInlining)]
    private static void Styled(IReadOnlyList<string> head, IReadOnlyList<IReadOnlyList<string>> rows)
    {
        var table = new Table { Border = TableBorder.Simple };
        for (var i = 0; i < head.Count; i++)
        {
            var column = new TableColumn(new Cell(head[i], new Style(decoration: Decoration.Bold)));
            table.AddColumn((i == 0 ? column : column.RightAligned()).NoWrap());
        }

        foreach (var row in rows)
            table.AddRow(row.Select(cell => new Cell(cell)));
        AnsiConsole.Write(table);
    }
}

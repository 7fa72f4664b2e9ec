// dsg explain: the page of a diagnostic code, carried by the program.

using System.CommandLine;
using System.Reflection;

namespace DeepSeekGraph.Cli;

internal static class Explain
{
    private const string Folder = "errors/";

    public static Command Verb()
    {
        var code = new Argument<string>("CODE") { Description = "A code such as DSG0301" };
        var verb = new Command("explain", "Print what a diagnostic code means and how to mend it") { code };
        verb.SetAction(parse => Print(parse.GetValue(code)!));
        return verb;
    }

    private static int Print(string code)
    {
        var assembly = Assembly.GetExecutingAssembly();
        using var page = assembly.GetManifestResourceStream($"{Folder}{code.ToUpperInvariant()}.md");
        if (page is null)
        {
            Render.Diagnostic(
                Codes.OptionValue,
                "dsg explain",
                $"there is no code '{code}'",
                Nearest.Help(code, Known(assembly)));
            return ExitCode.Diagnostics;
        }

        using var reader = new StreamReader(page);
        Console.Out.Write(reader.ReadToEnd());
        return ExitCode.Ok;
    }

    private static IEnumerable<string> Known(Assembly assembly) => assembly.GetManifestResourceNames()
        .Where(name => name.StartsWith(Folder, StringComparison.Ordinal))
        .Select(name => Path.GetFileNameWithoutExtension(name[Folder.Length..]));
}

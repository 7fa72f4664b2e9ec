// dsg passes: the list of passes that every compilation runs, each with why it stands where it does.

using System.CommandLine;
using System.Globalization;
using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Cli;

internal static class ListPasses
{
    public static Command Verb()
    {
        var verb = new Command("passes", "List the passes of the compiler, in order, and why each stands there");
        verb.SetAction(_ => All());
        return verb;
    }

    private static int All()
    {
        var list = Pipeline.passes.Select((pass, i) =>
            (string.Create(CultureInfo.InvariantCulture, $"{i + 1} {pass.Name}"), pass.Why));
        Render.Pairs(list);
        Console.WriteLine("\nwhat each pass leaves is verified before the next; dsg compile --dump DIR writes it down");
        return ExitCode.Ok;
    }
}

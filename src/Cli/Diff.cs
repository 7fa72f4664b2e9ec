// dsg diff: what two plans do differently.

using System.CommandLine;
using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Cli;

internal static class Diff
{
    /// More lines of one part are counted, not printed.
    private const int MostLines = 40;

    public static Command Verb()
    {
        var first = new Argument<string>("A") { Description = "A plan file" };
        var second = new Argument<string>("B") { Description = "Another" };
        var all = new Option<bool>("--all") { Description = $"Every line, not the first {MostLines} of each part" };
        var verb = new Command(
            "diff", "Compare two plans: settings, parameters, slots, steps, memory; exit code 0 equal, 1 different")
        {
            first, second, all,
        };
        verb.SetAction(parse => Compare(
            parse.GetValue(first)!, parse.GetValue(second)!, parse.GetValue(all) ? int.MaxValue : MostLines));
        return verb;
    }

    private static int Compare(string first, string second, int most)
    {
        var (a, b) = (Sound(first), Sound(second));
        var sections = PlanDiff.run(a, b);
        if (sections.Count == 0)
        {
            Console.WriteLine($"the plans are equal: {PlanFile.Hash(a)}");
            return ExitCode.Ok;
        }

        Console.WriteLine($"- {PlanFile.Hash(a)} {first}");
        Console.WriteLine($"+ {PlanFile.Hash(b)} {second}");
        foreach (var section in sections)
        {
            Console.WriteLine($"\n{section.Title}");
            foreach (var line in section.Lines.Take(most))
                Console.WriteLine($"  {line}");
            if (section.Lines.Count > most)
                Console.WriteLine($"  {section.Lines.Count - most} more lines; --all prints them");
        }

        return ExitCode.Different;
    }

    /// A plan whose ids name what they should: others cannot be compared.
    private static PlanSet Sound(string path)
    {
        var plan = PlanFile.Read(path);
        Jobs.Check(plan, path);
        return plan;
    }
}

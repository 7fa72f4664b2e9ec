// dsg show: a plan as text.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class Show
{
    public static Command Verb()
    {
        var file = new Argument<string>("PLAN") { Description = "A plan file" };
        var brief = new Option<bool>("--summary") { Description = "Only degrees, layout, collectives and memory" };
        var verb = new Command("show", "Print a plan: every step of every stage") { file, brief };
        verb.SetAction(parse => Print(parse.GetValue(file)!, parse.GetValue(brief)));
        return verb;
    }

    private static int Print(string path, bool brief)
    {
        var plan = PlanFile.Read(path);
        if (brief)
            Summary.Print(plan);
        else
            Console.Out.Write(PlanFile.Print(plan));
        return ExitCode.Ok;
    }
}

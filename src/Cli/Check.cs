// dsg check: proves that a plan can run.

using System.CommandLine;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class Check
{
    public static Command Verb()
    {
        var file = new Argument<string>("PLAN") { Description = "A plan file" };
        var verb = new Command(
            "check",
            "Prove that a plan cannot deadlock, read before write or reduce twice") { file };
        verb.SetAction(parse => Prove(parse.GetValue(file)!));
        return verb;
    }

    private static int Prove(string path)
    {
        var plan = PlanFile.Read(path);
        Jobs.Check(plan, path);
        Console.WriteLine($"{path}: the plan of {PlanSummary.Count(PlanSummary.Ranks(plan), "rank")} holds");
        return ExitCode.Ok;
    }
}

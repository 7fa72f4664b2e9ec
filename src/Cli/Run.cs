// dsg run: executes a plan file.

using System.CommandLine;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class Run
{
    public static Command Verb()
    {
        var file = new Argument<string>("PLAN") { Description = "A plan file" };
        var options = new RunOptions();
        var verb = new Command("run", "Train with a plan file: the same bits as `dsg pretrain`") { file };
        options.AddTo(verb);
        verb.SetAction(parse => Launched.Run(launched => Start(parse.GetValue(file)!, options.Read(parse, launched), launched)));
        return verb;
    }

    private static int Start(string path, RunChoices choices, Launched launched)
    {
        launched.Announce(choices.Device);
        var plan = PlanFile.Read(path);
        Jobs.Check(plan, path);
        if (PlanSummary.Generates(plan))
        {
            throw DiagnosticException.Of(
                Codes.PlanMode, path, "the plan generates, it does not train", "give a plan of mode train; dsg generate compiles the plans that generate");
        }

        // a plan file does not say how long it is trained: its recipe does
        var recipe = Recipes.All.FirstOrDefault(recipe => recipe.Name == PlanSummary.Name(plan)) ?? Recipes.Proxy;
        using var resumed = Resumed.Open(choices, launched);
        return Training.Run(plan, choices.Over(resumed?.Over(recipe.Training) ?? recipe.Training), choices, resumed, launched);
    }
}

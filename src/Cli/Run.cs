// dsg run: executes a plan file.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class Run
{
    public static Command Verb()
    {
        var file = new Argument<string>("PLAN") { Description = "A plan file" };
        var options = new RunOptions();
        var verb = new Command("run", "Train with a plan file: the same bits as `dsg pretrain`") { file };
        options.AddTo(verb);
        verb.SetAction(parse => Start(parse.GetValue(file)!, options.Read(parse)));
        return verb;
    }

    private static int Start(string path, RunChoices choices)
    {
        var plan = PlanFile.Read(path);
        Jobs.Check(plan, path);
        return Training.Run(plan, choices);
    }
}

// dsg compile: a recipe becomes a plan file.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class Compile
{
    public static Command Verb()
    {
        var job = new JobOptions();
        var target = new Option<string>("--out")
        {
            HelpName = "FILE",
            Description = "The plan file to write",
            Required = true,
        };
        var verb = new Command("compile", "Compile a recipe into a plan file, which `dsg run` executes");
        job.AddTo(verb);
        verb.Add(target);
        verb.SetAction(parse => Write(job.Read(parse), parse.GetValue(target)!));
        return verb;
    }

    private static int Write(JobChoices choices, string path)
    {
        var plan = Jobs.Compile(choices);
        PlanFile.Write(path, plan);
        Summary.Print(plan);
        Console.WriteLine($"\nchecked and written to {path}");
        return ExitCode.Ok;
    }
}

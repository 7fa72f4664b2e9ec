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
        var code = new Option<string?>(EmittedCode.Option)
        {
            HelpName = "DIR",
            Description = "New or empty folder for the C# that will run the plan, a file a stage, to read",
        };
        var verb = new Command("compile", "Compile a recipe into a plan file, which `dsg run` executes");
        job.AddTo(verb);
        verb.Add(target);
        verb.Add(code);
        verb.SetAction(parse => Write(job.Read(parse), parse.GetValue(target)!, parse.GetValue(code)));
        return verb;
    }

    private static int Write(JobChoices choices, string path, string? code)
    {
        if (code is not null)
            EmittedCode.RefuseUsed(code);
        var plan = Jobs.Compile(choices);
        PlanFile.Write(path, plan);
        Summary.Print(plan);
        Console.WriteLine($"\nchecked and written to {path}");
        if (code is not null)
        {
            EmittedCode.Write(plan, code);
            Console.WriteLine($"its C# is in {code}");
        }

        return ExitCode.Ok;
    }
}

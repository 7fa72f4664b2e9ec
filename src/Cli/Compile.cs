// dsg compile: a recipe becomes a plan file.

using System.CommandLine;

namespace DeepSeekGraph.Cli;

internal static class Compile
{
    public static Command Verb()
    {
        var job = new JobOptions();
        var form = new Option<string>("--format")
        {
            HelpName = "text|binary",
            Description = "text: to read and compare; binary: to ship, less than half the size; every command reads both",
            DefaultValueFactory = _ => "text",
        };
        var dump = new Option<string?>("--dump")
        {
            HelpName = "DIR",
            Description = "Also write what each pass leaves as numbered text files into a new or empty folder",
        };
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
        verb.Add(form);
        verb.Add(code);
        verb.Add(dump);
        verb.SetAction(parse =>
            Write(
                job.Read(parse),
                parse.GetValue(target)!,
                FormOf(parse.GetValue(form)!),
                parse.GetValue(dump),
                parse.GetValue(code)));
        return verb;
    }

    private static PlanForm FormOf(string name) => name switch
    {
        "text" => PlanForm.Text,
        "binary" => PlanForm.Binary,
        _ => throw DiagnosticException.Of(
            Codes.OptionValue, "--format", $"there is no form '{name}'", Nearest.Help(name, ["text", "binary"])),
    };

    private static int Write(JobChoices choices, string path, PlanForm form, string? dump, string? code)
    {
        if (code is not null)
            EmittedCode.RefuseUsed(code);
        var job = Jobs.Chosen(choices);
        if (choices.Set.FirstOrDefault(Overrides.IsTraining) is { } unused)
        {
            throw DiagnosticException.Of(
                Codes.UnknownSetting,
                "--set",
                $"'{unused.Split('=')[0]}' changes no plan",
                "leave it out here, and give it to dsg pretrain");
        }

        var plan = dump is null ? job.Compile() : Dump.Compile(job, dump);
        PlanFile.Write(path, plan, form);
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

// dsg explain: what a plan comes to and why; or the page of a diagnostic code, carried by the program.

using System.CommandLine;
using System.Reflection;
using System.Text.Json;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class Explain
{
    private const string Folder = "errors/";
    private const string CodePrefix = "DSG";
    private const int DefaultGpus = 8;
    private static readonly JsonSerializerOptions Indented = new() { WriteIndented = true };

    public static Command Verb()
    {
        var what = new Argument<string>("PLAN|CODE") { Description = "A plan file, or a code such as DSG0301" };
        var json = new Option<bool>("--json") { Description = "As one JSON object, every collective by itself" };
        var gpus = new Option<int>("--gpus-per-node")
        {
            HelpName = "N",
            Description = "Ranks of a node; what goes further is inter-node",
            DefaultValueFactory = _ => DefaultGpus,
        };
        var verb = new Command(
            "explain",
            "Print a plan's parameters, FLOPs, memory, and every collective with its cause; or what a code means")
        {
            what, json, gpus,
        };
        verb.SetAction(parse =>
        {
            var target = parse.GetValue(what)!;
            return target.StartsWith(CodePrefix, StringComparison.OrdinalIgnoreCase) && !File.Exists(target)
                ? Page(target)
                : Plan(target, parse.GetValue(gpus), parse.GetValue(json));
        });
        return verb;
    }

    private static int Plan(string path, int gpus, bool json)
    {
        if (gpus < 1)
        {
            throw DiagnosticException.Of(
                Codes.OptionValue, "--gpus-per-node", $"a node of {gpus} has no ranks", "give 1 or more");
        }

        var plan = PlanFile.Read(path);
        Jobs.Check(plan, path);
        var told = new PlanExplanation(plan, gpus);
        if (json)
        {
            Console.WriteLine(told.ToJson().ToJsonString(Indented));
            return ExitCode.Ok;
        }

        Summary.Print(plan);
        Console.WriteLine();
        Render.Table(told.FlopsAsTable());
        if (told.Products.Count > 0)
        {
            Console.WriteLine();
            Render.Table(told.ProductsAsTable());
        }

        if (told.Paths.Count > 0)
        {
            Console.WriteLine();
            Render.Table(told.PathsAsTable());
        }

        Console.WriteLine();
        Render.Table(told.CollectivesAsTable());
        return ExitCode.Ok;
    }

    private static int Page(string code)
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

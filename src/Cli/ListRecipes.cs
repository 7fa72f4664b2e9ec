// dsg recipes: the jobs that are known by name.

using System.CommandLine;
using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class ListRecipes
{
    private static readonly JsonSerializerOptions Indented = new() { WriteIndented = true };

    public static Command Verb()
    {
        var name = new Argument<string>("RECIPE") { Description = "A recipe of the list" };
        var json = new Option<bool>("--json") { Description = "As one JSON object" };
        var set = JobOptions.SetOption();
        var show = new Command("show", "Print all settings of one recipe, by the names that --set takes")
        {
            name, json, set,
        };
        show.SetAction(parse => One(
            Overrides.Apply(Jobs.Named(parse.GetValue(name)!), parse.GetValue(set) ?? []), parse.GetValue(json)));
        var verb = new Command("recipes", "List the recipes") { show };
        verb.SetAction(_ => All());
        return verb;
    }

    private static int All()
    {
        Render.Table(
            ["recipe", "layers", "hidden", "experts", "ranks", "TP", "PP", "EP", "DP", "batch", "seq length"],
            [.. Recipes.All.Select(Row)]);
        Console.WriteLine("\n`dsg recipes show RECIPE` prints all settings of one");
        return ExitCode.Ok;
    }

    private static IReadOnlyList<string> Row(NamedRecipe named)
    {
        var mesh = Compilation.Mesh(named.Recipe);
        int[] numbers =
        [
            named.Config.NumHiddenLayers, named.Config.HiddenSize, named.Config.NRoutedExperts, Mesh.world(mesh),
            mesh.Tensor, mesh.Pipeline, mesh.Expert, mesh.Data, named.Recipe.GlobalBatch, named.Recipe.SeqLength,
        ];
        return [named.Name, .. numbers.Select(n => n.ToString(CultureInfo.InvariantCulture))];
    }

    private static int One(NamedRecipe named, bool json)
    {
        var parts = Overrides.All(named).GroupBy(field => field.Key.Split('.')[0]);
        if (json)
        {
            var all = new JsonObject();
            foreach (var part in parts)
                all[part.Key] = new JsonObject(part.Select(f => KeyValuePair.Create(Short(f), Node(f))));
            Console.WriteLine(all.ToJsonString(Indented));
            return ExitCode.Ok;
        }

        foreach (var (i, part) in parts.Index())
        {
            Console.WriteLine($"{(i == 0 ? "" : "\n")}{part.Key}");
            Render.Pairs(part.Select(field => (Short(field), field.Text)));
        }

        return ExitCode.Ok;
    }

    private static string Short(RecordField field) => field.Key[(field.Key.IndexOf('.', StringComparison.Ordinal) + 1)..];

    /// Settings of the recipe are kept as text: what reads as a number or a flag is one.
    private static JsonNode? Node(RecordField field) => field.Value switch
    {
        null => null,
        bool flag => flag,
        int number => number,
        ulong number => number,
        double number => number,
        IReadOnlyList<string> many => new JsonArray([.. many.Select(one => JsonValue.Create(one))]),
        _ when field.Text is "true" or "false" => field.Text == "true",
        _ when long.TryParse(field.Text, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture, out var n) => n,
        _ when double.TryParse(field.Text, NumberStyles.Float, CultureInfo.InvariantCulture, out var x) => x,
        _ => field.Text,
    };
}

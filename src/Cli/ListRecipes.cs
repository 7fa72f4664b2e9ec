// dsg recipes: the jobs that are known by name.

using System.CommandLine;
using System.Globalization;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class ListRecipes
{
    public static Command Verb()
    {
        var name = new Argument<string>("RECIPE") { Description = "A recipe of the list" };
        var show = new Command("show", "Print all settings of one recipe") { name };
        show.SetAction(parse => One(parse.GetValue(name)!));
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

    private static int One(string name)
    {
        var named = Jobs.Named(name);
        Console.WriteLine("recipe");
        Render.Pairs(RecipeSettings.lines(named.Recipe).Select(line => line.Split('=', 2)).Select(pair => (pair[0], pair[1])));
        Console.WriteLine("\nmodel");
        Render.Pairs(typeof(DeepSeekV3Config).GetProperties()
            .Where(property => property.CanWrite)
            .Select(property => (property.Name, Text(property.GetValue(named.Config)))));
        return ExitCode.Ok;
    }

    private static string Text(object? value) => Convert.ToString(value, CultureInfo.InvariantCulture) ?? "-";
}

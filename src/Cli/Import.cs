// dsg import: a published checkpoint becomes one that runs start from, cut for any layout.

using System.CommandLine;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;
using DeepSeekGraph.Models.HuggingFace;

namespace DeepSeekGraph.Cli;

internal static class Import
{
    public static Command Verb()
    {
        var folder = new Option<string?>("--hf") { HelpName = "DIR", Description = "A checkpoint of Hugging Face, or its name in the local cache" };
        var root = new Option<string?>("--out")
        {
            HelpName = "DIR",
            Description = "Root of checkpoints: iter_0000000 is written there, for --resume and dsg export",
        };
        var dtype = new Option<string?>("--dtype")
        {
            HelpName = "fp32|bf16",
            Description = "Type of the weights; without, as they are (fp8 becomes bf16)",
        };
        var notStrict = new Option<bool>("--not-strict")
        {
            Description = "Go on where tensors are missing, unknown, of another shape or not finite: what is missing starts as in a new model",
        };
        var noMtp = new Option<bool>("--no-mtp") { Description = "Leave multi-token prediction out" };
        var degrees = new DegreeOptions();
        var chunks = JobOptions.Number("--vp", "Chunks of the model on each pipeline rank");
        var verb = new Command("import", "Make a checkpoint of published weights") { folder, root, dtype, notStrict, noMtp, chunks };
        degrees.AddTo(verb);
        verb.SetAction(parse => Start(
            JobOptions.Required(parse, folder),
            JobOptions.Required(parse, root),
            RecipeOf(degrees, JobOptions.Degree(parse, chunks) ?? 1, parse),
            parse.GetValue(noMtp),
            new ImportOptions { DType = JobOptions.DTypeOf(parse.GetValue(dtype)), Strict = !parse.GetValue(notStrict) }));
        return verb;
    }

    private static int Start(string folder, string root, Recipe recipe, bool noMtp, ImportOptions options)
    {
        Launched.RequireAlone("import");
        using var bridge = AutoBridge.FromHfPretrained(folder, noMtp);
        var progress = new ByteProgress("import");
        var outcome = CheckpointImport.Write(bridge, root, model => (model with { Observe = true }).Compile(recipe), options with
        {
            Kept = [.. SmallFiles.In(bridge.Folder, SmallFiles.All)],
            Progress = progress.Show,
        });
        progress.Close(outcome.Bytes);
        foreach (var warning in outcome.Warnings)
            Console.WriteLine($"warning {warning.Code}: {warning.Message}\n  at   {warning.At}");
        Console.WriteLine($"{PlanSummary.Name(outcome.Plan)}: {PlanSummary.Parameters(outcome.Plan):N0} parameters, cut for "
            + $"{PlanSummary.Count(PlanSummary.Ranks(outcome.Plan), "rank")}, in {root}");
        return ExitCode.Ok;
    }

    /// Only where parameters lie matters: a short sequence, and no backward pass, which doubles the time to compile. Chunks take turns
    /// by microbatches, which a plan without one does not have.
    private static Recipe RecipeOf(DegreeOptions degrees, int chunks, ParseResult parse)
    {
        var recipe = degrees.Over(Recipe.Default.WithName("imported"), parse).WithVirtualPipeline(chunks);
        var mesh = Compilation.Mesh(recipe);
        return chunks == 1
            ? recipe.WithMode(Mode.Generate).WithBatch(mesh.Data, 1, 2 * mesh.Tensor)
            : recipe.WithBatch(mesh.Data * mesh.Pipeline, 1, 2 * mesh.Tensor);
    }
}

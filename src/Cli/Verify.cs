// dsg verify: compares a checkpoint's model, under any layout, with what another implementation computed from it.

using System.CommandLine;
using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;
using DeepSeekGraph.Models.HuggingFace;

namespace DeepSeekGraph.Cli;

internal static class Verify
{
    private const string DefaultReference = "reference.safetensors";
    private const string Gradient = "grad.";
    private static readonly JsonSerializerOptions Indented = new() { WriteIndented = true };

    private static readonly Option<string> Folder = new("--hf")
    {
        HelpName = "DIR",
        Description = "A checkpoint's folder, or a hub name in the local Hugging Face cache",
        Required = true,
    };

    private static readonly Option<string?> Reference = new("--reference")
    {
        HelpName = "FILE",
        Description = $"input_ids and what was computed from them; without, {DefaultReference} in the folder",
    };

    private static readonly Option<string?> Gradients = new("--grads")
    {
        HelpName = "FILE",
        Description = "Gradients of the loss by tensor, named grad.TENSOR",
    };

    private static readonly DegreeOptions Degrees = new();
    private static readonly Option<int?> Context = JobOptions.Number("--cp", "Context parallel degree");

    private static readonly Option<string> DTypeName = new("--dtype")
    {
        HelpName = "fp32|bf16",
        Description = "What matrices are multiplied in",
        DefaultValueFactory = _ => "fp32",
    };

    // spelled out: help must not load the model
    private static readonly Option<double?> Tolerance = new("--tolerance")
    {
        HelpName = "X",
        Description = "Largest max|a-b| / max|b| of an item; without, 0.0001 in fp32 and 0.75 in bf16. Tokens must be equal",
    };

    private static readonly DeviceOption Device = new();

    private static readonly Option<bool> Strict = new("--strict") { Description = "Fail on items that nothing is compared with" };
    private static readonly Option<bool> NoMtp = new("--no-mtp") { Description = "Load the model without multi-token prediction" };
    private static readonly Option<bool> Json = new("--json") { Description = "As one JSON object, every gradient by itself" };

    public static Command Verb()
    {
        var verb = new Command("verify", "Compare logits, losses, gradients and greedy tokens of a checkpoint with a reference");
        foreach (var option in (Option[])[
            Folder, Reference, Gradients, Context, DTypeName, Tolerance, Strict, NoMtp, Json])
            verb.Add(option);
        Degrees.AddTo(verb);
        Device.AddTo(verb);
        verb.SetAction(Start);
        return verb;
    }

    private static int Start(ParseResult parse)
    {
        Launched.RequireAlone("verify");
        var device = Device.Read(parse);
        using var bridge = AutoBridge.FromHfPretrained(parse.GetValue(Folder)!, parse.GetValue(NoMtp));
        var reference = parse.GetValue(Reference) ?? Path.Combine(bridge.Folder, DefaultReference);
        using var verification = Verification.Prepare(
            bridge, reference, parse.GetValue(Gradients), RecipeOf(parse), parse.GetValue(Tolerance));
        ThisMachine.RequireRoomFor(verification.Plan, device: device);
        var result = verification.RunAsync(device: device).GetAwaiter().GetResult();
        if (parse.GetValue(Json))
            Console.WriteLine(ToJson(verification.Plan, result).ToJsonString(Indented));
        else
            Print(verification.Plan, result);
        return Judge(result, reference, parse.GetValue(Strict));
    }

    private static Recipe RecipeOf(ParseResult parse)
    {
        return Degrees.Over(Recipe.Default.WithName("verify"), parse)
            .WithContextParallel(JobOptions.Degree(parse, Context) ?? 0)
            .WithDType(JobOptions.DTypeOf(parse.GetValue(DTypeName))!);
    }

    /// Items beyond their tolerance are DSG0713; with --strict, items not compared are DSG0714.
    private static int Judge(VerificationResult result, string reference, bool strict)
    {
        var found = new List<Diagnostic>();
        if (result.Items.Where(item => !item.IsWithin).ToArray() is [var first, ..] beyond)
        {
            found.Add(new Diagnostic(
                Codes.ReferenceDiffers,
                reference,
                string.Create(
                    CultureInfo.InvariantCulture,
                    $"{beyond.Length} of {PlanSummary.Count(result.Items.Count, "item")} beyond their tolerance, first {first.Name}:"
                    + $" relative error {first.Relative:g2}, tolerance {first.Tolerance:g2}"),
                "compare at --dtype fp32 first; then look at the earliest hidden state that differs"));
        }

        if (strict)
        {
            found.AddRange(result.NotCompared.Select(name => new Diagnostic(
                Codes.ReferenceNotCompared,
                reference,
                $"nothing is compared with {name}",
                "known items are logits, mtp_logits, hidden_1 ..., hidden_last, loss, main_loss, mtp_loss, total_loss,"
                + " generated_ids, grad.NAME")));
        }

        if (found.Count == 0)
            return ExitCode.Ok;
        Render.Diagnostics(found);
        return ExitCode.Diagnostics;
    }

    /// A row for each item; of gradients, the worst, and those beyond their tolerance.
    private static void Print(PlanSet plan, VerificationResult result)
    {
        Console.WriteLine(Heading(plan));
        var gradients = result.Items.Where(IsGradient).ToArray();
        var rows = result.Items.Where(item => !IsGradient(item)).Select(item => Row(item, item.Name)).ToList();
        if (gradients.MaxBy(item => item.Relative) is { } worst)
        {
            rows.Add(Row(worst, $"{PlanSummary.Count(gradients.Length, "gradient")}, worst {worst.Name[Gradient.Length..]}"));
            rows.AddRange(gradients.Where(item => !item.IsWithin && item != worst).Select(item => Row(item, item.Name)));
        }

        Render.Table(["item", "shape", "max abs", "relative", "tolerance", ""], rows);
        if (result.NotCompared.Count > 0)
            Console.WriteLine($"not compared: {string.Join(", ", result.NotCompared)}");
        foreach (var item in result.Items.Where(item => item.Remark != ""))
            Console.WriteLine($"{item.Name}: {item.Remark}");
    }

    private static string Heading(PlanSet plan)
    {
        var mesh = plan.Mesh;
        return $"{PlanSummary.Count(PlanSummary.Ranks(plan), "rank")}: TP {mesh.Tensor} x PP {mesh.Pipeline} x DP {mesh.Data}, EP {mesh.Expert}";
    }

    private static string[] Row(VerifiedItem item, string name) =>
    [
        name,
        $"[{string.Join(", ", item.Shape)}]",
        item.MaxAbs.ToString("0.0e+00", CultureInfo.InvariantCulture),
        item.Relative.ToString("0.0e+00", CultureInfo.InvariantCulture),
        item.Tolerance.ToString("g2", CultureInfo.InvariantCulture),
        item.IsWithin ? "ok" : "DIFFERS",
    ];

    private static JsonObject ToJson(PlanSet plan, VerificationResult result) => new()
    {
        ["plan"] = Heading(plan),
        ["within"] = result.IsWithin,
        ["items"] = new JsonArray([.. result.Items.Select(item => new JsonObject
        {
            ["name"] = item.Name,
            ["shape"] = new JsonArray([.. item.Shape.Select(extent => JsonValue.Create(extent))]),
            ["max_abs"] = Finite(item.MaxAbs),
            ["relative"] = Finite(item.Relative),
            ["tolerance"] = item.Tolerance,
            ["within"] = item.IsWithin,
            ["remark"] = item.Remark,
        })]),
        ["not_compared"] = new JsonArray([.. result.NotCompared.Select(name => JsonValue.Create(name))]),
    };

    /// JSON has no infinity.
    private static JsonValue? Finite(double value) => double.IsFinite(value) ? JsonValue.Create(value) : null;

    private static bool IsGradient(VerifiedItem item) => item.Name.StartsWith(Gradient, StringComparison.Ordinal);
}

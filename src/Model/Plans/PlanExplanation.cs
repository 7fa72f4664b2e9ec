// What a plan comes to: parameters, FLOPs, memory by kind and rank, and every collective with what caused it.

using System.Globalization;
using System.Text.Json.Nodes;
using System.Text.RegularExpressions;
using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// Everything that `dsg explain` says of a plan, on nodes of `GpusPerNode`. `Routing`: what tokens chose in a step; null: any
/// choice that the routers may make is as likely as any other.
public sealed partial record PlanExplanation(PlanSet Plan, int GpusPerNode, IRouting? Routing = null)
{
    /// FLOPs for each token, part by part.
    public IReadOnlyList<FlopsRow> Flops { get; } = FlopsTable.Of(Plan, RecordFields.ConfigOf(Plan.Recipe));

    /// Every collective of every stage, in program order.
    public IReadOnlyList<CollectiveLine> Collectives { get; } = PlanTraffic.lines(GpusPerNode, Routing, Plan);

    /// What the figures of routed rows rest on; empty where nothing is routed.
    public string Assumption { get; } = PlanTraffic.assumption(Routing, Plan);

    /// Is the model known, so that the formula can be computed?
    public bool KnowsModel { get; } = RecordFields.ConfigOf(Plan.Recipe) is not null;

    /// Matrix products, of all layers together: what is multiplied, in what type; none unless some are in fp8.
    public IReadOnlyList<ProductRow> Products { get; } = ProductTable.Of(Plan);

    /// Which code a GPU runs for the kernels that it has two for; none for a plan without such kernels.
    public IReadOnlyList<PathRow> Paths { get; } = PlanPaths.list(Plan);

    /// Parts with FLOPs, and their sums.
    public TextTable FlopsAsTable()
    {
        var total = new FlopsRow("total", Flops.Sum(r => r.Formula), Flops.Sum(r => r.Plan), "");
        return new TextTable(
            KnowsModel
                ? "FLOPs of a token: Megatron's formula, what all ranks of this plan execute, and why they differ"
                : "FLOPs of a token that all ranks of this plan execute (it does not record its model: no formula)",
            ["part", "formula", "plan", "difference", "why"],
            [.. Flops.Append(total).Select(row => (string[])
                [row.Part, Whole(row.Formula), Whole(row.Plan), Whole(row.Difference), row.Why])]);
    }

    /// Which products run in fp8, and in which blocks.
    public TextTable ProductsAsTable() => ProductTable.AsTable(Products);

    /// Which code a GPU runs, and why where it is not the library's.
    public TextTable PathsAsTable() => new(
        "which code a GPU runs for kernels that it has two for: launches of a step, over all stages; a processor has one",
        ["kernel", "path", "why", "launches"],
        [.. Paths.Select(row => (string[])[PlanNames.kernel(row.Kernel), row.Path.Name, row.Why, Whole(row.Launches)])]);

    /// Collectives of equal rule, layer numbers left out: how often in a step of one rank of all stages, and their bytes.
    public TextTable CollectivesAsTable() => new(
        $"collectives of a step: times over all stages; bytes of an operand, sent by a rank, and to other nodes of {GpusPerNode}"
            + (Assumption.Length == 0 ? "" : $"\nrouted rows: {Assumption}"),
        ["rule", "at", "program", "kind", "group", "ranks", "times", "bytes", "sent", "inter-node", "link"],
        [.. Collectives
            .GroupBy(c => (
                Rule: General(c.Rule), At: General(c.Path), Program: c.Program.Split('@')[0], c.Kind,
                Group: General(c.Group), c.Members, c.Bytes, c.Sent, c.InterNode, c.Link))
            .Select(same => (string[])
            [
                same.Key.Rule, same.Key.At, same.Key.Program, same.Key.Kind, same.Key.Group, $"{same.Key.Members}",
                Whole(same.Sum(c => (long)c.Runs)), Whole(same.Key.Bytes), Whole(same.Key.Sent),
                Whole(same.Key.InterNode), same.Key.Link,
            ])]);

    /// All of it, every collective by itself.
    public JsonObject ToJson() => new()
    {
        ["hash"] = PlanFile.Hash(Plan),
        ["recipe"] = PlanSummary.Name(Plan),
        ["ranks"] = PlanSummary.Ranks(Plan),
        ["gpus_per_node"] = GpusPerNode,
        ["parameters"] = PlanSummary.Parameters(Plan),
        ["flops_per_token"] = new JsonObject
        {
            ["formula"] = KnowsModel ? Flops.Sum(row => row.Formula) : null,
            ["plan"] = Flops.Sum(row => row.Plan),
            ["parts"] = new JsonArray([.. Flops.Select(row => (JsonNode)new JsonObject
            {
                ["part"] = row.Part,
                ["formula"] = KnowsModel ? row.Formula : null,
                ["plan"] = row.Plan,
                ["difference"] = KnowsModel ? row.Difference : null,
                ["why"] = row.Why,
            })]),
        },
        ["memory"] = new JsonArray([.. Plan.Memory.Select(row => (JsonNode)new JsonObject
        {
            ["stage"] = row.Stage,
            ["units"] = Plan.Stages[row.Stage].Units,
            ["ranks"] = PlanSummary.Ranks(Plan) / Plan.Stages.Count,
            ["parameters"] = row.Parameters,
            ["optimizer"] = row.Optimizer,
            ["gradients"] = row.Gradients,
            ["counters"] = row.Counters,
            ["activations"] = row.Activations,
            ["collectives"] = row.Collectives,
            ["peak"] = row.Peak,
            ["headroom"] = row.Headroom,
            ["worst"] = row.Worst,
            ["arena"] = row.Arena,
        })]),
        ["products"] = new JsonArray([.. Products.Select(row => (JsonNode)row.ToJson())]),
        ["paths"] = new JsonArray([.. Paths.Select(row => (JsonNode)new JsonObject
        {
            ["kernel"] = PlanNames.kernel(row.Kernel),
            ["path"] = row.Path.Name,
            ["why"] = row.Why,
            ["launches"] = row.Launches,
        })]),
        ["routing"] = Assumption,
        ["collectives"] = new JsonArray([.. Collectives.Select(c => (JsonNode)new JsonObject
        {
            ["stage"] = c.Stage,
            ["program"] = c.Program,
            ["kind"] = c.Kind,
            ["rule"] = c.Rule,
            ["path"] = c.Path,
            ["group"] = c.Group,
            ["ranks"] = c.Members,
            ["runs"] = c.Runs,
            ["bytes"] = c.Bytes,
            ["sent"] = c.Sent,
            ["inter_node"] = c.InterNode,
            ["step_sent"] = c.StepSent,
            ["step_inter_node"] = c.StepInterNode,
            ["link"] = c.Link,
        })]),
    };

    /// Layers and stages by a star: model.layers.7.mlp -> model.layers.*.mlp
    internal static string General(string text) => Number().Replace(text, "*");

    private static string Whole(double value) => Math.Round(value).ToString("N0", CultureInfo.InvariantCulture);

    [GeneratedRegex(@"(?<=[. -])\d+(?=[. ,:-]|$)")]
    private static partial Regex Number();
}

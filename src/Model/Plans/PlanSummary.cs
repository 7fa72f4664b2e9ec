// A plan in a few lines and one table a stage: degrees, layout, batch, collectives and memory.

using System.Globalization;
using System.Text;
using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// Plans as text for people; the whole plan is what the compiler writes to files.
public static class PlanSummary
{
    /// Lines and tables in plain text.
    public static string Summary(this PlanSet plan)
    {
        var lines = Lines(plan).ToArray();
        var width = lines.Max(line => line.Name.Length);
        var text = new StringBuilder("plan\n");
        foreach (var (name, value) in lines)
            text.Append(CultureInfo.InvariantCulture, $"  {name.PadRight(width)}  {value}\n");
        foreach (var table in (TextTable[])[Traffic(plan), Memory(plan, null)])
            text.Append(CultureInfo.InvariantCulture, $"\n{table.Title}\n{table.Plain()}");
        return text.ToString();
    }

    /// Recipe, sizes, degrees, layout, batch, precision and hash.
    public static IEnumerable<(string Name, string Value)> Lines(PlanSet plan)
    {
        var mesh = plan.Mesh;
        var sequences = plan.Microbatches * plan.MicroBatch;
        var split = mesh.Tensor > 1 && Setting(plan, "sequence_parallel") != "false";
        yield return ("recipe", Name(plan));
        yield return ("parameters", string.Create(
            CultureInfo.InvariantCulture, $"{Parameters(plan):N0} in {plan.Parameters.Count} tensors"));
        yield return ("ranks", $"{Ranks(plan)} in {Count(plan.Stages.Count, "stage")}");
        yield return ("degrees", $"TP {mesh.Tensor} x CP {mesh.Context} x DP {mesh.Data} x PP {mesh.Pipeline}; "
            + $"experts ETP {mesh.ExpertTensor} x EP {mesh.Expert} x EDP {mesh.ExpertData}; "
            + $"sequence parallel {(split ? "on" : "off")}");
        yield return ("layout", plan.Layout);
        yield return ("schedule", $"{plan.Schedule}, {plan.Microbatches} microbatches of {plan.MicroBatch}"
            + (plan.Chunks > 1 ? $", {plan.Chunks} chunks a rank" : ""));
        yield return ("batch", $"{sequences} sequences of {plan.SeqLength} tokens a step");
        yield return ("precision", Setting(plan, "dtype") ?? "fp32");
        foreach (var line in plan.Recipe.Where(line => line.StartsWith("recompute.", StringComparison.Ordinal)))
            yield return (line[..line.IndexOf('=', StringComparison.Ordinal)], line[(line.IndexOf('=', StringComparison.Ordinal) + 1)..]);
        foreach (var line in Fp8Lines(plan))
            yield return line;
        if (PlanPaths.list(plan) is { Count: > 0 } paths)
            yield return ("on a GPU", Told(paths));
        yield return ("hash", PlanFile.Hash(plan));
    }

    /// Name of the recipe that the plan was made from; "plan" where it does not say.
    public static string Name(PlanSet plan) => Setting(plan, "name") ?? "plan";

    /// What the plan records under a key of its recipe; null where it does not.
    public static string? Setting(PlanSet plan, string key)
        => plan.Recipe
            .FirstOrDefault(line => line.StartsWith($"{key}=", StringComparison.Ordinal))?[(key.Length + 1)..];

    /// Is the plan one of generation, which cannot train?
    public static bool Generates(PlanSet plan) => Setting(plan, "mode") == Mode.Generate.Name;

    /// "1 rank", "8 ranks".
    public static string Count(int number, string what) => $"{number} {what}{(number == 1 ? "" : "s")}";

    public static int Ranks(PlanSet plan) => Mesh.world(plan.Mesh);

    /// Numbers in all parameters.
    public static long Parameters(PlanSet plan)
        => plan.Parameters.Sum(p => p.Extents.Aggregate(1L, (n, extent) => n * extent));

    /// A line a stage: how often each rank of it talks in one step.
    public static TextTable Traffic(PlanSet plan)
    {
        (string Name, Func<Collective, bool> Is)[] kinds =
        [
            ("reduce", c => c.IsAllReduceSum || c.IsAllReduceMax),
            ("gather", c => c.IsAllGather),
            ("scatter", c => c.IsReduceScatter),
            ("all-to-all", c => c.IsAllToAll || c.IsRouteToExperts || c.IsRowsToExperts || c.IsRowsToTokens || c.IsDispatch || c.IsCombine),
            ("messages", c => c.IsSend || c.IsRecv),
        ];
        return new TextTable(
            "a step of each rank: kernels; all-reduce, all-gather, reduce-scatter, all-to-all; sent and received",
            ["stage", "units", "kernels", .. kinds.Select(kind => kind.Name)],
            [.. plan.Stages.Select(Row)]);

        IReadOnlyList<string> Row(StagePlan stage)
        {
            var runs = stage.Timetable.CountBy(action => (action.Phase, action.Chunk)).ToDictionary();
            long Count(Func<Step, bool> wanted) => stage.Programs.Sum(
                program => runs.GetValueOrDefault((program.Phase, program.Chunk)) * program.Steps.LongCount(wanted));
            return
            [
                $"{stage.Stage}",
                stage.Units,
                $"{Count(step => step.IsLaunch)}",
                .. kinds.Select(kind => $"{Count(step => step is Step.Start start && kind.Is(start.Collective))}"),
            ];
        }
    }

    /// A line a stage: bytes a rank holds as predicted, and at most as measured by a run.
    public static TextTable Memory(PlanSet plan, IReadOnlyList<MemoryRow>? measured)
    {
        List<string> head =
            ["stage", "units", "weights", "optimizer", "gradients", "activations", "collectives", "predicted", "headroom"];
        if (measured is not null)
            head.Add("measured");
        return new TextTable(
            "memory of a rank in MB: what it holds, and its peak", head, [.. plan.Memory.Select(Row)]);

        IReadOnlyList<string> Row(MemoryRow row)
        {
            List<string> cells =
            [
                $"{row.Stage}",
                plan.Stages[row.Stage].Units,
                Megabytes(row.Parameters),
                Megabytes(row.Optimizer),
                Megabytes(row.Gradients),
                Megabytes(row.Activations),
                Megabytes(row.Collectives),
                Megabytes(row.Peak),
                Megabytes(row.Headroom),
            ];
            if (measured is not null)
                cells.Add(measured.FirstOrDefault(m => m.Stage == row.Stage) is { } seen ? Megabytes(seen.Peak) : "-");
            return cells;
        }
    }

    private static string Megabytes(long bytes)
        => (bytes / 1e6).ToString(bytes < 100_000_000 ? "N2" : "N0", CultureInfo.InvariantCulture);

    /// "library: attention 8, attention_grad 8; exact (fp32): grouped_mat_mul 12"; launches of a step.
    private static string Told(IEnumerable<PathRow> paths)
        => string.Join("; ", paths
            .GroupBy(row => (row.Path, row.Why))
            .Select(same => same.Key.Path.Name + (same.Key.Why.Length == 0 ? "" : $" ({same.Key.Why})") + ": "
                + string.Join(", ", same.Select(row => $"{PlanNames.kernel(row.Kernel)} {row.Launches}"))));

    /// <summary>Which matrix products read fp8 and which do not, of all layers together; nothing for a plan without.</summary>
    private static IEnumerable<(string, string)> Fp8Lines(PlanSet plan)
    {
        var products = PlanProducts.list(plan).ToLookup(product => product.IsFp8);
        if (!products[true].Any())
            yield break;
        yield return ("fp8 products", $"{Places(products[true])}; emulated on the CPU: operands are rounded to E4M3, not multiplied in it");
        yield return ("other products", Places(products[false]));

        static string Places(IEnumerable<Product> products)
            => string.Join(", ", products
                .CountBy(p => string.Join('.', p.Path.Split('.').SkipWhile(w => w is "model" or "layers" || w.All(char.IsAsciiDigit))))
                .Select(place => KeyValuePair.Create(place.Key.Length == 0 ? "layer" : place.Key, place.Value))
                .OrderBy(place => place.Key, StringComparer.Ordinal)
                .Select(place => $"{place.Key} {place.Value}"));
    }
}

// What a plan says, in a few lines and one table a stage: degrees, layout, batch, collectives and memory.

using System.Globalization;
using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Cli;

internal static class Summary
{
    /// The plan's lines, and its table of stages without what a run measured.
    public static void Print(PlanSet plan)
    {
        Console.WriteLine("plan");
        Render.Pairs(Lines(plan));
        Console.WriteLine();
        Traffic(plan);
        Console.WriteLine();
        Memory(plan, null);
    }

    public static IEnumerable<(string, string)> Lines(PlanSet plan)
    {
        var mesh = plan.Mesh;
        var ranks = Ranks(plan);
        var sequences = plan.Microbatches * plan.MicroBatch;
        yield return ("recipe", Name(plan));
        yield return ("parameters", string.Create(
            CultureInfo.InvariantCulture, $"{Parameters(plan):N0} in {plan.Parameters.Count} tensors"));
        yield return ("ranks", $"{ranks} in {Count(plan.Stages.Count, "stage")}");
        yield return ("degrees", $"TP {mesh.Tensor} x CP {mesh.Context} x DP {mesh.Data} x PP {mesh.Pipeline}; "
            + $"experts ETP {mesh.ExpertTensor} x EP {mesh.Expert} x EDP {mesh.ExpertData}; "
            + $"sequence parallel {(mesh.Tensor > 1 ? "on" : "off")}");
        yield return ("layout", plan.Layout);
        yield return ("schedule", $"{plan.Schedule}, {plan.Microbatches} microbatches of {plan.MicroBatch}");
        yield return ("batch", $"{sequences} sequences of {plan.SeqLength} tokens a step");
        yield return ("precision", Setting(plan, "dtype") ?? "fp32");
        yield return ("hash", PlanFile.Hash(plan));
    }

    /// Name of the recipe that the plan was made from; "plan" where it does not say.
    public static string Name(PlanSet plan) => Setting(plan, "name") ?? "plan";

    /// "1 rank", "8 ranks".
    public static string Count(int number, string what) => $"{number} {what}{(number == 1 ? "" : "s")}";

    public static int Ranks(PlanSet plan) => Mesh.world(plan.Mesh);

    public static long Parameters(PlanSet plan)
        => plan.Parameters.Sum(p => p.Extents.Aggregate(1L, (n, extent) => n * extent));

    /// A line a stage: how often each rank of it talks in one step.
    private static void Traffic(PlanSet plan)
    {
        (string Name, Func<Collective, bool> Is)[] kinds =
        [
            ("reduce", c => c.IsAllReduceSum || c.IsAllReduceMax),
            ("gather", c => c.IsAllGather),
            ("scatter", c => c.IsReduceScatter),
            ("all-to-all", c => c.IsAllToAll || c.IsRouteToExperts || c.IsRowsToExperts || c.IsRowsToTokens),
            ("messages", c => c.IsSend || c.IsRecv),
        ];
        Console.WriteLine("a step of each rank: kernels; all-reduce, all-gather, reduce-scatter, all-to-all; sent and received");
        Render.Table(["stage", "units", "kernels", .. kinds.Select(kind => kind.Name)], [.. plan.Stages.Select(Row)]);

        IReadOnlyList<string> Row(StagePlan stage)
        {
            var runs = stage.Timetable.CountBy(action => (action.Phase.Tag, action.Chunk)).ToDictionary();
            long Count(Func<Step, bool> wanted) => stage.Programs.Sum(
                program => runs.GetValueOrDefault((program.Phase.Tag, program.Chunk)) * program.Steps.LongCount(wanted));
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
    public static void Memory(PlanSet plan, IReadOnlyList<MemoryRow>? measured)
    {
        Console.WriteLine("memory of a rank in MB: what it holds, and its peak");
        List<string> head =
            ["stage", "units", "weights", "optimizer", "gradients", "activations", "predicted"];
        if (measured is not null)
            head.Add("measured");
        Render.Table(head, [.. plan.Memory.Select(Row)]);

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
                Megabytes(row.Peak),
            ];
            if (measured is not null)
                cells.Add(measured.FirstOrDefault(m => m.Stage == row.Stage) is { } seen ? Megabytes(seen.Peak) : "-");
            return cells;
        }
    }

    private static string? Setting(PlanSet plan, string key)
        => plan.Recipe
            .FirstOrDefault(line => line.StartsWith($"{key}=", StringComparison.Ordinal))?[(key.Length + 1)..];

    private static string Megabytes(long bytes)
        => (bytes / 1e6).ToString(bytes < 100_000_000 ? "N2" : "N0", CultureInfo.InvariantCulture);
}

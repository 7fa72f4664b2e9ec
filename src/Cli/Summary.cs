// A plan's summary on the screen: its lines, and its tables as wide as the terminal allows.

using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

internal static class Summary
{
    /// The plan's lines, and its tables of stages without what a run measured.
    public static void Print(PlanSet plan)
    {
        Console.WriteLine("plan");
        Render.Pairs(PlanSummary.Lines(plan));
        Console.WriteLine();
        Render.Table(PlanSummary.Traffic(plan));
        Console.WriteLine();
        Render.Table(PlanSummary.Memory(plan, null));
    }
}

// What one machine can run: a plan whose ranks do not fit is refused before anything is allocated.

using System.Globalization;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Cuda;

namespace DeepSeekGraph.Cli;

internal static class ThisMachine
{
    /// A rank is a thread with its own memory.
    private const int MostRanks = 256;

    /// Products of small models are over before a second thread has begun.
    private const long WorthThreads = 100_000_000;

    public static int Cores => Environment.ProcessorCount;

    /// LibTorch threads of each rank; one as long as the model is small.
    public static int ThreadsPerRank(PlanSet plan, Launched? launched = null)
        => PlanSummary.Parameters(plan) < WorthThreads ? 1 : Math.Max(1, Cores / RanksHere(plan, launched));

    private static int RanksHere(PlanSet plan, Launched? launched) => launched?.RanksHere(PlanSummary.Ranks(plan)) ?? PlanSummary.Ranks(plan);

    /// DSG0903 unless the ranks of the plan that run here, all where nothing was launched, fit into this machine, or into the memory
    /// of the GPU that they share or that each has to itself.
    public static void RequireRoomFor(PlanSet plan, Launched? launched = null, RankDevice? device = null)
    {
        var gpu = device is { IsCuda: true };
        var all = PlanSummary.Ranks(plan);
        var ranks = gpu && launched?.World is not null ? 1 : RanksHere(plan, launched);
        var needed = plan.Memory.Sum(row => (double)row.Peak * (all / plan.Stages.Count)) / all * ranks;
        var present = gpu ? device!.TotalMemory : (double)GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        if (ranks <= MostRanks && needed <= present)
            return;

        throw DiagnosticException.Of(
            Codes.JobTooLarge,
            $"recipe {PlanSummary.Name(plan)}",
            string.Create(
                CultureInfo.InvariantCulture,
                $"the plan needs {PlanSummary.Count(ranks, "rank")} here and {needed / 1e9:N1} GB;"
                + $" this {(gpu ? "GPU" : "machine")} runs up to {MostRanks} ranks in {present / 1e9:N1} GB"),
            "`dsg compile` and `dsg check` need no such machine; to run, choose deepseek_v3_tiny or a smaller batch");
    }
}

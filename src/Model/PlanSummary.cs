// A plan in a few lines: degrees, batch, and for each stage what a rank of it runs, sends and holds.

using System.Globalization;
using System.Text;

namespace DeepSeekGraph.Models;

/// Plans as text for people; the whole plan is what the compiler writes to files.
public static class PlanSummary
{
    /// Degrees of parallelism, parameters, schedule, and a line a stage.
    public static string Summary(this PlanSet plan)
    {
        var mesh = plan.Mesh;
        var text = new StringBuilder();
        var perStage = mesh.Axes.Aggregate(1, (n, axis) => n * axis.Size);
        var parameters = plan.Parameters.Sum(p => p.Extents.Aggregate(1L, (n, extent) => n * extent));
        Line($"{parameters:N0} parameters on {perStage * plan.Stages.Count:N0} ranks");
        Line($"tensor {mesh.Tensor}, pipeline {mesh.Pipeline}, data {mesh.Data}, expert {mesh.Expert}; layout {plan.Layout}");
        Line($"{plan.Schedule}, {plan.Microbatches} microbatches of {plan.MicroBatch} x {plan.SeqLength} tokens");
        Line($"{"stage",-6}{"units",-9}{"kernels",8}{"collectives",12}{"sends",7}{"parameters MB",15}{"peak MB",10}");
        foreach (var stage in plan.Stages)
        {
            var memory = plan.Memory.First(row => row.Stage == stage.Stage);
            var collectives = Count<Step.Start>(stage, start => !start.Collective.IsSend && !start.Collective.IsRecv);
            var sends = Count<Step.Start>(stage, start => start.Collective.IsSend);
            var kernels = Count<Step.Launch>(stage, _ => true);
            var (held, peak) = (memory.Parameters / 1e6, memory.Peak / 1e6);
            Line($"{stage.Stage,-6}{stage.Units,-9}{kernels,8}{collectives,12}{sends,7}{held,15:N1}{peak,10:N1}");
        }

        return text.ToString();

        void Line(FormattableString line) => text.Append(line.ToString(CultureInfo.InvariantCulture)).Append('\n');
    }

    // in one step: programs run as often as the timetable names their phase
    private static long Count<T>(StagePlan stage, Func<T, bool> wanted)
        where T : Step
        => stage.Programs.Sum(program =>
            stage.Timetable.LongCount(action => action.Phase.Equals(program.Phase) && action.Chunk == program.Chunk)
                * program.Steps.OfType<T>().LongCount(wanted));
}

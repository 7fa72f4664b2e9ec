// What of a plan no GPU does yet: said before the first step, at the stage and program where it is.
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class DevicePlans
{
    /// <summary>DSG0854 for collectives that GPUs do not do; `processes` of the job.</summary>
    public static void Require(PlanSet plan, int processes)
    {
        var ranks = plan.Stages.Count * RankContext.RanksPerStage(plan.Mesh);
        foreach (var stage in plan.Stages)
        {
            var routed = stage.Slots.Where(slot => slot.Routed).Select(slot => slot.Id).ToHashSet();
            foreach (var start in stage.Programs.SelectMany(program => program.Steps).OfType<Step.Start>())
            {
                var kind = start.Collective;
                var group = plan.Groups.First(g => g.Id == start.Group).Name;
                if (kind.IsDispatch || kind.IsCombine)
                    throw NoFlex(group);
                if (kind.IsRecv && start.Outputs.Any(routed.Contains))
                    throw Unsupported($"stage {stage.Stage}, group {group}", "routed rows that go from one stage to another", "cut stages between layers");
                if (processes == 1 && ranks > 1 && (kind.IsRouteToExperts || kind.IsRowsToExperts || kind.IsRowsToTokens))
                {
                    throw Unsupported(
                        $"stage {stage.Stage}, group {group}",
                        $"routed rows that {ranks} ranks of one process exchange",
                        "choose --ep 1, or a process and a GPU a rank: dsg launch --nproc N pretrain --device cuda ...");
                }
            }
        }
    }

    /// <summary>DSG0854 for the fused exchange.</summary>
    public static DiagnosticException NoFlex(string group)
        => Unsupported($"group {group}", "the fused exchange of the dispatcher flex", "choose --set recipe.dispatcher=alltoall or allgather");

    private static DiagnosticException Unsupported(string at, string what, string help)
        => DiagnosticException.Of(Codes.DeviceUnsupported, at, $"GPUs do not do {what} yet", help);
}

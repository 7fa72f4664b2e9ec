// A recorded routing of one step, as `dsg explain` counts from it.

using DeepSeekGraph.Compiler;
using DeepSeekGraph.Runtime.Execution;

namespace DeepSeekGraph.Models;

/// What the tokens of `plan` chose in step `step` of a run that recorded it.
public sealed class TracedRouting(RoutingTrace trace, PlanSet plan, long step) : IRouting
{
    public IReadOnlyList<int> Chosen(string path, int microbatch, int sequence, int position)
        => trace.Chosen(step, path, (microbatch * plan.MicroBatch) + sequence, position);
}

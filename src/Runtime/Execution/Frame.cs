// The slots that one microbatch (or the step) has in flight, and its collectives under way.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>
/// Every slot of a stage by its place in the plan. Slots that outlive a microbatch are the same objects in all frames of a
/// rank; the others are the frame's own. A frame is used again for later microbatches, so that a step allocates none.
/// </summary>
public sealed class Frame : IDisposable
{
    private readonly SlotValue[] _own;

    internal Frame(SlotValue[] slots, SlotValue[] own, int tokens)
    {
        Slots = slots;
        _own = own;
        Pending = new IPending?[tokens];
        Started = new int[tokens][];
    }

    /// <summary>By place in StagePlan.Slots.</summary>
    public SlotValue[] Slots { get; }

    /// <summary>Collectives under way, by the number that StageInstructions gives their token; null where none is.</summary>
    internal IPending?[] Pending { get; }

    /// <summary>What a collective under way will write, while somebody watches.</summary>
    internal int[][] Started { get; }

    /// <summary>The frame's own slots that hold a value now.</summary>
    internal IEnumerable<SlotValue> Live => _own.Where(v => v.IsSet);

    /// <summary>What is still held: a slot, or null; inputs may stay until the step ends.</summary>
    internal SlotValue? Left => Array.Find(_own, v => v.IsSet && !v.Info.Kind.IsInput);

    /// <summary>Collectives that nobody waited for.</summary>
    internal int LeftPending => Pending.Count(p => p is not null);

    /// <summary>Gives back the memory of the frame's own slots; the frame can be filled again.</summary>
    public void Dispose()
    {
        foreach (var value in _own)
            value.Dispose();
        Array.Clear(Pending);
    }
}

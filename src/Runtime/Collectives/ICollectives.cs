// What a plan may ask of the other ranks; everything that crosses ranks is copied.
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>One collective of one rank: neighbours of a group may be bundled, each output with an equal share of the inputs, in order.</summary>
public sealed record CollectiveCall(
    Collective Kind, Group Group, IReadOnlyList<SlotValue> Inputs, IReadOnlyList<SlotValue> Outputs)
{
    /// <summary>Where whoever carries it out notes when; null but in a traced step.</summary>
    internal CollectiveTimes? Times { get; init; }
}

/// <summary>A collective under way.</summary>
public interface IPending
{
    /// <summary>Blocks until the outputs are written; throws when the job was stopped.</summary>
    void Wait();
}

/// <summary>Sends are buffered: nothing to wait for.</summary>
internal sealed class Sent : IPending
{
    public static readonly Sent Instance = new();

    public void Wait()
    {
    }
}

/// <summary>The collectives of one rank. Calls on one group complete in the order of their starts.</summary>
public interface ICollectives
{
    /// <summary>Begins a collective; the inputs may be freed or overwritten as soon as this returns.</summary>
    IPending Start(CollectiveCall call);
}

/// <summary>Thrown in ranks that wait for another one when the job stops; never the first error.</summary>
public sealed class StoppedException(string message) : OperationCanceledException(message);

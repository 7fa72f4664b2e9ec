// The world a process is part of: which ranks it runs, how those meet the others, and what ends the job.
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Kernels;

namespace DeepSeekGraph.Runtime.Collectives;

/// <summary>What collectives know of a plan: all its groups, how many ranks it has, and whether there may be fused dispatches.</summary>
public sealed record JobShape(IReadOnlyList<Group> Groups, int Ranks, bool Dispatches)
{
    /// <summary>Of a plan.</summary>
    public static JobShape Of(PlanSet plan)
        => new(
            plan.Groups,
            plan.Stages.Count * RankContext.RanksPerStage(plan.Mesh),
            plan.Stages.Any(static stage => stage.Programs.Any(static program => program.Steps.Any(static step => step is Step.Start { Collective.IsDispatch: true }))));
}

/// <summary>One process of a job, which runs all ranks of a plan (LoopbackWorld) or one of them (ProcessWorld).</summary>
public interface IWorld : IDisposable
{
    /// <summary>Processes of the job.</summary>
    int Processes { get; }

    /// <summary>The place of this one; process 0 prints, and writes what is written once.</summary>
    int Process { get; }

    /// <summary>Does this process run the rank?</summary>
    bool Owns(int rank);

    /// <summary>The collectives of a rank that this process owns, on the thread of the rank; `device` is where its values are, null: the processor.</summary>
    ICollectives For(RankContext rank, JobShape job, RankDevice? device = null);

    /// <summary>Cancelled when a rank of any process failed or the job was cancelled.</summary>
    CancellationToken Stop { get; }

    /// <summary>The error that stopped the job, also of another process; null while it runs.</summary>
    Exception? FirstError { get; }

    /// <summary>Wakes every waiting rank of every process; the first error is kept.</summary>
    void Abort(Exception error);

    /// <summary>What this process is doing, for the message of others when it is gone; asked for at any time, on any thread.</summary>
    Func<string>? Whereabouts { set; }

    /// <summary>
    /// All processes hand in a small string of bytes; `decide` sees them, by process, in process 0, and every process gets what it
    /// says: barrier, gathering, broadcast and agreement in one. Calls of one topic are numbered, so that topics do not wait for each
    /// other. StoppedException where a process does not come any more, or `stop` is cancelled; an error of `decide` aborts the job.
    /// </summary>
    byte[] Meet(string topic, byte[] mine, Func<IReadOnlyList<byte[]>, byte[]> decide, CancellationToken stop);
}

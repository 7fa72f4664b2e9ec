// What both executors of a plan share: where they run, the step they are at, and how collectives begin and end.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Execution;

/// <summary>Makes the executor of one rank of a stage.</summary>
public delegate StageCode StageCodeFactory(StageSite site);

/// <summary>A stage's plan and the rank that runs it.</summary>
public sealed record StageSite(
    StagePlan Stage,
    IReadOnlyList<Group> Groups,
    RankContext Rank,
    ICollectives Collectives,
    IReadOnlyDictionary<KernelId, KernelEntry> Kernels,
    CancellationToken Stop);

/// <summary>The programs of a stage, ready to run at one place of the mesh: interpreted, or compiled from generated code.</summary>
public abstract class StageCode
{
    private readonly StageSite _site;
    private readonly CancellationToken _stop;

    protected StageCode(StageSite site)
    {
        _site = site;
        _stop = site.Stop;
        Rank = site.Rank;
    }

    protected RankContext Rank { get; }

    /// <summary>Index of the step that runs in its program; -1 between programs.</summary>
    internal int Current { get; private set; } = -1;

    /// <summary>When set, called after each step of a program with its index.</summary>
    internal System.Action<int>? Watch { get; set; }

    /// <summary>When set, told of the begin and the end of each step of a program.</summary>
    internal StepRecorder? Recorder { get; set; }

    /// <summary>Runs a program, given by its place in StagePlan.Programs.</summary>
    internal void RunProgram(int program, Frame frame)
    {
        Current = -1;
        Run(program, frame);
        if (Current >= 0)
            Over();
        Current = -1;
    }

    /// <summary>All steps of a program in order, each preceded by At.</summary>
    protected abstract void Run(int program, Frame frame);

    /// <summary>Says which step runs next: faults name it, watchers see the one before it, and a stopped job ends here.</summary>
    protected void At(int step)
    {
        if (Current >= 0)
            Over();
        Current = step;
        if (_stop.IsCancellationRequested)
            throw new StoppedException("the job was stopped");
        Recorder?.Begin(step);
    }

    /// <summary>A kernel of the rank's device.</summary>
    protected Kernel Find(KernelId id) => _site.Kernels[id].Run;

    /// <summary>A word of the plan, which generated code does not repeat: an attribute of a launch.</summary>
    protected Attribute Given(int program, int step, int attribute)
        => ((Step.Launch)_site.Stage.Programs[program].Steps[step]).Attributes[attribute];

    /// <summary>Begins a collective under a token (numbered by StageInstructions) on a group (by its place in the plan).</summary>
    protected void Start(Frame frame, int token, Collective kind, int group, SlotValue[] inputs, SlotValue[] outputs)
    {
        if (frame.Pending[token] is not null)
            throw new InvalidOperationException("a collective is under way under this token");
        frame.Pending[token] = _site.Collectives.Start(new CollectiveCall(kind, _site.Groups[group], inputs, outputs) { Times = Recorder?.Times });
    }

    /// <summary>Ends a collective.</summary>
    protected void Wait(Frame frame, int token)
    {
        var pending = frame.Pending[token] ?? throw new InvalidOperationException("nothing to wait for under this token");
        frame.Pending[token] = null;
        pending.Wait();
    }
    private void Over()
    {
        Recorder?.End(Current);
        Watch?.Invoke(Current);
    }
}

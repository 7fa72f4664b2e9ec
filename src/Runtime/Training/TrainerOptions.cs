// What a training run needs besides its plan.
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Execution;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Training;

/// <summary>What runs the programs of a plan; both give the same bits.</summary>
public enum Executor
{
    /// <summary>C# written for the plan and compiled, kept from run to run; the interpreter where that cannot be.</summary>
    Compiled,

    /// <summary>The reference: the plan's steps one by one.</summary>
    Interpreter,
}

/// <summary>Seed, learning rate and data of a run. Parallelism, precision and optimizer constants are the plan's.</summary>
public sealed record TrainerOptions
{
    /// <summary>Global batches; null where only single steps with given inputs are run.</summary>
    public IBatchSource? Batches { get; init; }

    /// <summary>Seed of the initial values.</summary>
    public ulong Seed { get; init; } = 1234;

    /// <summary>Learning rate and its schedule.</summary>
    public LearningRate LearningRate { get; init; } = new();

    /// <summary>Initial values by parameter name, whole; null keeps the plan's own initial value.</summary>
    public Func<string, Tensor?>? Weights { get; init; }

    /// <summary>The open checkpoint to go on from, whatever plan wrote it; it may be closed once the trainer has started.</summary>
    public CheckpointReader? Checkpoint { get; init; }

    /// <summary>LibTorch threads of each rank; results are the same bits for the same number.</summary>
    public int ThreadsPerRank { get; init; } = 1;

    /// <summary>Where ranks compute; all of them share the one device.</summary>
    public RankDevice Device { get; init; } = RankDevice.Cpu;

    /// <summary>What runs the programs.</summary>
    public Executor Executor { get; init; }

    /// <summary>Folder of compiled plans, for its owner alone; null: the user's cache (CodeCache.DefaultFolder).</summary>
    public string? CodeFolder { get; init; }

    /// <summary>
    /// Memory that a step frees stays with the process for the next one: faster by a twentieth, and the process holds its peak. A
    /// setting of the process (glibc's mallopt): once on, it stays on.
    /// </summary>
    public bool KeepFreedMemory { get; init; } = true;

    /// <summary>Counts time by kernel.</summary>
    public bool Profile { get; init; }

    /// <summary>The step, counted like StepMetrics.Step, that is recorded into Trainer.Traces; null: none.</summary>
    public long? TracedStep { get; init; }

    /// <summary>Records or replays expert choices.</summary>
    public RoutingTrace? Trace { get; init; }

    /// <summary>What this process is part of; null: it is alone, and all ranks are its threads.</summary>
    public IWorld? World { get; init; }

    /// <summary>Counts what the exchange of routed rows would send between and inside nodes.</summary>
    public Traffic? Traffic { get; init; }
}

/// <summary>Linear warm-up to Peak, then a cosine down to Minimum at TotalSteps, constant after; 0 total steps: constant.</summary>
public sealed record LearningRate(double Peak = 3e-4, double Minimum = 3e-5, long WarmupSteps = 0, long TotalSteps = 0)
{
    /// <summary>The rate of step 1, 2, ...</summary>
    public double At(long step)
    {
        if (step <= WarmupSteps)
            return Peak * step / WarmupSteps;
        if (TotalSteps <= WarmupSteps)
            return Peak;
        var progress = Math.Min(1, (double)(step - WarmupSteps) / (TotalSteps - WarmupSteps));
        return Minimum + ((Peak - Minimum) * 0.5 * (1 + Math.Cos(Math.PI * progress)));
    }
}

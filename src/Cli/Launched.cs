// A verb that may run as one process of several: joins the others, lets process 0 speak, and says once what ended the job.

using DeepSeekGraph.Runtime;
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Launch;

namespace DeepSeekGraph.Cli;

/// How this process was launched, and its world; null where it is alone.
internal sealed record Launched(LaunchEnvironment Launch, IWorld? World)
{
    /// Where an earlier start of this job, which died, had written; null for the first.
    public RunRecord? Restart { get; } = Launcher.Restarted();

    /// Says what is to be said of the job.
    public bool IsFirst => Launch.Rank == 0;

    /// What compiles the same plan in every process: a probe of one machine.
    public Func<DType> FasterType => () => World is null
        ? DTypeProbe.Faster
        : World.Meet("dtype", [], static _ => [DTypeProbe.Faster.IsBFloat16 ? (byte)1 : (byte)0], World.Stop) is [1]
            ? DType.BFloat16
            : DType.Float32;

    /// Ranks of a plan that run on this machine.
    public int RanksHere(int ranks) => World is null ? ranks : Math.Min(ranks, Launch.LocalSize);

    /// Runs a verb, alone or with the other processes; the exit code of this one.
    public static int Run(Func<Launched, int> verb)
    {
        Launcher.Watch();
        var launch = LaunchEnvironment.Detect();
        if (launch.Form == LaunchForm.InProcess)
            return verb(new Launched(launch, null));
        if (launch.Rank != 0)
            Console.SetOut(TextWriter.Null);
        ProcessWorld world;
        try
        {
            world = ProcessWorld.Join(launch);
        }
        catch (Exception e)
        {
            return Report(launch, e is JobEndedException { InnerException: { } inner } ? inner : e, e is JobEndedException { IsKnown: true });
        }

        using (world)
        {
            try
            {
                return verb(new Launched(launch, world));
            }
            catch (Exception e)
            {
                world.Abort(e);
                return Report(launch, world.FirstError ?? e, world.IsKnownToAll);
            }
        }
    }

    /// How the job was started and what carries its values, where it is one of processes.
    public void Announce(RankDevice device)
    {
        if (World is null)
            return;
        var processes = Launch.WorldSize == 1 ? "1 process of one rank" : $"{Launch.WorldSize} processes of one rank each";
        var transport = device.IsCuda ? $"NCCL (backend: nccl {RankDevice.NcclVersion}, a GPU a process)" : Launch.Form == LaunchForm.Mpi ? "MPI" : "TCP";
        Console.WriteLine($"launch: {Words(Launch)}, {processes}, collectives over {transport}");
    }

    /// DSG0863 for a verb that one process does by itself.
    public static void RequireAlone(string verb)
    {
        if (LaunchEnvironment.Detect() is { WorldSize: > 1 } launch)
        {
            throw DiagnosticException.Of(
                Codes.OneProcessOnly,
                $"dsg {verb}, rank {launch.Rank}",
                $"dsg {verb} runs all ranks in one process, and was started as one of {launch.WorldSize} by {Words(launch)}",
                $"start dsg {verb} by itself; pretrain and run take several processes");
        }
    }

    /// The first says what ended the job, others only what the first cannot know.
    private static int Report(LaunchEnvironment launch, Exception error, bool isKnown)
    {
        if (error is OperationCanceledException)
            return ExitCode.Terminated;
        if (launch.Rank == 0)
            return Faults.Report(error);
        var fault = ProcessWorld.Told(launch.Rank, error);
        if (!isKnown)
            return Faults.Report(fault);
        return fault is DiagnosticException ? ExitCode.Diagnostics : ExitCode.Bug;
    }

    private static string Words(LaunchEnvironment launch)
        => launch.Form switch
        {
            LaunchForm.Mpi => "mpirun",
            LaunchForm.Slurm => "srun",
            LaunchForm.Torchrun => "torchrun's variables",
            LaunchForm.InProcess => "nobody",
            _ => throw new System.Diagnostics.UnreachableException(),
        };
}

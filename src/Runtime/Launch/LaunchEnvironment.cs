// How this process was started: alone, or as a rank of a job by torchrun's variables, mpirun or srun.
using System.Globalization;
using System.Security.Cryptography;
using System.Text;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>What started the processes of a job.</summary>
public enum LaunchForm
{
    /// <summary>Nothing: all ranks are threads of this process.</summary>
    InProcess,

    /// <summary>RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, as torchrun and dsg launch set them.</summary>
    Torchrun,

    /// <summary>mpirun of Open MPI.</summary>
    Mpi,

    /// <summary>srun.</summary>
    Slurm,
}

/// <summary>A rank, how many there are, and where rank 0 is. `Token` proves to the others that a process belongs to the job.</summary>
public sealed record LaunchEnvironment(
    LaunchForm Form, int Rank, int WorldSize, int LocalRank, string MasterAddress, int MasterPort, byte[] Token)
{
    /// <summary>Environment variable with a secret of the job; dsg launch and dsg submit set it.</summary>
    public const string TokenVariable = "DSG_JOB_TOKEN";

    /// <summary>Ports of jobs under Slurm, by their number.</summary>
    private const int FirstPort = 20_000, Ports = 20_000;

    /// <summary>A process by itself.</summary>
    public static LaunchEnvironment Alone { get; } = new(LaunchForm.InProcess, 0, 1, 0, "", 0, []);

    /// <summary>Ranks on this node, where the launcher says so; else 1.</summary>
    public int LocalSize { get; init; } = 1;

    /// <summary>Of this process.</summary>
    public static LaunchEnvironment Detect() => Of(Environment.GetEnvironmentVariable);

    /// <summary>
    /// Of variables: torchrun's come first, since torchrun may run under srun or mpirun; then Open MPI's, then those of a step of Slurm
    /// with more than one task (a shell in an allocation is a step of one). DSG0860 where they contradict each other.
    /// </summary>
    public static LaunchEnvironment Of(Func<string, string?> variable)
    {
        var read = new Reader(variable);
        if (read.Has("RANK") || (read.Has("WORLD_SIZE") && read.Has("MASTER_ADDR")))
            return Torchrun(read);
        if (read.Has("OMPI_COMM_WORLD_RANK") || read.Has("OMPI_COMM_WORLD_SIZE"))
            return OpenMpi(read);
        return read.Has("SLURM_STEP_ID") && read.Has("SLURM_PROCID") && SlurmTasks(read) > 1 ? Slurm(read) : Alone;
    }

    private static LaunchEnvironment Torchrun(Reader read)
    {
        var (rank, size) = Place(read, "RANK", "WORLD_SIZE");
        if (read.Has("OMPI_COMM_WORLD_RANK") && !read.Has("TORCHELASTIC_RUN_ID"))
        {
            // set by hand under mpirun, as wrappers do: then both must mean the same
            var (other, others) = Place(read, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
            if ((other, others) != (rank, size))
            {
                throw Wrong(
                    "RANK, OMPI_COMM_WORLD_RANK",
                    $"RANK and WORLD_SIZE say rank {rank} of {size}, mpirun says rank {other} of {others}",
                    "unset RANK and WORLD_SIZE, or give them mpirun's values");
            }
        }

        var local = read.Has("LOCAL_RANK") ? read.Int("LOCAL_RANK", 0, size - 1) : 0;
        var address = read.Text("MASTER_ADDR");
        var port = read.Int("MASTER_PORT", 1, 65535);
        var token = TokenOf(read, $"{read.Optional("TORCHELASTIC_RUN_ID")} {port} {size}");
        return new LaunchEnvironment(LaunchForm.Torchrun, rank, size, local, address, port, token)
        {
            LocalSize = read.Has("LOCAL_WORLD_SIZE") ? read.Int("LOCAL_WORLD_SIZE", 1, size) : 1,
        };
    }

    /// <summary>Address, port and token come from MPI itself, unless MASTER_ADDR and MASTER_PORT are given.</summary>
    private static LaunchEnvironment OpenMpi(Reader read)
    {
        var (rank, size) = Place(read, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE");
        var local = read.Has("OMPI_COMM_WORLD_LOCAL_RANK") ? read.Int("OMPI_COMM_WORLD_LOCAL_RANK", 0, size - 1) : 0;
        var port = read.Has("MASTER_PORT") ? read.Int("MASTER_PORT", 1, 65535) : 0;
        return new LaunchEnvironment(LaunchForm.Mpi, rank, size, local, read.Optional("MASTER_ADDR"), port, TokenOf(read, ""))
        {
            LocalSize = read.Has("OMPI_COMM_WORLD_LOCAL_SIZE") ? read.Int("OMPI_COMM_WORLD_LOCAL_SIZE", 1, size) : 1,
        };
    }

    /// <summary>Rank 0 is on the first node of the step, unless MASTER_ADDR says otherwise; ports go by the job's number.</summary>
    private static LaunchEnvironment Slurm(Reader read)
    {
        var size = SlurmTasks(read);
        var rank = read.Int("SLURM_PROCID", 0, size - 1);
        var local = read.Has("SLURM_LOCALID") ? read.Int("SLURM_LOCALID", 0, size - 1) : 0;
        var job = read.Long("SLURM_JOB_ID");
        var step = read.Long("SLURM_STEP_ID");
        var address = read.Has("MASTER_ADDR") ? read.Text("MASTER_ADDR") : SlurmNodes.First(read.Text("SLURM_STEP_NODELIST"));
        var port = read.Has("MASTER_PORT") ? read.Int("MASTER_PORT", 1, 65535) : (int)(FirstPort + (((job * 64) + step) % Ports));
        return new LaunchEnvironment(LaunchForm.Slurm, rank, size, local, address, port, TokenOf(read, $"{job} {step}"))
        {
            LocalSize = read.Has("SLURM_STEP_TASKS_PER_NODE") ? SlurmNodes.MostTasks(read.Text("SLURM_STEP_TASKS_PER_NODE")) : 1,
        };
    }

    private static int SlurmTasks(Reader read)
        => read.Int(read.Has("SLURM_STEP_NUM_TASKS") ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS", 1, int.MaxValue);

    private static (int Rank, int Size) Place(Reader read, string rank, string size)
    {
        var all = read.Int(size, 1, int.MaxValue);
        return (read.Int(rank, 0, all - 1), all);
    }

    /// <summary>Without a secret, what tells jobs apart keeps their processes apart, but no enemy out.</summary>
    private static byte[] TokenOf(Reader read, string otherwise)
        => SHA256.HashData(Encoding.UTF8.GetBytes(read.Has(TokenVariable) ? $"token {read.Text(TokenVariable)}" : $"job {otherwise}"));

    private static DiagnosticException Wrong(string at, string what, string help) => DiagnosticException.Of(Codes.LaunchEnvironment, at, what, help);

    /// <summary>Variables as numbers and text; an empty one is none.</summary>
    private sealed class Reader(Func<string, string?> variable)
    {
        public bool Has(string name) => !string.IsNullOrEmpty(variable(name));

        public string Optional(string name) => variable(name) ?? "";

        public string Text(string name)
            => variable(name) is { Length: > 0 } text
                ? text
                : throw Wrong(
                    name, $"{name} is not set, though other variables say that this process is a rank of a job",
                    "set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or none of them");

        public long Long(string name)
            => long.TryParse(Text(name), NumberStyles.None, CultureInfo.InvariantCulture, out var value)
                ? value
                : throw Wrong(name, $"{name} is '{Text(name)}', which is no whole number", "start dsg by srun, mpirun, torchrun or dsg launch");

        public int Int(string name, int least, int most)
            => Long(name) is var value && value >= least && value <= most
                ? (int)value
                : throw Wrong(name, $"{name} is {value}, not from {least} to {most}", "start dsg by srun, mpirun, torchrun or dsg launch");
    }
}

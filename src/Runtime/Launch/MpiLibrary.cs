// Open MPI 4's C interface, loaded by the name of its library: handles are addresses of symbols that it exports.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>
/// What the messages and collectives need. Loaded once, only where mpirun started this process. One thread at a
/// time calls it (MPI_THREAD_SERIALIZED): callers hold Lock.
/// </summary>
internal sealed unsafe partial class MpiLibrary
{
    private const string Name = "libmpi.so.40";
    private const int Serialized = 2;

    private static readonly Lazy<MpiLibrary> s_loaded = new(static () => new MpiLibrary());

    private MpiLibrary()
    {
        nint library;
        try
        {
            library = NativeLibrary.Load(Name);
        }
        catch (DllNotFoundException)
        {
            throw Unavailable(
                $"{Name} cannot be loaded",
                "install Open MPI 4 (Debian: apt install openmpi-bin libopenmpi3), or start by dsg launch or srun, which need no MPI");
        }

        (World, Float, Int, Byte) = (Symbol("ompi_mpi_comm_world"), Symbol("ompi_mpi_float"), Symbol("ompi_mpi_int"), Symbol("ompi_mpi_byte"));
        (Sum, Max) = (Symbol("ompi_mpi_op_sum"), Symbol("ompi_mpi_op_max"));
        int provided;
        Require(MPI_Init_thread(0, 0, Serialized, &provided));
        if (provided < Serialized)
            throw Unavailable($"it is built for one thread only (level {provided} of {Serialized})", "build Open MPI with thread support");
        // errors are answers, not the end of the process
        Require(MPI_Comm_set_errhandler(World, Symbol("ompi_mpi_errors_return")));
        int rank, size;
        Require(MPI_Comm_rank(World, &rank));
        Require(MPI_Comm_size(World, &size));
        (Rank, Size) = (rank, size);

        nint Symbol(string symbol)
            => NativeLibrary.TryGetExport(library, symbol, out var address)
                ? address
                : throw Unavailable(
                    $"{Name} has no {symbol}: it is not Open MPI 4",
                    "put Open MPI 4 on the library path, or start by dsg launch or srun, which need no MPI");
    }

    public static MpiLibrary Loaded => s_loaded.Value;

    public Lock Lock { get; } = new();

    public nint World { get; }

    public nint Float { get; }

    public nint Int { get; }

    public nint Byte { get; }

    public nint Sum { get; }

    public nint Max { get; }

    public int Rank { get; }

    public int Size { get; }

    /// <summary>DSG0867 with MPI's own words where a call failed.</summary>
    public static void Require(int result)
    {
        if (result == 0)
            return;
        var text = stackalloc byte[512];
        int length;
        throw Unavailable(
            MPI_Error_string(result, text, &length) == 0 ? new string((sbyte*)text, 0, length) : $"error {result}",
            "look at mpirun's own output");
    }

    /// <summary>A communicator of these ranks of the world, in their order; all of them call it at once.</summary>
    public nint Communicator(int[] ranks, int tag)
    {
        nint world, group, result;
        Require(MPI_Comm_group(World, &world));
        fixed (int* members = ranks)
            Require(MPI_Group_incl(world, ranks.Length, members, &group));
        Require(MPI_Comm_create_group(World, group, tag, &result));
        Require(MPI_Group_free(&group));
        Require(MPI_Group_free(&world));
        return result;
    }

    /// <summary>Bytes of rank 0 to all.</summary>
    public void Broadcast(byte[] bytes)
    {
        fixed (byte* data = bytes)
            Require(MPI_Bcast(data, bytes.Length, Byte, 0, World));
    }

    /// <summary>Is the request done? Then it is none any more.</summary>
    public static bool IsDone(ref nint request)
    {
        int done;
        fixed (nint* handle = &request)
            Require(MPI_Test(handle, &done, null));
        return done != 0;
    }

    private static DiagnosticException Unavailable(string what, string help) => DiagnosticException.Of(Codes.MpiUnavailable, "MPI", what, help);

    [LibraryImport(Name)]
    private static partial int MPI_Init_thread(nint argc, nint argv, int required, int* provided);

    [LibraryImport(Name)]
    public static partial int MPI_Finalize();

    [LibraryImport(Name)]
    private static partial int MPI_Error_string(int code, byte* text, int* length);

    [LibraryImport(Name)]
    private static partial int MPI_Comm_set_errhandler(nint comm, nint handler);

    [LibraryImport(Name)]
    private static partial int MPI_Comm_rank(nint comm, int* rank);

    [LibraryImport(Name)]
    private static partial int MPI_Comm_size(nint comm, int* size);

    [LibraryImport(Name)]
    private static partial int MPI_Comm_group(nint comm, nint* group);

    [LibraryImport(Name)]
    private static partial int MPI_Group_incl(nint group, int n, int* ranks, nint* result);

    [LibraryImport(Name)]
    private static partial int MPI_Group_free(nint* group);

    [LibraryImport(Name)]
    private static partial int MPI_Comm_create_group(nint comm, nint group, int tag, nint* result);

    [LibraryImport(Name)]
    private static partial int MPI_Bcast(void* data, int n, nint type, int root, nint comm);

    [LibraryImport(Name)]
    private static partial int MPI_Test(nint* request, int* done, void* status);

    [LibraryImport(Name)]
    public static partial int MPI_Iprobe(int from, int tag, nint comm, int* there, Status* status);

    [LibraryImport(Name)]
    public static partial int MPI_Get_count(Status* status, nint type, int* count);

    [LibraryImport(Name)]
    public static partial int MPI_Isend(void* data, int n, nint type, int to, int tag, nint comm, nint* request);

    [LibraryImport(Name)]
    public static partial int MPI_Irecv(void* data, int n, nint type, int from, int tag, nint comm, nint* request);

    [LibraryImport(Name)]
    public static partial int MPI_Recv(void* data, int n, nint type, int from, int tag, nint comm, void* status);

    [LibraryImport(Name)]
    public static partial int MPI_Iallreduce(void* send, void* result, int n, nint type, nint op, nint comm, nint* request);

    [LibraryImport(Name)]
    public static partial int MPI_Iallgather(void* send, int n, nint type, void* result, int each, nint resultType, nint comm, nint* request);

    [LibraryImport(Name)]
    public static partial int MPI_Ireduce_scatter_block(void* send, void* result, int n, nint type, nint op, nint comm, nint* request);

    [LibraryImport(Name)]
    public static partial int MPI_Ialltoall(void* send, int n, nint type, void* result, int each, nint resultType, nint comm, nint* request);

    /// <summary>MPI_Status of Open MPI: 24 bytes.</summary>
    [StructLayout(LayoutKind.Sequential, Size = 24)]
    public struct Status
    {
        public int Source;
        public int Tag;
        public int Error;
    }
}

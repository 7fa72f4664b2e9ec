// NCCL by P/Invoke: the library is found beside LibTorch, or on the loader's path, and every result is checked.
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Native;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Calls as nccl.h declares them (NVIDIA/nccl, src/nccl.h.in). Communicators block: calls return once work is queued.</summary>
internal static unsafe class NcclLibrary
{
    public const string FileName = "libnccl.so.2";

    private const int UniqueIdBytes = 128;

    private static readonly Lazy<Exports> Calls = new(static () => new Exports(Load(LibTorch.Neighbours())));

    private static Exports Api => Calls.Value;

    /// <summary>DSG0855 unless NCCL is there and new enough.</summary>
    public static void Require() => _ = Calls.Value;

    /// <summary>Such as 2.28.9.</summary>
    public static string Version
    {
        get
        {
            int code;
            Check(Api.GetVersion(&code), "ncclGetVersion");
            return VersionOf(code);
        }
    }

    /// <summary>2.9 and later have two digits for the minor version.</summary>
    internal static string VersionOf(int code)
        => code >= 10_000 ? $"{code / 10_000}.{code / 100 % 100}.{code % 100}" : $"{code / 1000}.{code / 100 % 10}.{code % 100}";

    public static byte[] NewId()
    {
        UniqueId id;
        Check(Api.GetUniqueId(&id), "ncclGetUniqueId");
        return new ReadOnlySpan<byte>(&id, UniqueIdBytes).ToArray();
    }

    public static nint Join(byte[] id, int ranks, int rank)
    {
        if (id.Length != UniqueIdBytes)
            throw new InvalidOperationException($"an id of NCCL has {UniqueIdBytes} bytes, not {id.Length}");
        nint communicator;
        Check(Api.CommInitRank(&communicator, ranks, MemoryMarshal.Read<UniqueId>(id), rank), "ncclCommInitRank");
        return communicator;
    }

    public static nint Split(nint communicator, int color, int key)
    {
        nint part = 0;
        Check(Api.CommSplit(communicator, color, key, &part, 0), "ncclCommSplit");
        return part;
    }

    public static void Close(nint communicator) => Check(Api.CommDestroy(communicator), "ncclCommDestroy");

    public static void Abort(nint communicator) => Check(Api.CommAbort(communicator), "ncclCommAbort");

    /// <summary>The error that happened on the way; null where there is none.</summary>
    public static string? Fault(nint communicator)
    {
        int error;
        Check(Api.CommGetAsyncError(communicator, &error), "ncclCommGetAsyncError");
        return error is Success or InProgress ? null : Words(error);
    }

    public static void Begin() => Check(Api.GroupStart(), "ncclGroupStart");

    public static void End() => Check(Api.GroupEnd(), "ncclGroupEnd");

    public static void AllReduce(nint communicator, nint from, nint to, long count, ScalarType type, bool max, nint stream)
        => Check(Api.AllReduce(from, to, (nuint)count, TypeOf(type), max ? Max : Sum, communicator, stream), "ncclAllReduce");

    public static void ReduceScatter(nint communicator, nint from, nint to, long count, ScalarType type, nint stream)
        => Check(Api.ReduceScatter(from, to, (nuint)count, TypeOf(type), Sum, communicator, stream), "ncclReduceScatter");

    public static void AllGather(nint communicator, nint from, nint to, long bytes, nint stream)
        => Check(Api.AllGather(from, to, (nuint)bytes, Bytes, communicator, stream), "ncclAllGather");

    public static void Send(nint communicator, nint from, long bytes, int peer, nint stream)
        => Check(Api.Send(from, (nuint)bytes, Bytes, peer, communicator, stream), "ncclSend");

    public static void Receive(nint communicator, nint to, long bytes, int peer, nint stream)
        => Check(Api.Recv(to, (nuint)bytes, Bytes, peer, communicator, stream), "ncclRecv");

    // ncclResult_t, ncclRedOp_t and ncclDataType_t
    private const int Success = 0, InProgress = 7, Sum = 0, Max = 2, Bytes = 0;

    private static int TypeOf(ScalarType type)
        => type switch
        {
            ScalarType.Int32 => 2,
            ScalarType.Int64 => 4,
            ScalarType.Float32 => 7,
            ScalarType.Float64 => 8,
            ScalarType.BFloat16 => 9,
            _ => throw new InvalidOperationException($"NCCL adds no elements of type {type}"),
        };

    private static void Check(int result, string call)
    {
        if (result != Success)
            throw new InvalidOperationException($"{call}: {Words(result)}");
    }

    private static string Words(int result)
    {
        var what = Marshal.PtrToStringUTF8(Api.GetErrorString(result)) ?? $"error {result}";
        return Marshal.PtrToStringUTF8(Api.GetLastError(0)) is { Length: > 0 } last ? $"{what}; {last.Trim().ReplaceLineEndings(" ")}" : what;
    }

    /// <summary>The library from the loader's path, else from one of the folders; DSG0855 where it is in none.</summary>
    internal static nint Load(IEnumerable<string> folders, string name = FileName)
        => NativeSearch.Find([name], folders) ?? throw DiagnosticException.Of(
            Codes.NcclMissing,
            name,
            $"it was found neither on the loader's path nor in {string.Join(", ", folders)}",
            "install NCCL 2.18 or newer (it comes with a CUDA build of PyTorch), or run all ranks in one process");

    [StructLayout(LayoutKind.Sequential, Size = UniqueIdBytes)]
    private struct UniqueId
    {
        private fixed byte _bytes[UniqueIdBytes];
    }

    /// <summary>Pointers to the functions; DSG0855 where one is missing.</summary>
    private sealed class Exports
    {
        public readonly delegate* unmanaged[Cdecl]<int*, int> GetVersion;
        public readonly delegate* unmanaged[Cdecl]<UniqueId*, int> GetUniqueId;
        public readonly delegate* unmanaged[Cdecl]<nint*, int, UniqueId, int, int> CommInitRank;
        public readonly delegate* unmanaged[Cdecl]<nint, int, int, nint*, nint, int> CommSplit;
        public readonly delegate* unmanaged[Cdecl]<nint, int> CommDestroy;
        public readonly delegate* unmanaged[Cdecl]<nint, int> CommAbort;
        public readonly delegate* unmanaged[Cdecl]<nint, int*, int> CommGetAsyncError;
        public readonly delegate* unmanaged[Cdecl]<int> GroupStart;
        public readonly delegate* unmanaged[Cdecl]<int> GroupEnd;
        public readonly delegate* unmanaged[Cdecl]<nint, nint, nuint, int, int, nint, nint, int> AllReduce;
        public readonly delegate* unmanaged[Cdecl]<nint, nint, nuint, int, int, nint, nint, int> ReduceScatter;
        public readonly delegate* unmanaged[Cdecl]<nint, nint, nuint, int, nint, nint, int> AllGather;
        public readonly delegate* unmanaged[Cdecl]<nint, nuint, int, int, nint, nint, int> Send;
        public readonly delegate* unmanaged[Cdecl]<nint, nuint, int, int, nint, nint, int> Recv;
        public readonly delegate* unmanaged[Cdecl]<int, nint> GetErrorString;
        public readonly delegate* unmanaged[Cdecl]<nint, nint> GetLastError;

        public Exports(nint library)
        {
            // NVLink multicast is not to be had on every machine that says so; a variable that is set stays as it is
            NativeVariables.Default("NCCL_NVLS_ENABLE", "0");
            GetVersion = (delegate* unmanaged[Cdecl]<int*, int>)Find("ncclGetVersion");
            GetUniqueId = (delegate* unmanaged[Cdecl]<UniqueId*, int>)Find("ncclGetUniqueId");
            CommInitRank = (delegate* unmanaged[Cdecl]<nint*, int, UniqueId, int, int>)Find("ncclCommInitRank");
            CommSplit = (delegate* unmanaged[Cdecl]<nint, int, int, nint*, nint, int>)Find("ncclCommSplit");
            CommDestroy = (delegate* unmanaged[Cdecl]<nint, int>)Find("ncclCommDestroy");
            CommAbort = (delegate* unmanaged[Cdecl]<nint, int>)Find("ncclCommAbort");
            CommGetAsyncError = (delegate* unmanaged[Cdecl]<nint, int*, int>)Find("ncclCommGetAsyncError");
            GroupStart = (delegate* unmanaged[Cdecl]<int>)Find("ncclGroupStart");
            GroupEnd = (delegate* unmanaged[Cdecl]<int>)Find("ncclGroupEnd");
            AllReduce = (delegate* unmanaged[Cdecl]<nint, nint, nuint, int, int, nint, nint, int>)Find("ncclAllReduce");
            ReduceScatter = (delegate* unmanaged[Cdecl]<nint, nint, nuint, int, int, nint, nint, int>)Find("ncclReduceScatter");
            AllGather = (delegate* unmanaged[Cdecl]<nint, nint, nuint, int, nint, nint, int>)Find("ncclAllGather");
            Send = (delegate* unmanaged[Cdecl]<nint, nuint, int, int, nint, nint, int>)Find("ncclSend");
            Recv = (delegate* unmanaged[Cdecl]<nint, nuint, int, int, nint, nint, int>)Find("ncclRecv");
            GetErrorString = (delegate* unmanaged[Cdecl]<int, nint>)Find("ncclGetErrorString");
            GetLastError = (delegate* unmanaged[Cdecl]<nint, nint>)Find("ncclGetLastError");

            nint Find(string name)
                => NativeLibrary.TryGetExport(library, name, out var address)
                    ? address
                    : throw DiagnosticException.Of(
                        Codes.NcclMissing,
                        FileName,
                        $"the NCCL that was found has no {name}",
                        "NCCL 2.18 or newer is needed; it comes with a CUDA build of PyTorch");
        }
    }
}

/// <summary>NCCL and the driver, on GPU number `device`.</summary>
internal sealed unsafe class NcclCalls(int device) : INcclCalls
{
    public void Enter() => Driver.Enter(device);

    public byte[] NewId() => NcclLibrary.NewId();

    public nint Join(byte[] id, int ranks, int rank) => NcclLibrary.Join(id, ranks, rank);

    public nint Split(nint communicator, int color, int key) => NcclLibrary.Split(communicator, color, key);

    public void Close(nint communicator) => NcclLibrary.Close(communicator);

    public void Abort(nint communicator) => NcclLibrary.Abort(communicator);

    public string? Fault(nint communicator) => NcclLibrary.Fault(communicator);

    public void Begin() => NcclLibrary.Begin();

    public void End() => NcclLibrary.End();

    public void AllReduce(nint communicator, nint from, nint to, long count, ScalarType type, bool max, nint stream)
        => NcclLibrary.AllReduce(communicator, from, to, count, type, max, stream);

    public void ReduceScatter(nint communicator, nint from, nint to, long count, ScalarType type, nint stream)
        => NcclLibrary.ReduceScatter(communicator, from, to, count, type, stream);

    public void AllGather(nint communicator, nint from, nint to, long bytes, nint stream)
        => NcclLibrary.AllGather(communicator, from, to, bytes, stream);

    public void Send(nint communicator, nint from, long bytes, int peer, nint stream) => NcclLibrary.Send(communicator, from, bytes, peer, stream);

    public void Receive(nint communicator, nint to, long bytes, int peer, nint stream) => NcclLibrary.Receive(communicator, to, bytes, peer, stream);

    public void Copy(nint from, nint to, long bytes, nint stream) => Driver.Copy(from, to, bytes, stream);

    public void ToHost(nint from, nint to, long bytes, nint stream) => Driver.ToHost(from, to, bytes, stream);

    public void Then(nint stream, System.Action<nint> work) => work(stream);

    public IRowWork Rows { get; } = new CudaRowWork();

    public nint Pinned(long bytes) => Driver.Pinned(bytes);

    public nint NewStream() => Driver.NewStream();

    public nint Where(nint stream) => stream;

    public nint NewEvent() => Driver.NewEvent();

    public void Record(nint @event, nint stream) => Driver.Record(@event, stream);

    public void Follow(nint stream, nint @event) => Driver.Follow(stream, @event);

    public bool IsDone(nint @event) => Driver.IsDone(@event);
}

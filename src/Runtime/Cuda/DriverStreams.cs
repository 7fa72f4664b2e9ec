// The CUDA driver, second part: streams beside the default one, events, copies, and memory of the processor that copies write to.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Cuda;

internal static unsafe partial class Driver
{
    private const uint NonBlocking = 1, DisableTiming = 2;
    private const int NotReady = 600;

    /// <summary>A stream that does not wait for the default one, nor that for it, and whose work goes first.</summary>
    public static nint NewStream()
    {
        // a collective that starts late holds up other ranks too: on two H200s 2 to 5 % more is hidden so
        Check(cuCtxGetStreamPriorityRange(out var _, out var highest), "cuCtxGetStreamPriorityRange");
        Check(cuStreamCreateWithPriority(out var stream, NonBlocking, highest), "cuStreamCreateWithPriority");
        return stream;
    }

    public static nint NewEvent()
    {
        Check(cuEventCreate(out var made, DisableTiming), "cuEventCreate");
        return made;
    }

    /// <summary>An event that knows when it happened.</summary>
    public static nint NewTimedEvent()
    {
        Check(cuEventCreate(out var made, 0), "cuEventCreate");
        return made;
    }

    public static void Destroy(nint @event) => Check(cuEventDestroy(@event), "cuEventDestroy");

    /// <summary>Between two events that have happened and know when.</summary>
    public static double Milliseconds(nint from, nint to)
    {
        Check(cuEventElapsedTime(out var milliseconds, from, to), "cuEventElapsedTime");
        return milliseconds;
    }

    public static void Record(nint @event, nint stream) => Check(cuEventRecord(@event, stream), "cuEventRecord");

    public static void Follow(nint stream, nint @event) => Check(cuStreamWaitEvent(stream, @event, 0), "cuStreamWaitEvent");

    public static void SynchronizeStream(nint stream) => Check(cuStreamSynchronize(stream), "cuStreamSynchronize");

    public static bool IsDone(nint @event)
    {
        var result = cuEventQuery(@event);
        if (result == NotReady)
            return false;
        Check(result, "cuEventQuery");
        return true;
    }

    public static void Copy(nint from, nint to, long bytes, nint stream)
        => Check(cuMemcpyDtoDAsync(to, from, (nuint)bytes, stream), "cuMemcpyDtoDAsync");

    public static void ToHost(nint from, nint to, long bytes, nint stream)
        => Check(cuMemcpyDtoHAsync((void*)to, from, (nuint)bytes, stream), "cuMemcpyDtoHAsync");

    /// <summary>Memory that is not pinned is staged before the call returns.</summary>
    public static void FromHost(void* from, nint to, long bytes, nint stream)
        => Check(cuMemcpyHtoDAsync(to, from, (nuint)bytes, stream), "cuMemcpyHtoDAsync");

    public static nint Pinned(long bytes)
    {
        Check(cuMemAllocHost(out var memory, (nuint)bytes), "cuMemAllocHost");
        return memory;
    }

    [LibraryImport(Library)]
    private static partial int cuCtxGetStreamPriorityRange(out int lowest, out int highest);

    [LibraryImport(Library)]
    private static partial int cuStreamCreateWithPriority(out nint stream, uint flags, int priority);

    [LibraryImport(Library)]
    private static partial int cuEventCreate(out nint made, uint flags);

    [LibraryImport(Library, EntryPoint = "cuEventDestroy_v2")]
    private static partial int cuEventDestroy(nint destroyed);

    [LibraryImport(Library)]
    private static partial int cuEventElapsedTime(out float milliseconds, nint from, nint to);

    [LibraryImport(Library)]
    private static partial int cuEventRecord(nint recorded, nint stream);

    [LibraryImport(Library)]
    private static partial int cuEventQuery(nint asked);

    [LibraryImport(Library)]
    private static partial int cuStreamWaitEvent(nint stream, nint awaited, uint flags);

    [LibraryImport(Library)]
    private static partial int cuStreamSynchronize(nint stream);

    [LibraryImport(Library, EntryPoint = "cuMemcpyDtoDAsync_v2")]
    private static partial int cuMemcpyDtoDAsync(nint to, nint from, nuint bytes, nint stream);

    [LibraryImport(Library, EntryPoint = "cuMemcpyDtoHAsync_v2")]
    private static partial int cuMemcpyDtoHAsync(void* to, nint from, nuint bytes, nint stream);

    [LibraryImport(Library, EntryPoint = "cuMemcpyHtoDAsync_v2")]
    private static partial int cuMemcpyHtoDAsync(nint to, void* from, nuint bytes, nint stream);

    [LibraryImport(Library, EntryPoint = "cuMemAllocHost_v2")]
    private static partial int cuMemAllocHost(out nint memory, nuint bytes);
}

// Marks of time in a traced step: on the processor's clock here, between the kernels of a GPU in CudaClock.
using System.Diagnostics;

namespace DeepSeekGraph.Runtime.Telemetry;

/// <summary>A mark is taken where a stream is, which waits for nothing, and read once the device has finished.</summary>
internal interface IStepClock : IDisposable
{
    /// <summary>When the step began, as HostTime.</summary>
    long Begin { get; }

    /// <summary>Are marks HostTime?</summary>
    bool IsHost { get; }

    /// <summary>A mark behind what a stream was given; 0 is the one that computes.</summary>
    long Mark(nint stream);

    /// <summary>Nanoseconds from the begin of the step to a mark.</summary>
    long Since(long mark);
}

/// <summary>Times of the processor, in ticks of Stopwatch.</summary>
internal static class HostTime
{
    public static long Now => Stopwatch.GetTimestamp();

    public static long Nanoseconds(long from, long to) => (long)((Int128)(to - from) * 1_000_000_000 / Stopwatch.Frequency);
}

/// <summary>The rank's own thread does everything, so a mark is now.</summary>
internal sealed class HostClock : IStepClock
{
    public long Begin { get; } = HostTime.Now;

    public bool IsHost => true;

    public long Mark(nint stream) => HostTime.Now;

    public long Since(long mark) => HostTime.Nanoseconds(Begin, mark);

    public void Dispose()
    {
    }
}

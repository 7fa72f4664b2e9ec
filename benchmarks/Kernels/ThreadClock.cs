// Processor time of the calling thread.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Benchmarks;

internal static partial class ThreadClock
{
    private const int ThreadProcessorTime = 3;

    /// Since the thread began; LibTorch works on the calling thread, too.
    public static double Milliseconds
    {
        get
        {
            if (Read(ThreadProcessorTime, out var time) != 0)
                throw new InvalidOperationException("the system has no clock of a thread's processor time");
            return (time.Seconds * 1e3) + (time.Nanoseconds / 1e6);
        }
    }

    [LibraryImport("libc", EntryPoint = "clock_gettime")]
    private static partial int Read(int clock, out Time time);

    [StructLayout(LayoutKind.Sequential)]
    private struct Time
    {
        public long Seconds;
        public long Nanoseconds;
    }
}

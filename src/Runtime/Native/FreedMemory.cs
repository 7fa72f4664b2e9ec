// What the C library's allocator does with freed memory: by default it gives large blocks back to the system each time.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Native;

/// <summary>
/// A step frees and allocates the same values again and again. Memory that goes back to the system in between has to be
/// mapped and zeroed by it once more, which costs more than many kernels do; benchmarks/results/step.md has the figures.
/// </summary>
internal static partial class FreedMemory
{
    // parameters of mallopt, from malloc.h
    private const int TrimThreshold = -1;
    private const int MapThreshold = -3;

    /// <summary>The largest value that glibc takes on 64-bit systems: half of a thread's heap.</summary>
    private const int LargestMapThreshold = 32 << 20;

    private static readonly Lazy<bool> Kept = new(Tune);

    /// <summary>Freed blocks of up to 32 MiB stay with the process from now on; false where the allocator knows no such setting.</summary>
    public static bool Keep() => Kept.Value;

    private static bool Tune()
    {
        try
        {
            return SetOption(MapThreshold, LargestMapThreshold) != 0 && SetOption(TrimThreshold, int.MaxValue) != 0;
        }
        catch (EntryPointNotFoundException)
        {
            // another C library, such as musl: slower, and nothing else
            return false;
        }
    }

    [LibraryImport("libc", EntryPoint = "mallopt")]
    private static partial int SetOption(int option, int value);
}

// The live line of a transfer: bytes done, share and speed; one line at the end where nobody watches.

using System.Diagnostics;
using System.Globalization;

namespace DeepSeekGraph.Cli;

/// May be told from any thread.
internal sealed class ByteProgress(string what)
{
    private const int Columns = 24;

    private readonly long _begin = Stopwatch.GetTimestamp();
    private readonly Lock _lock = new();
    private long _shown = Stopwatch.GetTimestamp();

    public void Show(long done, long all)
    {
        if (!Render.IsTerminal || Stopwatch.GetElapsedTime(Volatile.Read(ref _shown)).TotalSeconds < 0.1)
            return;
        lock (_lock)
        {
            _shown = Stopwatch.GetTimestamp();
            var share = all == 0 ? 1 : (double)done / all;
            var filled = (int)(share * Columns);
            Console.Write(
                $"\r{what} [{new string('#', filled)}{new string('.', Columns - filled)}] {share:P0}  {Size(done)} of {Size(all)}\e[K");
        }
    }

    /// Leaves the sum standing.
    public void Close(long all)
    {
        var seconds = Stopwatch.GetElapsedTime(_begin).TotalSeconds;
        var line = string.Create(
            CultureInfo.InvariantCulture, $"{what}: {Size(all)} in {seconds:F1} s, {Size((long)(all / Math.Max(seconds, 1e-3)))}/s");
        Console.WriteLine(Render.IsTerminal ? $"\r{line}\e[K" : line);
    }

    internal static string Size(long bytes)
        => bytes < 1_000_000_000
            ? string.Create(CultureInfo.InvariantCulture, $"{bytes / 1e6:F1} MB")
            : string.Create(CultureInfo.InvariantCulture, $"{bytes / 1e9:F2} GB");
}

// --trace: one step of every rank as a file for Perfetto or chrome://tracing, and what share of its communication was hidden.

using System.Globalization;
using System.Text;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Telemetry;
using DeepSeekGraph.Runtime.Training;

namespace DeepSeekGraph.Cli;

/// What is traced, and where to: the folder, and the step counted from where training began.
internal sealed record Tracing(string Folder, long Step)
{
    /// Code is compiled, memory allocated and kernels chosen by then.
    public const int WarmedUp = 5;

    /// So many ranks are told of; all are in the folder.
    private const int MostRanks = 8;

    private const int MostCollectives = 3;

    /// Null where nothing is asked for. DSG0902 where the run has no such step, DSG0815 where the folder holds something.
    public static Tracing? Of(RunChoices how, int steps, long done, Launched launched)
    {
        if (how.Trace is not { } folder)
            return null;
        var left = steps - done;
        // a job that was started again has fewer steps than it was asked for, and files of its own
        var isNew = launched.Restart is null;
        if (how.TraceStep > left && isNew)
        {
            throw DiagnosticException.Of(
                Codes.OptionValue,
                "--trace-step",
                $"step {how.TraceStep} is not one of the {left} that are trained",
                $"give 1 to {left}, or more steps with --steps");
        }

        if (isNew && launched.IsFirst && (File.Exists(folder) || (Directory.Exists(folder) && Directory.EnumerateFileSystemEntries(folder).Any())))
        {
            throw DiagnosticException.Of(
                Codes.OutputTaken,
                "--trace",
                $"the folder '{folder}' is not empty",
                "give --trace a new or empty folder");
        }

        return new Tracing(folder, done + Math.Min(how.TraceStep ?? WarmedUp, left));
    }

    /// Before the first step; DSG0816.
    public void Prepare()
    {
        try
        {
            Directory.CreateDirectory(Folder);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw DiagnosticException.Of(
                Codes.OutputUnwritable, "--trace", $"the folder '{Folder}' cannot be made: {e.Message}", "give --trace a folder that you may write to");
        }
    }

    /// Writes the files of this process, and says what all of them found. All processes call it after the traced step.
    public void Tell(Trainer trainer)
    {
        var mine = new StringBuilder();
        foreach (var trace in trainer.Traces)
            mine.Append(Lines(trace, trace.Write(Folder)));
        var all = trainer.World.Processes == 1
            ? mine.ToString()
            : Encoding.UTF8.GetString(trainer.World.Meet(
                "trace", Encoding.UTF8.GetBytes(mine.ToString()), static each => [.. each.SelectMany(bytes => bytes)], trainer.World.Stop));
        var ranks = 0;
        foreach (var line in all.Split('\n', StringSplitOptions.RemoveEmptyEntries))
        {
            if (!line.StartsWith(' '))
                ranks++;
            if (ranks <= MostRanks)
                Console.WriteLine(line);
        }

        if (ranks > MostRanks)
            Console.WriteLine($"trace: {PlanSummary.Count(ranks - MostRanks, "rank")} more in {Folder}");
    }

    /// A line of figures, and one of the collectives that are exposed most.
    internal static string Lines(StepTrace trace, string path)
    {
        var overlap = trace.Overlap;
        var hidden = overlap.HiddenShare is { } share ? Text($"communication {Ms(overlap.Communication)}, {100 * share:F1} % hidden") : "no communication";
        var waits = overlap.HostWait > 0 ? Text($"; host waits {Ms(overlap.HostWait)}") : "";
        var lines = Text($"trace: rank {trace.Rank}: {hidden}; compute {Ms(overlap.Compute)} of {Ms(overlap.Length)}{waits}; {path}\n");
        string[] most = [.. overlap.Collectives
            .Where(c => c.Exposed > 0)
            .Take(MostCollectives)
            .Select(c => Text($"{Ms(c.Exposed)} {c.Kind} on {c.Group} of {(c.Path.Length > 0 ? c.Path : "no module")} ({c.Count})"))];
        return most.Length == 0 ? lines : $"{lines}  exposed: {string.Join("; ", most)}\n";
    }

    private static string Ms(long nanoseconds) => Text($"{nanoseconds / 1e6:F1} ms");

    private static string Text(FormattableString text) => text.ToString(CultureInfo.InvariantCulture);
}

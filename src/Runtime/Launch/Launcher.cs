// What a process that dsg launch started has of its launcher: it ends when that does, and tells where a restart goes on.
using System.Globalization;
using System.Runtime.InteropServices;
using System.Text.Json;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>Where a run writes: what a restart goes on with.</summary>
public sealed record RunRecord(string Folder, string Checkpoints);

public static partial class Launcher
{
    /// <summary>Environment variable with the launcher's process id.</summary>
    public const string PidVariable = "DSG_LAUNCHER_PID";

    /// <summary>Environment variable that names the file of the RunRecord; there is one when this is a restart.</summary>
    public const string RecordVariable = "DSG_LAUNCH_RECORD";

    private static readonly TimeSpan s_interval = TimeSpan.FromSeconds(1);

    /// <summary>Begins to watch the launcher, if there is one: without it this process is killed. Signals of a terminal go to it only.</summary>
    public static void Watch()
    {
        if (!int.TryParse(Environment.GetEnvironmentVariable(PidVariable), NumberStyles.None, CultureInfo.InvariantCulture, out var launcher))
            return;
        _ = setpgid(0, 0);
        Sockets.Start("launcher watch", () =>
        {
            while (getppid() == launcher)
                Thread.Sleep(s_interval);
            Console.Error.WriteLine("dsg: the launcher is gone; this process ends too");
            using var self = System.Diagnostics.Process.GetCurrentProcess();
            self.Kill();
        });
    }

    /// <summary>What an earlier start of this job has written; null for the first one.</summary>
    public static RunRecord? Restarted()
        => Environment.GetEnvironmentVariable(RecordVariable) is { Length: > 0 } path ? Read(path) : null;

    /// <summary>The record in a file; null where there is none.</summary>
    public static RunRecord? Read(string path)
    {
        try
        {
            return JsonSerializer.Deserialize<RunRecord>(File.ReadAllBytes(path));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or JsonException)
        {
            return null;
        }
    }

    /// <summary>Tells the launcher where the run writes.</summary>
    public static void Record(RunRecord record)
    {
        if (Environment.GetEnvironmentVariable(RecordVariable) is not { Length: > 0 } path)
            return;
        var temporary = path + ".tmp";
        File.WriteAllBytes(temporary, JsonSerializer.SerializeToUtf8Bytes(record));
        File.Move(temporary, path, overwrite: true);
    }

    /// <summary>Sends a signal to a process; false where there is none.</summary>
    public static bool Signal(int process, int signal) => kill(process, signal) == 0;

    [LibraryImport("libc")]
    private static partial int getppid();

    [LibraryImport("libc")]
    private static partial int setpgid(int process, int group);

    [LibraryImport("libc")]
    private static partial int kill(int process, int signal);
}

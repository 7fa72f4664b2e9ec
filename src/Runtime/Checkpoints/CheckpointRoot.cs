// The folder of a run's checkpoints: iter_0000100, iter_0000200, ..., and `latest`, which names one.

using System.Globalization;
using System.Text.RegularExpressions;
using DeepSeekGraph.Runtime.Native;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// A folder iter_N is whole: it got its name when all in it was on disk. `latest` is written after that, so after a crash it may be
/// older than the newest folder, never newer.
public static partial class CheckpointRoot
{
    /// The file that names the checkpoint to go on from.
    public const string Latest = "latest";

    /// Where a run's folder has its checkpoints.
    public const string InRun = "checkpoints";

    private const string LockFile = ".lock";
    private const int MostLatest = 100;

    /// The folder of a step, in Megatron's form.
    public static string NameOf(long step) => string.Create(CultureInfo.InvariantCulture, $"iter_{step:D7}");

    /// One checkpoint's folder: `path` itself, or of a root, or of a run's folder, what `latest` names, else the newest; DSG0840.
    public static string Resolve(string path)
    {
        try
        {
            if (File.Exists(Path.Combine(path, CheckpointManifest.FileName)))
                return path;
            foreach (var root in (string[])[path, Path.Combine(path, InRun)])
            {
                if (!Directory.Exists(root))
                    continue;
                Recover(root);
                if (Named(root) is { } folder)
                    return folder;
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw Missing(path, $"'{path}' cannot be read: {e.Message}");
        }

        throw Missing(path, $"there is no checkpoint in '{path}'");
    }

    /// Steps of the whole checkpoints of a root, ascending.
    public static IReadOnlyList<long> Steps(string root)
        => [.. Directory.EnumerateDirectories(root)
            .Where(folder => File.Exists(Path.Combine(folder, CheckpointManifest.FileName)))
            .Select(folder => StepOf(Path.GetFileName(folder)))
            .OfType<long>()
            .Order()];

    /// Only one process at a time saves to a root, until it disposes what this gives; it may remove what killed ones left. DSG0845.
    internal static IDisposable Claim(string root)
    {
        Directory.CreateDirectory(root);
        return TryClaim(root) ?? throw DiagnosticException.Of(
            Codes.CheckpointBusy,
            root,
            $"another process saves checkpoints to '{root}'",
            "wait until it has ended, or save to another folder");
    }

    /// Names the checkpoint of a step as the one to go on from.
    internal static void SetLatest(string root, long step)
    {
        var temporary = Path.Combine(root, $"{Latest}.tmp");
        using (var file = new FileStream(temporary, FileMode.Create, FileAccess.Write))
        {
            file.Write(System.Text.Encoding.ASCII.GetBytes(NameOf(step) + "\n"));
            file.Flush(flushToDisk: true);
        }

        File.Move(temporary, Path.Combine(root, Latest), overwrite: true);
        FileCalls.FlushFolder(root);
    }

    /// Removes all but the last `keep` checkpoints up to `step`; 0 keeps all. Each loses its name first, so that none is ever half there.
    internal static void Prune(string root, int keep, long step)
    {
        if (keep <= 0)
            return;
        foreach (var old in Steps(root).Where(s => s <= step).SkipLast(keep))
        {
            var folder = Path.Combine(root, NameOf(old));
            var doomed = $"{folder}.{Guid.NewGuid():N}.tmp";
            Directory.Move(folder, doomed);
            Directory.Delete(doomed, recursive: true);
        }
    }

    /// Takes away what killed processes left, unless one is at work.
    private static void Recover(string root)
    {
        try
        {
            if (Directory.EnumerateDirectories(root).Any(folder => Leftover().IsMatch(Path.GetFileName(folder))))
                TryClaim(root)?.Dispose();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            // a root that may only be read is read as it is
        }
    }

    private static FileStream? TryClaim(string root)
    {
        FileStream claim;
        try
        {
            claim = new FileStream(Path.Combine(root, LockFile), FileMode.OpenOrCreate, FileAccess.ReadWrite, FileShare.None);
        }
        catch (IOException) when (File.Exists(Path.Combine(root, LockFile)))
        {
            return null;
        }

        try
        {
            RemoveLeftovers(root);
            return claim;
        }
        catch
        {
            claim.Dispose();
            throw;
        }
    }

    /// A folder that stood aside while another took its place goes back where that one never came.
    private static void RemoveLeftovers(string root)
    {
        foreach (var folder in Directory.GetDirectories(root))
        {
            var match = Leftover().Match(Path.GetFileName(folder));
            if (!match.Success)
                continue;
            var target = Path.Combine(root, match.Groups["name"].Value);
            if (match.Groups["old"].Success && !Directory.Exists(target))
                Directory.Move(folder, target);
            else
                Directory.Delete(folder, recursive: true);
        }
    }

    private static string? Named(string root)
    {
        var file = new FileInfo(Path.Combine(root, Latest));
        var name = file is { Exists: true, Length: <= MostLatest } && !FileCalls.IsSpecial(file.FullName)
            ? File.ReadAllText(file.FullName).Trim()
            : null;
        var steps = Steps(root);
        return name is not null && StepOf(name) is { } step && steps.Contains(step) ? Path.Combine(root, name)
            : steps.Count > 0 ? Path.Combine(root, NameOf(steps[^1]))
            : null;
    }

    /// Only the exact name of a step.
    private static long? StepOf(string name)
        => FolderName().Match(name) is { Success: true } match
            && long.TryParse(match.Groups["step"].Value, NumberStyles.None, CultureInfo.InvariantCulture, out var step)
            && NameOf(step) == name
                ? step
                : null;

    private static DiagnosticException Missing(string path, string what) => DiagnosticException.Of(
        Codes.NoCheckpoint,
        path,
        what,
        "give a folder iter_N of a checkpoint, the folder that holds several, or that of a run that saved (--save-interval N)");

    [GeneratedRegex(@"^iter_(?<step>\d{7,18})\z")]
    private static partial Regex FolderName();

    [GeneratedRegex(@"^(?<name>iter_\d{7,18})\.[0-9a-f]{32}\.tmp(?<old>\.old)?\z")]
    private static partial Regex Leftover();
}

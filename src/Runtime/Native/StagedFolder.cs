// A folder that is written aside and takes its place in one step: whole, or as it was before.

namespace DeepSeekGraph.Runtime.Native;

/// Until Commit all lies in a folder beside the target, and Dispose takes it away again.
/// Callers turn IOException and UnauthorizedAccessException into their own diagnostics.
internal sealed class StagedFolder : IDisposable
{
    private readonly Func<string, bool> _replaced;
    private bool _done;

    private StagedFolder(string target, string path, Func<string, bool> replaced)
        => (Target, Path, _replaced) = (target, path, replaced);

    /// Where the folder will be, links resolved.
    public string Target { get; }

    /// Where it is written.
    public string Path { get; }

    /// A target that is not there, or holds plain files only: those for which `replaced` says so go away with Commit,
    /// the others stay. DSG0815 for any other target.
    public static StagedFolder Create(string target, Func<string, bool> replaced)
    {
        var full = System.IO.Path.TrimEndingDirectorySeparator(System.IO.Path.GetFullPath(target));
        if (Directory.Exists(full))
        {
            full = Directory.ResolveLinkTarget(full, returnFinalTarget: true)?.FullName ?? full;
            RequirePlainFiles(full);
        }
        else if (File.Exists(full))
            throw Taken(target, "is a file");
        var parent = System.IO.Path.GetDirectoryName(full) ?? throw Taken(target, "has no folder above it");
        Directory.CreateDirectory(parent);
        var path = $"{full}.{Guid.NewGuid():N}.tmp";
        Directory.CreateDirectory(path);
        return new StagedFolder(full, path, replaced);
    }

    /// Puts the folder in its place; files in it must be flushed. Where the file system cannot exchange two folders,
    /// there is a moment in which the target is not there and the old one lies beside it.
    public void Commit()
    {
        var exists = Directory.Exists(Target);
        if (exists)
        {
            RequirePlainFiles(Target);
            foreach (var kept in Directory.EnumerateFiles(Target))
            {
                var name = System.IO.Path.GetFileName(kept);
                var here = System.IO.Path.Combine(Path, name);
                if (!_replaced(name) && !File.Exists(here))
                    FileCalls.Link(kept, here);
            }
        }

        FileCalls.FlushFolder(Path);
        if (!exists)
            Directory.Move(Path, Target);
        else if (!FileCalls.TryExchange(Path, Target))
            ExchangeInSteps();
        FileCalls.FlushFolder(System.IO.Path.GetDirectoryName(Target)!);
        _done = true;
        if (exists)
            DeleteQuietly();
    }

    public void Dispose()
    {
        if (!_done)
            DeleteQuietly();
        _done = true;
    }

    private void ExchangeInSteps()
    {
        var old = $"{Path}.old";
        Directory.Move(Target, old);
        try
        {
            Directory.Move(Path, Target);
        }
        catch
        {
            Directory.Move(old, Target);
            throw;
        }

        Directory.Move(old, Path);
    }

    private static void RequirePlainFiles(string folder)
    {
        foreach (var entry in new DirectoryInfo(folder).EnumerateFileSystemInfos())
        {
            if (entry is DirectoryInfo || entry.LinkTarget is not null || FileCalls.IsSpecial(entry.FullName))
                throw Taken(folder, $"holds '{entry.Name}', which is no plain file");
        }
    }

    private static DiagnosticException Taken(string path, string what)
        => DiagnosticException.Of(
            Codes.OutputTaken,
            path,
            $"the output folder '{path}' {what}",
            "give a new folder, or one that holds plain files only");

    /// After a success this is the old folder; after a failure, that failure is the one to report.
    private void DeleteQuietly()
    {
        try
        {
            Directory.Delete(Path, recursive: true);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
        }
    }
}

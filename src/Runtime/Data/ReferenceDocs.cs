// The default corpus: finds the reference documentation of the installed .NET and reads it in a fixed order.

using System.Collections.Concurrent;
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Data;

/// Needs no download: an SDK installs about 70 MB of documentation beside its reference assemblies.
internal static class ReferenceDocs
{
    private static readonly StringComparer s_order = StringComparer.Ordinal;

    /// The first place that has documentation: the SDK's packs, then restored packages; DSG0810 without any.
    public static Corpus Load()
    {
        foreach (var root in Roots())
        {
            if (TryRead(".NET reference documentation", Path.Combine(root, "packs")) is { } corpus)
            {
                return corpus;
            }
        }

        return TryRead("documentation of restored packages", PackagesFolder())
            ?? throw DiagnosticException.Of(
                Codes.DataUnavailable,
                "--data",
                "no default corpus: this .NET installation has no reference documentation",
                "give --data a .txt or .jsonl file, or install a .NET SDK");
    }

    /// Documents of every documentation file below `folder`, or null when there are none.
    internal static Corpus? TryRead(string what, string folder)
    {
        var files = Find(folder);
        var parsed = new List<DocType>[files.Length];

        // Each file has its own place in the result, so the order does not depend on the threads.
        Parallel.ForEach(
            Partitioner.Create(Enumerable.Range(0, files.Length), EnumerablePartitionerOptions.NoBuffering),
            i => parsed[i] = DocXml.Read(files[i]));

        var seen = new HashSet<string>(s_order);
        var documents = new List<string>();
        foreach (var type in parsed.SelectMany(types => types))
        {
            var fresh = type.Members.Where(seen.Add).ToArray();
            if (fresh.Length > 0)
            {
                documents.Add($"{type.Name}\n\n{string.Join("\n\n", fresh)}\n");
            }
        }

        return documents.Count == 0 ? null : Corpus.FromTexts($"{what} in {folder}", documents);
    }

    /// Documentation of the newest version of each package: .xml files that lie beside their .dll.
    private static string[] Find(string folder)
    {
        try
        {
            return Directory.Exists(folder)
                ? Directory.GetDirectories(folder)
                    .OrderBy(Path.GetFileName, s_order)
                    .SelectMany(package => Documentation(Newest(package)))
                    .ToArray()
                : [];
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return [];
        }
    }

    private static IEnumerable<string> Documentation(string? package)
        => package is null
            ? []
            : Directory
                .EnumerateFiles(
                    package,
                    "*.xml",
                    new EnumerationOptions { RecurseSubdirectories = true, MaxRecursionDepth = 6 })
                .Where(xml => File.Exists(Path.ChangeExtension(xml, ".dll")))
                .OrderBy(xml => Path.GetRelativePath(package, xml).Replace('\\', '/'), s_order);

    private static string? Newest(string package)
        => Directory.GetDirectories(package)
            .OrderBy(folder => NumberOf(Path.GetFileName(folder)))
            .ThenBy(Path.GetFileName, s_order)
            .LastOrDefault();

    private static Version NumberOf(string folder)
        => Version.TryParse(folder.Split('-', '+')[0], out var version) ? version : new Version();

    private static IEnumerable<string> Roots()
    {
        var home = Environment.GetFolderPath(Environment.SpecialFolder.UserProfile);
        string?[] places =
        [
            Environment.GetEnvironmentVariable("DOTNET_ROOT"),
            // <root>/shared/Microsoft.NETCore.App/<version>/
            Above(RuntimeEnvironment.GetRuntimeDirectory(), 3),
            Above(Resolved(Environment.ProcessPath), 1),
            .. (Environment.GetEnvironmentVariable("PATH") ?? "")
                .Split(Path.PathSeparator, StringSplitOptions.RemoveEmptyEntries)
                .Select(folder => Above(Resolved(Path.Combine(folder, "dotnet")), 1)),
            Path.Combine(home, ".dotnet"),
            "/usr/share/dotnet",
            "/usr/lib/dotnet",
            "/usr/lib64/dotnet",
            "/usr/local/share/dotnet",
            Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.ProgramFiles), "dotnet"),
        ];
        return places.OfType<string>().Where(place => place.Length > 0).Distinct(s_order);
    }

    private static string? Above(string? path, int levels)
    {
        path = path is null ? null : Path.TrimEndingDirectorySeparator(path);
        for (var i = 0; i < levels && path is not null; i++)
        {
            path = Path.GetDirectoryName(path);
        }

        return path;
    }

    /// The file behind a link such as /usr/bin/dotnet; null when there is none.
    private static string? Resolved(string? path)
    {
        try
        {
            return path is null || !File.Exists(path)
                ? null
                : File.ResolveLinkTarget(path, returnFinalTarget: true)?.FullName ?? path;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    private static string PackagesFolder()
        => Environment.GetEnvironmentVariable("NUGET_PACKAGES") is { Length: > 0 } set
            ? set
            : Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".nuget", "packages");
}

// Compiled stages on disk, in a folder that only its owner may use: loading one means running it.
using System.Security.Cryptography;
using DeepSeekGraph.Runtime.Native;

namespace DeepSeekGraph.Runtime.Execution.Generated;

/// <summary>Entries by key; an entry that is damaged or not this user's alone counts as missing.</summary>
public sealed class CodeCache
{
    /// <summary>Environment variable that names another folder than the user's cache.</summary>
    public const string FolderVariable = "DSG_CACHE";

    private const string Extension = ".stage";
    private const UnixFileMode OwnersFolder = UnixFileMode.UserRead | UnixFileMode.UserWrite | UnixFileMode.UserExecute;
    private const UnixFileMode OwnersFile = UnixFileMode.UserRead | UnixFileMode.UserWrite;
    private const int LargestEntry = 64 << 20;

    /// <summary>Entries kept; beyond, those unused for longest go.</summary>
    private const int MostEntries = 512;

    private readonly string? _folder;

    /// <summary>Opens the folder, or makes it. Where it cannot be trusted, nothing is read or written, and Refusal says why.</summary>
    public CodeCache(string? folder)
    {
        if (folder is null)
        {
            Refusal = "compiled plans are not kept: this user has no cache folder";
            return;
        }

        if (!OperatingSystem.IsLinux())
        {
            Refusal = "compiled plans are not kept: whose a file is can be told on Linux only";
            return;
        }

        try
        {
            Directory.CreateDirectory(folder, OwnersFolder);
            Refusal = FileOwner.ObjectionToFolder(folder) is { } objection
                ? $"compiled plans are not kept in {folder}: {objection}"
                : null;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            Refusal = $"compiled plans are not kept in {folder}: {e.Message}";
        }

        _folder = Refusal is null ? folder : null;
    }

    /// <summary>$DSG_CACHE, else dsg below $XDG_CACHE_HOME or ~/.cache; null where there is none.</summary>
    public static string? DefaultFolder
    {
        get
        {
            if (Environment.GetEnvironmentVariable(FolderVariable) is { Length: > 0 } chosen)
                return Path.GetFullPath(chosen);
            if (Environment.GetEnvironmentVariable("XDG_CACHE_HOME") is { } cache && Path.IsPathFullyQualified(cache))
                return Path.Combine(cache, "dsg");
            return Environment.GetFolderPath(Environment.SpecialFolder.UserProfile) is { Length: > 0 } home
                ? Path.Combine(home, ".cache", "dsg")
                : null;
        }
    }

    /// <summary>Why nothing is kept; null while the folder is used.</summary>
    public string? Refusal { get; private set; }

    /// <summary>The content of an entry; null where there is none that is whole.</summary>
    public byte[]? Read(string key)
    {
        if (_folder is null)
            return null;
        var path = PathOf(_folder, key);
        try
        {
            using var file = new FileStream(path, FileMode.Open, FileAccess.Read, FileShare.Read | FileShare.Delete);
            if (FileOwner.ObjectionToFile(file.SafeFileHandle) is not null || file.Length is <= SHA256.HashSizeInBytes or > LargestEntry)
                return null;
            var entry = new byte[file.Length];
            file.ReadExactly(entry);
            var content = entry.AsSpan(SHA256.HashSizeInBytes);
            if (!SHA256.HashData(content).AsSpan().SequenceEqual(entry.AsSpan(0, SHA256.HashSizeInBytes)))
                return null;
            File.SetLastWriteTimeUtc(path, DateTime.UtcNow);
            return content.ToArray();
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return null;
        }
    }

    /// <summary>Keeps an entry: its SHA-256, then its content; in one go, over whatever was there.</summary>
    public void Write(string key, byte[] content)
    {
        if (!OperatingSystem.IsLinux() || _folder is null || content.Length > LargestEntry - SHA256.HashSizeInBytes)
            return;
        var temporary = Path.Combine(_folder, $"{Guid.NewGuid():N}.tmp");
        try
        {
            try
            {
                var create = new FileStreamOptions
                {
                    Mode = FileMode.CreateNew,
                    Access = FileAccess.Write,
                    UnixCreateMode = OwnersFile,
                };
                using (var file = new FileStream(temporary, create))
                {
                    file.Write(SHA256.HashData(content));
                    file.Write(content);
                }

                File.Move(temporary, PathOf(_folder, key), true);
            }
            finally
            {
                File.Delete(temporary);
            }

            Prune(_folder);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            Refusal = $"compiled plans are not kept in {_folder}: {e.Message}";
        }
    }

    private static string PathOf(string folder, string key) => Path.Combine(folder, key + Extension);

    private static void Prune(string folder)
    {
        FileInfo[] entries = [.. new DirectoryInfo(folder).EnumerateFiles("*" + Extension)];
        foreach (var entry in entries.OrderByDescending(e => e.LastWriteTimeUtc).Skip(MostEntries))
            entry.Delete();
    }
}

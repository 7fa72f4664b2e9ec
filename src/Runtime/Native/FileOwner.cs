// Who owns a file and who else may touch it.
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace DeepSeekGraph.Runtime.Native;

/// <summary>Asks the kernel about files that only this user may read and write.</summary>
internal static partial class FileOwner
{
    private const int OthersMask = 0x3F;

    /// <summary>Why a folder is not this user's alone; null where it is. A link to one is not.</summary>
    public static string? ObjectionToFolder(string path)
        => FileCalls.TryExamine(path, out var found) ? Objection(found, FileCalls.TypeFolder, "a folder") : "it cannot be examined";

    /// <summary>Why an open file is not this user's alone; null where it is.</summary>
    public static string? ObjectionToFile(SafeFileHandle file)
        => FileCalls.TryExamine(file, out var found) ? Objection(found, FileCalls.TypeFile, "a regular file") : "it cannot be examined";

    private static string? Objection(in FileCalls.Status found, int type, string what)
        => (found.Mode & FileCalls.TypeMask) != type ? $"it is not {what}"
            : found.Owner != geteuid() ? "it belongs to another user"
            : (found.Mode & OthersMask) != 0 ? "other users may use it"
            : null;

    [LibraryImport("libc")]
    private static partial uint geteuid();
}

// Who owns a file and who else may touch it: statx of Linux, which lays out the same on every processor.
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace DeepSeekGraph.Runtime.Native;

/// <summary>Asks the kernel about files that only this user may read and write.</summary>
internal static unsafe partial class FileOwner
{
    private const int AtCurrentFolder = -100, AtNoFollow = 0x100, AtEmptyPath = 0x1000;
    private const uint BasicFields = 0x7ff;
    private const int TypeMask = 0xF000, TypeFolder = 0x4000, TypeFile = 0x8000, OthersMask = 0x3F;

    /// <summary>Why a folder is not this user's alone; null where it is. A link to one is not.</summary>
    public static string? ObjectionToFolder(string path)
        => statx(AtCurrentFolder, path, AtNoFollow, BasicFields, out var found) != 0 ? "it cannot be examined" : Objection(found, TypeFolder, "a folder");

    /// <summary>Why an open file is not this user's alone; null where it is.</summary>
    public static string? ObjectionToFile(SafeFileHandle file)
    {
        var held = false;
        try
        {
            file.DangerousAddRef(ref held);
            return statx((int)file.DangerousGetHandle(), "", AtEmptyPath, BasicFields, out var found) != 0
                ? "it cannot be examined"
                : Objection(found, TypeFile, "a regular file");
        }
        finally
        {
            if (held)
                file.DangerousRelease();
        }
    }

    private static string? Objection(in Found found, int type, string what)
        => (found.Mode & TypeMask) != type ? $"it is not {what}"
            : found.Owner != geteuid() ? "it belongs to another user"
            : (found.Mode & OthersMask) != 0 ? "other users may use it"
            : null;

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int statx(int folder, string path, int flags, uint mask, out Found found);

    [LibraryImport("libc")]
    private static partial uint geteuid();

    /// <summary>struct statx: 256 bytes.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 256)]
    private struct Found
    {
        [FieldOffset(20)]
        public uint Owner;

        [FieldOffset(28)]
        public ushort Mode;
    }
}

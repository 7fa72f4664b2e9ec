// Calls of Linux on files and folders that .NET has no name for.
using System.Runtime.InteropServices;
using Microsoft.Win32.SafeHandles;

namespace DeepSeekGraph.Runtime.Native;

/// <summary>Every call but those that ask what is there throws IOException with the system's own words.</summary>
internal static unsafe partial class FileCalls
{
    public const int TypeMask = 0xF000, TypeFolder = 0x4000, TypeFile = 0x8000;
    private const int AtCurrentFolder = -100, FolderOnly = 0x10000, CloseOnExec = 0x80000;
    private const int AtNoFollow = 0x100, AtEmptyPath = 0x1000;
    private const uint BasicFields = 0x7ff, Exchange = 2;
    private const int NoCall = 38, Invalid = 22, OtherDevice = 18, Unsupported = 95;

    /// <summary>True for what is there but neither a file nor a folder, links followed: pipes, devices, sockets.</summary>
    public static bool IsSpecial(string path)
        => statx(AtCurrentFolder, path, 0, BasicFields, out var found) == 0 && (found.Mode & TypeMask) is not (TypeFile or TypeFolder);

    /// <summary>Owner and mode of what is at a path, a link itself; false where it cannot be examined.</summary>
    public static bool TryExamine(string path, out Status found) => statx(AtCurrentFolder, path, AtNoFollow, BasicFields, out found) == 0;

    /// <summary>Owner and mode of an open file; false where it cannot be examined.</summary>
    public static bool TryExamine(SafeFileHandle file, out Status found)
    {
        var held = false;
        try
        {
            file.DangerousAddRef(ref held);
            return statx((int)file.DangerousGetHandle(), "", AtEmptyPath, BasicFields, out found) == 0;
        }
        finally
        {
            if (held)
                file.DangerousRelease();
        }
    }

    /// <summary>Takes the disk space of a file's first bytes, so that writing to a map of them cannot fail for want of it.</summary>
    public static void Reserve(SafeFileHandle file, long bytes)
    {
        var held = false;
        try
        {
            file.DangerousAddRef(ref held);
            var error = posix_fallocate((int)file.DangerousGetHandle(), 0, bytes);
            if (error != 0)
                throw new IOException($"{bytes} bytes cannot be reserved: {Marshal.GetPInvokeErrorMessage(error)}");
        }
        finally
        {
            if (held)
                file.DangerousRelease();
        }
    }

    /// <summary>A second name for a file of the same disk.</summary>
    public static void Link(string from, string to) => Require(link(from, to), to);

    /// <summary>Two folders change their names in one step; false where the file system cannot.</summary>
    public static bool TryExchange(string a, string b)
    {
        if (renameat2(AtCurrentFolder, a, AtCurrentFolder, b, Exchange) == 0)
            return true;
        return Marshal.GetLastPInvokeError() is NoCall or Invalid or OtherDevice or Unsupported ? false : throw Failure(b);
    }

    /// <summary>Names that were made or changed in a folder are on disk when this returns.</summary>
    public static void FlushFolder(string path)
    {
        var folder = open(path, FolderOnly | CloseOnExec);
        Require(folder < 0 ? -1 : 0, path);
        try
        {
            // Some network file systems have nothing to flush here and say so.
            if (fsync(folder) != 0 && Marshal.GetLastPInvokeError() != Invalid)
                throw Failure(path);
        }
        finally
        {
            _ = close(folder);
        }
    }

    private static void Require(int result, string path)
    {
        if (result != 0)
            throw Failure(path);
    }

    private static IOException Failure(string path) => new($"{Marshal.GetPInvokeErrorMessage(Marshal.GetLastPInvokeError())}: {path}");

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8)]
    private static partial int statx(int folder, string path, int flags, uint mask, out Status found);

    [LibraryImport("libc")]
    private static partial int posix_fallocate(int file, long offset, long bytes);

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8, SetLastError = true)]
    private static partial int link(string from, string to);

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8, SetLastError = true)]
    private static partial int renameat2(int folderA, string a, int folderB, string b, uint flags);

    [LibraryImport("libc", StringMarshalling = StringMarshalling.Utf8, SetLastError = true)]
    private static partial int open(string path, int flags);

    [LibraryImport("libc", SetLastError = true)]
    private static partial int fsync(int file);

    [LibraryImport("libc")]
    private static partial int close(int file);

    /// <summary>struct statx of Linux, which lays out the same on every processor: 256 bytes.</summary>
    [StructLayout(LayoutKind.Explicit, Size = 256)]
    public struct Status
    {
        [FieldOffset(20)]
        public uint Owner;

        [FieldOffset(28)]
        public ushort Mode;
    }
}

// Environment variables as native libraries of this process see them: those that .NET sets are its own.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Native;

internal static partial class NativeVariables
{
    /// <summary>Sets a variable for native code, unless it has a value.</summary>
    public static void Default(string name, string value)
    {
        if (setenv(name, value, 0) != 0)
            throw new InvalidOperationException($"setenv({name}) failed with error {Marshal.GetLastPInvokeError()}");
    }

    [LibraryImport("libc", SetLastError = true, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int setenv(string name, string value, int overwrite);
}

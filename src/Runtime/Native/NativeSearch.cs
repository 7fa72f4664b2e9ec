// Finds a native library by name: on the loader's path, else in folders.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Native;

internal static class NativeSearch
{
    /// <summary>
    /// The first of `names` that the loader finds by itself (LibTorch with CUDA has loaded some already, then it is that one), else the first that a
    /// folder has; null where there is none.
    /// </summary>
    public static nint? Find(IReadOnlyList<string> names, IEnumerable<string> folders)
    {
        foreach (var name in names)
        {
            if (NativeLibrary.TryLoad(name, out var library))
                return library;
        }

        foreach (var path in folders.SelectMany(folder => names.Select(name => Path.Combine(folder, name))))
        {
            if (File.Exists(path) && NativeLibrary.TryLoad(path, out var library))
                return library;
        }

        return null;
    }
}

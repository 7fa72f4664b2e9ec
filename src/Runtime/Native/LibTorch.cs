// Finds and loads LibTorch; call Load before anything of TorchSharp.
using System.Runtime.InteropServices;
using TorchSharp;

namespace DeepSeekGraph.Runtime.Native;

/// <summary>The one copy of LibTorch that all programs share.</summary>
public static class LibTorch
{
    /// <summary>Environment variable that names another folder with libtorch.so (a CUDA build, python's torch/lib).</summary>
    public const string FolderVariable = "DSG_LIBTORCH";

    static readonly Lazy<string> loaded = new(LoadOnce);

    /// <summary>Loads the native libraries; the first call does the work, on any thread.</summary>
    /// <exception cref="DiagnosticException">DSG0801 when LibTorch is not found, DSG0802 when it does not load.</exception>
    public static void Load() => _ = loaded.Value;

    /// <summary>The folder that LibTorch was loaded from.</summary>
    public static string Folder => loaded.Value;

    static string LoadOnce()
    {
        var own = Path.GetDirectoryName(typeof(LibTorch).Assembly.Location) is { Length: > 0 } folder ? folder : AppContext.BaseDirectory;
        var libtorch = FindFolder(own);

        // libtorch.so needs its neighbours and finds them beside itself. TorchSharp then asks for both libraries
        // by bare name and gets those already loaded, so that it never searches by itself.
        OpenLibrary(Path.Combine(libtorch, "libtorch.so"));
        var bindings = OpenLibrary(Path.Combine(own, "libLibTorchSharp.so"));
        NativeLibrary.SetDllImportResolver(typeof(torch).Assembly, (name, _, _) => name == "LibTorchSharp" ? bindings : 0);
        return libtorch;
    }

    /// <summary>The folder named by the environment, else the one that the build recorded in libtorch.path.</summary>
    static string FindFolder(string own)
    {
        var named = Environment.GetEnvironmentVariable(FolderVariable);
        var record = Path.Combine(own, "libtorch.path");
        var folder = !string.IsNullOrEmpty(named) ? named
            : File.Exists(record) ? File.ReadAllText(record).Trim()
            : own;

        if (!File.Exists(Path.Combine(folder, "libtorch.so")))
        {
            throw DiagnosticException.Of(
                Codes.LibTorchMissing,
                named is null ? record : FolderVariable,
                $"there is no libtorch.so in {folder}",
                $"build again, which restores LibTorch, or set {FolderVariable} to the lib folder of a LibTorch or PyTorch 2.10 or newer");
        }

        return Path.GetFullPath(folder);
    }

    static nint OpenLibrary(string path)
    {
        try
        {
            return NativeLibrary.Load(path);
        }
        catch (Exception e) when (e is DllNotFoundException or BadImageFormatException)
        {
            throw DiagnosticException.Of(
                Codes.LibTorchBroken,
                path,
                e.Message,
                $"LibTorch 2.10 or newer for Linux x64 is needed; {FolderVariable} chooses another folder");
        }
    }
}

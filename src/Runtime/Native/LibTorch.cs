// Finds and loads LibTorch; call Load before anything of TorchSharp.
using System.Diagnostics;
using System.Runtime.InteropServices;
using TorchSharp;

namespace DeepSeekGraph.Runtime.Native;

/// <summary>The one copy of LibTorch that all programs share.</summary>
public static class LibTorch
{
    /// <summary>Environment variable that names another folder with libtorch.so (a CUDA build, python's torch/lib).</summary>
    public const string FolderVariable = "DSG_LIBTORCH";

    static readonly Lazy<string> loaded = new(LoadOnce);
    static bool cuda;

    /// <summary>Loads the native libraries; the first call does the work, on any thread.</summary>
    /// <exception cref="DiagnosticException">DSG0801 when LibTorch is not found, DSG0802 when it does not load.</exception>
    public static void Load() => _ = loaded.Value;

    /// <summary>Loads a LibTorch that has CUDA: the one the environment names, else the one of python's PyTorch. Call before Load.</summary>
    /// <exception cref="DiagnosticException">DSG0852 when there is none, or another LibTorch is loaded already.</exception>
    public static void LoadCuda()
    {
        if (!loaded.IsValueCreated)
            cuda = true;
        Load();
        if (!HasCuda(Folder))
        {
            throw DiagnosticException.Of(
                Codes.CudaMissing,
                "LibTorch",
                $"the LibTorch in {Folder} has no CUDA (no {CudaLibrary})",
                $"install PyTorch 2.10 or newer with CUDA for python3, or set {FolderVariable} to the lib folder of one (.../site-packages/torch/lib)");
        }
    }

    /// <summary>The folder that LibTorch was loaded from.</summary>
    public static string Folder => loaded.Value;

    /// <summary>True where a LibTorch folder can use CUDA.</summary>
    public static bool HasCuda(string folder) => File.Exists(Path.Combine(folder, CudaLibrary));

    /// <summary>Folders in which libraries that come with a CUDA build of LibTorch lie, and CUDA's own.</summary>
    public static IEnumerable<string> Neighbours() => Neighbours(Folder);

    /// <summary>The same of a LibTorch that is not loaded.</summary>
    public static IEnumerable<string> Neighbours(string libtorch)
    {
        yield return libtorch;
        var packages = Path.GetFullPath(Path.Combine(libtorch, "..", "..", "nvidia"));
        if (Directory.Exists(packages))
        {
            foreach (var package in Directory.EnumerateDirectories(packages).Order(StringComparer.Ordinal))
                yield return Path.Combine(package, "lib");
        }

        yield return "/usr/local/cuda/lib64";
    }

    /// <summary>The lib folder of the PyTorch that python3 would import, without importing it; null where there is none.</summary>
    public static string? PythonFolder()
    {
        try
        {
            using var python = Process.Start(new ProcessStartInfo("python3")
            {
                ArgumentList = { "-c", "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])" },
                RedirectStandardOutput = true,
                RedirectStandardError = true,
            });
            var folder = python?.StandardOutput.ReadLine();
            python?.WaitForExit();
            return python?.ExitCode == 0 && !string.IsNullOrEmpty(folder) ? Path.Combine(folder, "lib") : null;
        }
        catch (System.ComponentModel.Win32Exception)
        {
            return null;
        }
    }

    const string CudaLibrary = "libtorch_cuda.so";

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

    /// <summary>The folder named by the environment, else the one that the build recorded in libtorch.path, else python's.</summary>
    static string FindFolder(string own)
    {
        var named = Environment.GetEnvironmentVariable(FolderVariable);
        var record = Path.Combine(own, "libtorch.path");
        var folder = !string.IsNullOrEmpty(named) ? named
            : cuda && PythonFolder() is { } python && HasCuda(python) ? python
            : File.Exists(record) && File.ReadAllText(record).Trim() is var recorded && File.Exists(Path.Combine(recorded, "libtorch.so")) ? recorded
            : File.Exists(Path.Combine(own, "libtorch.so")) ? own
            : PythonFolder() ?? (File.Exists(record) ? File.ReadAllText(record).Trim() : own);

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

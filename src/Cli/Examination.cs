// Looks for what dsg uses: libraries by loading them, programs on the PATH, and the machine's own figures.

using System.Globalization;
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Native;

namespace DeepSeekGraph.Cli;

internal static class Examination
{
    private const double LeastMemory = 1e9, LeastDisk = 1e8;
    private static readonly string[] s_features = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"];

    public static IEnumerable<Finding> Of(string runs)
    {
        yield return Cpu();
        yield return Memory();
        yield return Disk(runs);
        var (torch, folder) = Torch();
        yield return torch;

        // what --device cuda would take: the LibTorch that is loaded, else the one of python3
        var cuda = new[] { folder, LibTorch.PythonFolder() }.FirstOrDefault(f => f is not null && LibTorch.HasCuda(f));
        yield return new Finding("LibTorch CUDA", cuda, "--device cuda", Mend: cuda is not null
            ? null
            : $"install PyTorch 2.10 or newer with CUDA for python3, or set {LibTorch.FolderVariable} to the lib folder of one");
        folder = cuda ?? folder;
        yield return Driver();
        yield return Library("NCCL", folder, "libnccl.so.2", "several GPUs", "comes with PyTorch's CUDA packages, or: apt install libnccl2");
        yield return Library("NVRTC", folder, "libnvrtc.so.13", "own GPU kernels", "comes with PyTorch's CUDA packages", "libnvrtc.so.12");
        yield return Library("MPI", null, "libmpi.so.40", "mpirun -n N dsg pretrain", "apt install openmpi-bin libopenmpi3");
        yield return Program("mpirun", "mpirun -n N dsg pretrain", "apt install openmpi-bin libopenmpi3");
        yield return Program("srun", "jobs under Slurm", null);
    }

    private static Finding Cpu()
    {
        var flags = Lines("/proc/cpuinfo").FirstOrDefault(line => line.StartsWith("flags", StringComparison.Ordinal))?.Split(' ') ?? [];
        var found = s_features.Where(flags.Contains).ToArray();
        return new Finding("cores", $"{ThisMachine.Cores}, {(found.Length > 0 ? string.Join(" ", found) : "no AVX2")}", "everything", true);
    }

    private static Finding Memory()
    {
        var bytes = (double)GC.GetGCMemoryInfo().TotalAvailableMemoryBytes;
        return bytes >= LeastMemory
            ? new Finding("memory", Size(bytes), "everything", true)
            : new Finding("memory", null, "everything", true, $"{Size(bytes)} are too few: 1 GB is the least");
    }

    /// Of the folder, or its nearest one that exists.
    private static Finding Disk(string runs)
    {
        var folder = Path.GetFullPath(runs);
        while (!Directory.Exists(folder) && Path.GetDirectoryName(folder) is { } parent)
            folder = parent;
        try
        {
            var free = new DriveInfo(folder).AvailableFreeSpace;
            return free >= LeastDisk
                ? new Finding("disk of " + runs, $"{Size(free)} free", "runs and checkpoints", true)
                : new Finding("disk of " + runs, null, "runs and checkpoints", true, "free some space, or give another --out");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            return new Finding("disk of " + runs, null, "runs and checkpoints", true, e.Message);
        }
    }

    private static (Finding Finding, string? Folder) Torch()
    {
        try
        {
            LibTorch.Load();
            return (new Finding("LibTorch", LibTorch.Folder, "everything", true), LibTorch.Folder);
        }
        catch (DiagnosticException e)
        {
            var why = e.Diagnostics[0];
            return (new Finding("LibTorch", null, "everything", true, $"{why.Message}; {why.Help}"), null);
        }
    }

    private static Finding Driver()
    {
        var version = Lines("/proc/driver/nvidia/version").FirstOrDefault();
        var gpus = Directory.Exists("/proc/driver/nvidia/gpus") ? Directory.GetDirectories("/proc/driver/nvidia/gpus").Length : 0;
        var there = Loads("libcuda.so.1");
        return new Finding(
            "GPU driver",
            there ? $"libcuda.so.1{(gpus > 0 ? $", {gpus} GPUs" : "")}{(version is null ? "" : ", " + Version(version))}" : null,
            "GPUs",
            Mend: there ? null : "install NVIDIA's driver, where there is a GPU");

        static string Version(string line)
            => line.Split(' ', StringSplitOptions.RemoveEmptyEntries)
                .FirstOrDefault(word => word.Contains('.', StringComparison.Ordinal) && char.IsAsciiDigit(word[0])) ?? "";
    }

    /// By its name alone, as it is loaded, or beside LibTorch.
    private static Finding Library(string what, string? folder, string name, string use, string mend, params string[] others)
    {
        var found = ((string[])[name, .. others]).FirstOrDefault(file =>
            Loads(file) || (folder is not null && LibTorch.Neighbours(folder).Any(near => File.Exists(Path.Combine(near, file)))));
        return new Finding(what, found, use, Mend: found is null ? mend : null);
    }

    private static Finding Program(string name, string use, string? mend)
    {
        var path = Environment.GetEnvironmentVariable("PATH") ?? "";
        var found = path.Split(':').Select(folder => Path.Combine(folder, name)).FirstOrDefault(File.Exists);
        return new Finding(name, found, use, Mend: found is null ? mend : null);
    }

    private static bool Loads(string library)
    {
        if (!NativeLibrary.TryLoad(library, out var handle))
            return false;
        NativeLibrary.Free(handle);
        return true;
    }

    private static string[] Lines(string path)
    {
        try
        {
            return File.ReadAllLines(path);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            return [];
        }
    }

    private static string Size(double bytes) => string.Create(CultureInfo.InvariantCulture, $"{bytes / 1e9:N1} GB");
}

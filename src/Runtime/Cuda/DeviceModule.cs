// Our own CUDA C++, embedded as source, compiled once for an architecture and kept in the user's cache.
using System.Collections.Concurrent;
using System.Security.Cryptography;
using System.Text;
using DeepSeekGraph.Runtime.Execution.Generated;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>The kernels of one source file on one device. Sources share Common.cuh, which is put before each.</summary>
internal sealed class DeviceModule
{
    private static readonly ConcurrentDictionary<(int Device, string Source), DeviceModule> Loaded = new();
    private static readonly Lock Loading = new();

    private readonly nint _module;
    private readonly ConcurrentDictionary<string, nint> _kernels = new();

    private DeviceModule(int device, string source) => _module = Driver.LoadModule(Code(device, source));

    /// <summary>A kernel by source and name; the thread must have entered the device.</summary>
    public static nint Kernel(int device, string source, string name)
    {
        if (!Loaded.TryGetValue((device, source), out var module))
        {
            lock (Loading)
                module = Loaded.GetOrAdd((device, source), static key => new DeviceModule(key.Device, key.Source));
        }

        return module._kernels.GetOrAdd(name, static (n, m) => Driver.Function(m._module, n), module);
    }

    /// <summary>Names of the sources.</summary>
    public static IReadOnlyList<string> Sources
        => [.. typeof(DeviceModule).Assembly.GetManifestResourceNames()
            .Where(n => n.StartsWith("cuda/", StringComparison.Ordinal) && n.EndsWith(".cu", StringComparison.Ordinal))
            .Select(n => n["cuda/".Length..^".cu".Length]).Order(StringComparer.Ordinal)];

    /// <summary>The text of a source, common part first.</summary>
    public static string Text(string source) => Resource("cuda/Common.cuh") + Resource($"cuda/{source}.cu");

    /// <summary>sm_90a on Hopper, sm_XY elsewhere.</summary>
    public static string Architecture(int device)
    {
        var major = Driver.Attribute(device, Driver.DeviceAttribute.ComputeCapabilityMajor);
        var minor = Driver.Attribute(device, Driver.DeviceAttribute.ComputeCapabilityMinor);
        return $"sm_{major}{minor}{(major == 9 ? "a" : "")}";
    }

    /// <summary>From the cache, or compiled and put there; a cache that cannot be used costs time only.</summary>
    private static byte[] Code(int device, string source)
    {
        var architecture = Architecture(device);
        var text = Text(source);
        var key = Convert.ToHexStringLower(SHA256.HashData(Encoding.UTF8.GetBytes($"{Nvrtc.Version} {architecture} no-fmad {text}")));
        var cache = new CodeCache(CodeCache.DefaultFolder);
        if (cache.Read(key) is { } kept)
            return kept;
        var code = Nvrtc.Compile(source + ".cu", text, architecture);
        cache.Write(key, code);
        return code;
    }

    private static string Resource(string name)
    {
        using var stream = typeof(DeviceModule).Assembly.GetManifestResourceStream(name)
            ?? throw new InvalidOperationException($"the source {name} is not embedded; this is a bug in dsg");
        using var reader = new StreamReader(stream);
        return reader.ReadToEnd();
    }
}

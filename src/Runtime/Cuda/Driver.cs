// The CUDA driver: devices, contexts, modules and launches, by P/Invoke on libcuda.so.1.
using System.Runtime.InteropServices;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Calls of the driver API (CUDA Driver API reference manual); every result is checked.</summary>
internal static unsafe partial class Driver
{
    private const string Library = "libcuda.so.1";

    /// <summary>CU_DEVICE_ATTRIBUTE_* that are asked for.</summary>
    internal enum DeviceAttribute
    {
        MultiprocessorCount = 16,
        ComputeCapabilityMajor = 75,
        ComputeCapabilityMinor = 76,
    }

    /// <summary>True where the driver is installed and there is a device.</summary>
    public static bool IsPresent => Count > 0;

    /// <summary>Devices; 0 where there is no driver.</summary>
    public static int Count => Devices.Value;

    private static readonly Lazy<int> Devices = new(CountOnce);

    /// <summary>Makes the primary context of a device (the one LibTorch uses) current on the calling thread.</summary>
    public static void Enter(int device)
    {
        Check(cuDeviceGet(out var handle, device), "cuDeviceGet");
        Check(cuDevicePrimaryCtxRetain(out var context, handle), "cuDevicePrimaryCtxRetain");
        Check(cuCtxSetCurrent(context), "cuCtxSetCurrent");
    }

    /// <summary>A property of a device.</summary>
    public static int Attribute(int device, DeviceAttribute attribute)
    {
        Check(cuDeviceGet(out var handle, device), "cuDeviceGet");
        Check(cuDeviceGetAttribute(out var value, attribute, handle), "cuDeviceGetAttribute");
        return value;
    }

    /// <summary>As the vendor names it.</summary>
    public static string Name(int device)
    {
        Check(cuDeviceGet(out var handle, device), "cuDeviceGet");
        var text = stackalloc byte[256];
        Check(cuDeviceGetName(text, 256, handle), "cuDeviceGetName");
        return Marshal.PtrToStringUTF8((nint)text) ?? "";
    }

    /// <summary>Bytes of a device's memory.</summary>
    public static long TotalMemory(int device)
    {
        Check(cuDeviceGet(out var handle, device), "cuDeviceGet");
        Check(cuDeviceTotalMem(out var bytes, handle), "cuDeviceTotalMem");
        return (long)bytes;
    }

    /// <summary>Bytes free and in all, of the calling thread's device.</summary>
    public static (long Free, long Total) Memory()
    {
        Check(cuMemGetInfo(out var free, out var total), "cuMemGetInfo");
        return ((long)free, (long)total);
    }

    /// <summary>Loads compiled code into the calling thread's context.</summary>
    public static nint LoadModule(ReadOnlySpan<byte> image)
    {
        fixed (byte* p = image)
        {
            Check(cuModuleLoadData(out var module, p), "cuModuleLoadData");
            return module;
        }
    }

    /// <summary>A kernel of a module.</summary>
    public static nint Function(nint module, string name)
    {
        Check(cuModuleGetFunction(out var function, module, name), $"cuModuleGetFunction({name})");
        return function;
    }

    /// <summary>Waits for all work of the calling thread's context.</summary>
    public static void Synchronize() => Check(cuCtxSynchronize(), "cuCtxSynchronize");

    /// <summary>Launches on a stream, 0 being the default one, on which LibTorch works too; each argument fills 8 bytes or the first of them.</summary>
    public static void Launch(nint function, uint gridX, uint gridY, uint block, uint shared, nint stream, ReadOnlySpan<ulong> arguments)
    {
        fixed (ulong* values = arguments)
        {
            var pointers = stackalloc void*[arguments.Length];
            for (var i = 0; i < arguments.Length; i++)
                pointers[i] = values + i;
            Check(cuLaunchKernel(function, gridX, gridY, 1, block, 1, 1, shared, stream, pointers, null), "cuLaunchKernel");
        }
    }

    /// <summary>Lets a kernel use more than 48 KiB of shared memory a block.</summary>
    public static void AllowShared(nint function, int bytes)
        => Check(cuFuncSetAttribute(function, 8, bytes), "cuFuncSetAttribute");

    private static int CountOnce()
    {
        try
        {
            return cuInit(0) == 0 && cuDeviceGetCount(out var count) == 0 ? count : 0;
        }
        catch (DllNotFoundException)
        {
            return 0;
        }
    }

    private static void Check(int result, string call)
    {
        if (result == 0)
            return;
        var text = cuGetErrorString(result, out var message) == 0 ? Marshal.PtrToStringUTF8(message) : $"error {result}";
        throw new InvalidOperationException($"{call}: {text}");
    }

    [LibraryImport(Library)]
    private static partial int cuInit(uint flags);

    [LibraryImport(Library)]
    private static partial int cuDeviceGetCount(out int count);

    [LibraryImport(Library)]
    private static partial int cuDeviceGet(out int device, int ordinal);

    [LibraryImport(Library)]
    private static partial int cuDeviceGetName(byte* name, int length, int device);

    [LibraryImport(Library)]
    private static partial int cuDeviceGetAttribute(out int value, DeviceAttribute attribute, int device);

    [LibraryImport(Library, EntryPoint = "cuDeviceTotalMem_v2")]
    private static partial int cuDeviceTotalMem(out nuint bytes, int device);

    [LibraryImport(Library)]
    private static partial int cuDevicePrimaryCtxRetain(out nint context, int device);

    [LibraryImport(Library)]
    private static partial int cuCtxSetCurrent(nint context);

    [LibraryImport(Library)]
    private static partial int cuCtxSynchronize();

    [LibraryImport(Library, EntryPoint = "cuMemGetInfo_v2")]
    private static partial int cuMemGetInfo(out nuint free, out nuint total);

    [LibraryImport(Library)]
    private static partial int cuModuleLoadData(out nint module, byte* image);

    [LibraryImport(Library, StringMarshalling = StringMarshalling.Utf8)]
    private static partial int cuModuleGetFunction(out nint function, nint module, string name);

    [LibraryImport(Library)]
    private static partial int cuFuncSetAttribute(nint function, int attribute, int value);

    [LibraryImport(Library)]
    private static partial int cuLaunchKernel(
        nint function, uint gridX, uint gridY, uint gridZ, uint blockX, uint blockY, uint blockZ, uint shared, nint stream,
        void** arguments, void** extra);

    [LibraryImport(Library)]
    private static partial int cuGetErrorString(int error, out nint text);
}

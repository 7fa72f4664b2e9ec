// CUDA C++ to machine code at run time, by P/Invoke on NVRTC.
using System.Runtime.InteropServices;
using System.Text;
using DeepSeekGraph.Runtime.Native;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>Calls of NVRTC (NVRTC user guide); the library is found beside LibTorch, or in CUDA's folder.</summary>
internal static unsafe class Nvrtc
{
    private static readonly Lazy<nint> Library = new(Find);

    /// <summary>DSG0852 unless the library is there.</summary>
    public static void Require() => _ = Library.Value;

    /// <summary>major * 100 + minor.</summary>
    public static int Version
    {
        get
        {
            int major, minor;
            var call = (delegate* unmanaged[Cdecl]<int*, int*, int>)Export("nvrtcVersion");
            Check(call(&major, &minor), "nvrtcVersion");
            return (major * 100) + minor;
        }
    }

    /// <summary>The code of a source for an architecture such as "sm_90a"; DSG0853 with the compiler's log when it does not compile.</summary>
    public static byte[] Compile(string name, string source, string architecture)
    {
        nint program;
        var create = (delegate* unmanaged[Cdecl]<nint*, byte*, byte*, int, byte**, byte**, int>)Export("nvrtcCreateProgram");
        var compile = (delegate* unmanaged[Cdecl]<nint, int, byte**, int>)Export("nvrtcCompileProgram");
        var destroy = (delegate* unmanaged[Cdecl]<nint*, int>)Export("nvrtcDestroyProgram");
        fixed (byte* text = Text(source), title = Text(name), arch = Text("-arch=" + architecture), standard = Text("-std=c++17"), apart = Text("-fmad=false"))
        {
            Check(create(&program, text, title, 0, null, null), "nvrtcCreateProgram");
            try
            {
                // products and sums are rounded one by one: a fused kernel gives the bits of those it replaces
                byte** options = stackalloc byte*[3] { arch, standard, apart };
                if (compile(program, 3, options) != 0)
                {
                    throw DiagnosticException.Of(
                        Codes.CudaSource,
                        name,
                        $"NVRTC {Version / 100}.{Version % 100} does not compile it for {architecture}: {Read(program, "nvrtcGetProgramLog").TrimEnd('\0', '\n')}",
                        "this is a bug in dsg, or an NVRTC older than 12.0");
                }

                return ReadBytes(program, "nvrtcGetCUBIN");
            }
            finally
            {
                _ = destroy(&program);
            }
        }
    }

    private static string Read(nint program, string call) => Encoding.UTF8.GetString(ReadBytes(program, call));

    private static byte[] ReadBytes(nint program, string call)
    {
        nuint size;
        var sizeOf = (delegate* unmanaged[Cdecl]<nint, nuint*, int>)Export(call + "Size");
        var read = (delegate* unmanaged[Cdecl]<nint, byte*, int>)Export(call);
        Check(sizeOf(program, &size), call + "Size");
        var bytes = new byte[(int)size];
        fixed (byte* p = bytes)
            Check(read(program, p), call);
        return bytes;
    }

    private static nint Export(string name) => NativeLibrary.GetExport(Library.Value, name);

    private static byte[] Text(string text) => Encoding.UTF8.GetBytes(text + '\0');

    private static void Check(int result, string call)
    {
        if (result != 0)
            throw new InvalidOperationException($"{call}: error {result}");
    }

    private static nint Find()
    {
        string[] names = ["libnvrtc.so.13", "libnvrtc.so.12"];
        return NativeSearch.Find(names, LibTorch.Neighbours()) ?? throw DiagnosticException.Of(
            Codes.CudaMissing,
            "libnvrtc",
            $"none of {string.Join(", ", names)} was found on the loader's path nor beside LibTorch in {LibTorch.Folder}",
            $"install CUDA's NVRTC 12 or 13 (it comes with a CUDA build of PyTorch), or point {LibTorch.FolderVariable} at such a PyTorch's torch/lib");
    }
}

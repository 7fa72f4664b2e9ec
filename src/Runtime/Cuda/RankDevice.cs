// Where a rank computes: on the processor, or on a GPU.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Native;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>A device and the kernels that plans run on it.</summary>
public sealed class RankDevice
{
    private RankDevice(int index, IReadOnlyDictionary<KernelId, KernelEntry> kernels)
    {
        Index = index;
        Kernels = kernels;
        Torch = index < 0 ? null : new Device(TorchSharp.DeviceType.CUDA, index);
    }

    /// <summary>The processor.</summary>
    public static RankDevice Cpu { get; } = new(-1, KernelTable.Cpu);

    /// <summary>Number of the GPU; -1 for the processor.</summary>
    public int Index { get; }

    public bool IsCuda => Index >= 0;

    /// <summary>True once a GPU was chosen in this process.</summary>
    public static bool UsesCuda { get; private set; }

    /// <summary>For tensors; null for the processor's.</summary>
    public Device? Torch { get; }

    /// <summary>KernelId -> kernel.</summary>
    public IReadOnlyDictionary<KernelId, KernelEntry> Kernels { get; }

    /// <summary>GPU number `index` of this machine; DSG0852 where it, LibTorch's CUDA or NVRTC is missing.</summary>
    public static RankDevice Cuda(int index)
    {
        // a stream for each kind of collective: with too few queues one would wait for another that waits for a peer
        NativeVariables.Default("CUDA_DEVICE_MAX_CONNECTIONS", "16");
        if (Driver.Count <= index)
        {
            throw DiagnosticException.Of(
                Codes.CudaMissing,
                "--device cuda",
                Driver.Count == 0 ? "there is no GPU that the driver (libcuda.so.1) shows" : $"GPU {index} is asked for, and there are {Driver.Count}",
                "run where there is an NVIDIA GPU, or leave --device out");
        }

        LibTorch.LoadCuda();
        Nvrtc.Require();
        InitializeDeviceType(TorchSharp.DeviceType.CUDA);
        UsesCuda = true;
        return new RankDevice(index, CudaKernels.Table);
    }

    /// <summary>As the vendor names it.</summary>
    public string Name => IsCuda ? Driver.Name(Index) : "cpu";

    /// <summary>Version of NCCL, by which processes with a GPU each exchange values; DSG0855 where it is missing or too old.</summary>
    public static string NcclVersion => NcclLibrary.Version;

    /// <summary>Bytes of the GPU's memory; 0 for the processor.</summary>
    public long TotalMemory => IsCuda ? Driver.TotalMemory(Index) : 0;

    /// <summary>Bytes of the GPU's memory that are free, and all, as the driver counts them; the thread must have entered a device.</summary>
    public (long Free, long Total) Memory()
    {
        Driver.Enter(Index);
        return Driver.Memory();
    }

    /// <summary>Makes the device the calling thread's own: for LibTorch and for our kernels.</summary>
    public void Enter()
    {
        if (!IsCuda)
            return;
        Driver.Enter(Index);
        Gpu.Current = Index;
        using var first = zeros(1, device: Torch);
    }

    /// <summary>Waits for the stream that computes; parameters may still arrive on others. Faults of kernels show here.</summary>
    public void FinishCompute()
    {
        if (IsCuda)
            Driver.SynchronizeStream(0);
    }

    /// <summary>Waits for everything launched; faults of kernels show here at the latest.</summary>
    public void Finish()
    {
        if (IsCuda)
            Driver.Synchronize();
    }
}

// Raw access to the memory of tensors, and the element types of both sides.
using System.Diagnostics;
using System.Runtime.InteropServices;
using TorchSharp;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Memory;

/// <summary>Pointers, shapes and element types of tensors.</summary>
public static unsafe partial class TensorMemory
{
    /// <summary>The first element; the tensor must be contiguous, and live as long as the pointer; on a GPU only kernels may follow it.</summary>
    public static void* Pointer(this Tensor tensor) => (void*)THSTensor_data(tensor.Handle);

    /// <summary>LibTorch's name of an element type.</summary>
    public static ScalarType ToScalarType(this DType dtype)
        => dtype.Tag switch
        {
            DType.Tags.Float32 => ScalarType.Float32,
            DType.Tags.BFloat16 => ScalarType.BFloat16,
            DType.Tags.Int64 => ScalarType.Int64,
            DType.Tags.Int32 => ScalarType.Int32,
            DType.Tags.Bool => ScalarType.Bool,
            DType.Tags.Int16 => ScalarType.Int16,
            _ => throw new UnreachableException($"no element type for {dtype}"),
        };

    /// <summary>Bytes of one element.</summary>
    public static int Width(ScalarType type)
        => type switch
        {
            ScalarType.Float32 or ScalarType.Int32 => 4,
            ScalarType.BFloat16 or ScalarType.Int16 => 2,
            ScalarType.Int64 or ScalarType.Float64 => 8,
            ScalarType.Bool or ScalarType.Byte => 1,
            _ => throw new UnreachableException($"no width for {type}"),
        };

    /// <summary>Bytes of a dense tensor.</summary>
    public static long ByteCount(this Tensor tensor) => tensor.numel() * Width(tensor.dtype);

    /// <summary>Ends an in-place call: TorchSharp returns the target itself, or a second handle that must be disposed.</summary>
    public static void On(this Tensor result, Tensor target)
    {
        if (!ReferenceEquals(result, target))
            result.Dispose();
    }

    /// <summary>A contiguous tensor: the value itself, or a copy that the caller disposes.</summary>
    public static Tensor Contiguous(Tensor tensor) => tensor.is_contiguous() ? tensor : tensor.contiguous();

    /// <summary>The tensor under another handle, or a copy of it in the processor's memory; the caller disposes it.</summary>
    public static Tensor OnHost(this Tensor tensor) => tensor.device_type == DeviceType.CPU ? tensor.alias() : tensor.cpu();

    /// <summary>Fills a tensor, by way of the processor's memory if it lies elsewhere; all elements must be written.</summary>
    public static void FillOnHost(this Tensor target, System.Action<Tensor> fill)
    {
        if (target.device_type == DeviceType.CPU)
        {
            fill(target);
            return;
        }

        using var stage = empty(target.shape, dtype: target.dtype);
        fill(stage);
        target.copy_(stage).On(target);
    }

    /// <summary>Sets grad mode off and one thread of LibTorch for the calling thread; both are thread-local.</summary>
    public static void PrepareThread(int threads = 1)
    {
        set_grad_enabled(false);
        set_num_threads(threads);
    }

    [LibraryImport("LibTorchSharp")]
    private static partial nint THSTensor_data(nint tensor);
}

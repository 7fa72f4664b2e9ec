// Elements of checkpoints in memory: copied where types agree, else rounded once.

using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// Types by their names of safetensors. fp32 and bf16 turn into each other, fp16 and fp64 into both; integers stay what they are.
internal static unsafe class Elements
{
    public static string NameOf(DType type) => type.Tag switch
    {
        DType.Tags.Float32 => "F32",
        DType.Tags.BFloat16 => "BF16",
        DType.Tags.Int64 => "I64",
        DType.Tags.Int32 => "I32",
        DType.Tags.Int16 => "I16",
        _ => "BOOL",
    };

    /// May a checkpoint's tensor have it?
    public static bool IsKnown(string type) => type is "F32" or "BF16" or "F16" or "I64" or "I32" or "I16" or "BOOL";

    public static bool IsFloat(string type) => type is "F32" or "BF16" or "F16";

    /// Can elements of one type be stored as another?
    public static bool Converts(string from, string to) => from == to || (IsFloat(from) && to is "F32" or "BF16");

    /// Copies `n` elements from place `fromAt` to place `toAt`.
    public static void Copy(string from, void* source, long fromAt, string to, void* target, long toAt, long n)
    {
        switch (from, to)
        {
            case ("F32", "BF16"):
                Simd.Copy<F32, BF16>(source, fromAt, target, toAt, n);
                break;
            case ("BF16", "F32"):
                Simd.Copy<BF16, F32>(source, fromAt, target, toAt, n);
                break;
            case ("F16", "F32"):
                for (long i = 0; i < n; i++)
                    ((float*)target)[toAt + i] = (float)((Half*)source)[fromAt + i];
                break;
            case ("F16", "BF16"):
                for (long i = 0; i < n; i++)
                    ((ushort*)target)[toAt + i] = BF16.Round((float)((Half*)source)[fromAt + i]);
                break;
            case ("F64", "F32"):
                for (long i = 0; i < n; i++)
                    ((float*)target)[toAt + i] = (float)((double*)source)[fromAt + i];
                break;
            case ("F64", "BF16"):
                for (long i = 0; i < n; i++)
                    ((ushort*)target)[toAt + i] = BF16.Round((float)((double*)source)[fromAt + i]);
                break;
            default:
                if (from != to)
                    throw new ArgumentException($"elements of {from} are not stored as {to}", nameof(to));
                var width = SafeTensorTypes.BytesOf(from);
                Buffer.MemoryCopy((byte*)source + (fromAt * width), (byte*)target + (toAt * width), n * width, n * width);
                break;
        }
    }
}

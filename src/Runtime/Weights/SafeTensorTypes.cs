// The element types of safetensors files: their widths, and what LibTorch calls them.

using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Weights;

/// The format's element types that fill whole bytes.
public static class SafeTensorTypes
{
    /// float8_e4m3fn of LibTorch; TorchSharp has no name for it, but passes the number on.
    public const ScalarType Float8E4M3 = (ScalarType)24;

    /// float8_e5m2 of LibTorch.
    public const ScalarType Float8E5M2 = (ScalarType)23;

    /// Every name, widest first.
    public static IReadOnlyList<string> All { get; } =
    [
        "F64", "I64", "U64", "F32", "I32", "U32", "BF16", "F16", "I16", "U16",
        "F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL",
    ];

    /// Bytes of one element; 0 for a type that is not known.
    public static int BytesOf(string dtype) => dtype switch
    {
        "BOOL" or "U8" or "I8" or "F8_E4M3" or "F8_E5M2" or "F8_E8M0" => 1,
        "F16" or "BF16" or "I16" or "U16" => 2,
        "F32" or "I32" or "U32" => 4,
        "F64" or "I64" or "U64" => 8,
        _ => 0,
    };

    /// LibTorch's element type; the unsigned and 8-bit float ones only move, cast and compare there.
    public static ScalarType ScalarTypeOf(string dtype) => dtype switch
    {
        "BOOL" => ScalarType.Bool,
        "U8" => ScalarType.Byte,
        "I8" => ScalarType.Int8,
        "I16" => ScalarType.Int16,
        "I32" => ScalarType.Int32,
        "I64" => ScalarType.Int64,
        "F16" => ScalarType.Float16,
        "BF16" => ScalarType.BFloat16,
        "F32" => ScalarType.Float32,
        "F64" => ScalarType.Float64,
        "F8_E4M3" => Float8E4M3,
        "F8_E5M2" => Float8E5M2,
        "F8_E8M0" => (ScalarType)44,
        "U16" => (ScalarType)27,
        "U32" => (ScalarType)28,
        "U64" => (ScalarType)29,
        _ => throw new ArgumentException($"'{dtype}' is no element type of safetensors", nameof(dtype)),
    };
}

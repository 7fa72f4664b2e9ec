// fp8 weights as DeepSeek-V3 publishes them: E4M3 elements and an fp32 scale for each block of 128 x 128.

using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Weights;

/// Elements of F8_E4M3 [rows, columns], and fp32 scales of their blocks.
public sealed record Fp8Weight(Tensor Weight, Tensor Scales) : IDisposable
{
    public void Dispose()
    {
        Weight.Dispose();
        Scales.Dispose();
    }
}

/// weight[r, c] = e4m3[r, c] * weight_scale_inv[r / 128, c / 128] (arXiv 2412.19437, section 3.3.2; the published
/// checkpoint's README_WEIGHTS.md). Blocks at the lower and right edge are smaller. DSG0826 where the parts do not fit.
public static unsafe class Fp8Blocks
{
    /// Rows and columns of a block.
    public const int Extent = 128;

    /// What the name of a weight's scales has behind the weight's.
    public const string ScaleSuffix = "_scale_inv";

    /// The value of an E4M3 byte; 0x7F and 0xFF are NaN.
    public static float Decode(byte code)
    {
        var magnitude = (code & 0x7F) == 0x7F
            ? float.NaN
            : BitConverter.UInt32BitsToSingle((uint)(code & 0x7F) << 20) * Rebias;
        return (code & 0x80) != 0 ? -magnitude : magnitude;
    }

    /// The nearest E4M3 byte, ties to even; beyond 448, 448; NaN is 0x7F.
    public static byte Encode(float value)
    {
        if (float.IsNaN(value))
            return 0x7F;

        // E4M3's exponent has bias 7, fp32's 127; below 2^-6 E4M3 counts in steps of 2^-9
        var magnitude = E4M3.Round(Math.Abs(value));
        var code = magnitude < 0.015625f
            ? (uint)(magnitude * 512)
            : (BitConverter.SingleToUInt32Bits(magnitude) >> 20) - (120 << 3);
        return (byte)(code | (float.IsNegative(value) ? 0x80u : 0));
    }

    /// Extents of the scales of a weight.
    public static (long Rows, long Columns) Grid(long rows, long columns)
        => ((rows + Extent - 1) / Extent, (columns + Extent - 1) / Extent);

    /// A whole weight as fp32 or bf16: weight [rows, columns] of E4M3, scales of fp32.
    public static Tensor Dequantize(Tensor weight, Tensor scales, ScalarType type, string name = "")
    {
        Check(weight, scales, name);
        var target = empty(weight.shape, dtype: type);
        DequantizeInto(weight, scales, 0, 0, target, name);
        return target;
    }

    /// The part of a weight that begins at (firstRow, firstColumn) and has target's extents, into target: contiguous
    /// fp32 or bf16 [r, c], such as one expert of a bank. Shards need not begin at a block. Products are rounded once.
    public static void DequantizeInto(
        Tensor weight, Tensor scales, long firstRow, long firstColumn, Tensor target, string name = "")
    {
        Check(weight, scales, name);
        var (rows, columns) = (weight.shape[0], weight.shape[1]);
        if (target.shape is not [var height, var width] || !target.is_contiguous())
            throw new ArgumentException("the target is no contiguous matrix", nameof(target));
        if (firstRow < 0 || firstColumn < 0 || height > rows - firstRow || width > columns - firstColumn)
        {
            throw new ArgumentException(
                $"[{height}, {width}] from ({firstRow}, {firstColumn}) on is no part of [{rows}, {columns}]", nameof(target));
        }

        var from = (byte*)weight.Pointer() + (firstRow * columns) + firstColumn;
        var scale = (float*)scales.Pointer();
        var to = target.Pointer();
        var grid = scales.shape[1];
        var narrow = Simd.IsBFloat16(target.dtype);
        for (long r = 0; r < height; r++)
        {
            var line = scale + ((firstRow + r) / Extent * grid);
            for (long c = 0; c < width;)
            {
                var block = (firstColumn + c) / Extent;
                var end = Math.Min(width, ((block + 1) * Extent) - firstColumn);
                var source = from + (r * columns) + c;
                var (at, count) = ((r * width) + c, (int)(end - c));
                if (narrow)
                    Scale<BF16>(source, line[block], to, at, count);
                else
                    Scale<F32>(source, line[block], to, at, count);
                c = end;
            }
        }
    }

    /// Elements [first, first + n) of a matrix in row-major order, to fp32 or (`narrow`) bf16, rounded once; runs may begin and end
    /// anywhere, in blocks or between them.
    internal static void DequantizeRun(byte* weight, float* scales, long columns, long first, long n, void* to, bool narrow)
    {
        var grid = (columns + Extent - 1) / Extent;
        for (long done = 0; done < n;)
        {
            var (row, column) = Math.DivRem(first + done, columns);
            var end = Math.Min(Math.Min(columns, ((column / Extent) + 1) * Extent), column + n - done);
            var scale = scales[(row / Extent * grid) + (column / Extent)];
            var count = (int)(end - column);
            if (narrow)
                Scale<BF16>(weight + first + done, scale, to, done, count);
            else
                Scale<F32>(weight + first + done, scale, to, done, count);
            done += count;
        }
    }

    /// A matrix of fp32 or bf16 as E4M3 and scales: scale = max|block| / 448, elements rounded to nearest even. A block
    /// of zeros has scale 1. DSG0826 for a value that is not finite: E4M3 has no infinity.
    public static Fp8Weight Quantize(Tensor source, string name = "")
    {
        if (source.shape is not [var rows, var columns])
            throw Wrong(name, $"the weight has the shape [{string.Join(", ", source.shape)}]", "only matrices have fp8 blocks");
        var whole = TensorMemory.Contiguous(source);
        try
        {
            var (gridRows, gridColumns) = Grid(rows, columns);
            var weight = empty([rows, columns], dtype: SafeTensorTypes.Float8E4M3);
            var scales = empty([gridRows, gridColumns], dtype: ScalarType.Float32);
            if (Simd.IsBFloat16(whole.dtype))
                Quantize<BF16>(whole.Pointer(), rows, columns, (byte*)weight.Pointer(), (float*)scales.Pointer(), name);
            else
                Quantize<F32>(whole.Pointer(), rows, columns, (byte*)weight.Pointer(), (float*)scales.Pointer(), name);
            return new Fp8Weight(weight, scales);
        }
        finally
        {
            if (!ReferenceEquals(whole, source))
                whole.Dispose();
        }
    }

    /// An exponent with bias 127 read as one with bias 7.
    private const float Rebias = (float)(1UL << 60) * (1UL << 60);

    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static void Scale<T>(byte* from, float scale, void* to, long at, int count)
        where T : struct, IElement
    {
        var i = 0;
        var factor = Vector256.Create(scale);
        for (; i <= count - 8; i += 8)
        {
            var codes = Vector256.WidenLower(Vector256.WidenLower(Vector64.Load(from + i).ToVector128().ToVector256()).AsUInt16());
            var low = codes & Vector256.Create(0x7Fu);
            var magnitude = (low << 20).AsSingle() * Rebias;
            var nan = Vector256.Equals(low, Vector256.Create(0x7Fu)).AsSingle();
            var sign = ((codes & Vector256.Create(0x80u)) << 24).AsSingle();
            T.Store8(to, at + i, ((magnitude | nan) ^ sign) * factor);
        }

        for (; i < count; i++)
            T.Store(to, at + i, Decode(from[i]) * scale);
    }

    private static void Quantize<T>(void* from, long rows, long columns, byte* to, float* scales, string name)
        where T : struct, IElement
    {
        var (gridRows, gridColumns) = Grid(rows, columns);
        for (long block = 0; block < gridRows * gridColumns; block++)
        {
            var (r0, c0) = (block / gridColumns * Extent, block % gridColumns * Extent);
            var (r1, c1) = (Math.Min(r0 + Extent, rows), Math.Min(c0 + Extent, columns));
            var most = 0f;
            for (var r = r0; r < r1; r++)
            {
                for (var c = c0; c < c1; c++)
                {
                    var value = T.Load(from, (r * columns) + c);
                    if (!float.IsFinite(value))
                        throw Wrong(name, $"the weight holds {value} at [{r}, {c}]", "only finite values have an fp8 form");
                    most = Math.Max(most, Math.Abs(value));
                }
            }

            var scale = most / E4M3.Largest;
            scales[block] = scale = scale == 0 ? 1 : scale;
            for (var r = r0; r < r1; r++)
            {
                for (var c = c0; c < c1; c++)
                    to[(r * columns) + c] = Encode(T.Load(from, (r * columns) + c) / scale);
            }
        }
    }

    private static void Check(Tensor weight, Tensor scales, string name)
    {
        static string Shown(Tensor tensor) => $"{(tensor.dtype == SafeTensorTypes.Float8E4M3 ? "F8_E4M3" : tensor.dtype)} [{string.Join(", ", tensor.shape)}]";
        if (weight.dtype != SafeTensorTypes.Float8E4M3 || weight.shape.Length != 2 || !weight.is_contiguous())
            throw Wrong(name, $"the weight is {Shown(weight)}", "it must be a contiguous matrix of F8_E4M3");
        var (rows, columns) = Grid(weight.shape[0], weight.shape[1]);
        if (scales.dtype != ScalarType.Float32 || scales.shape is not [var r, var c] || (r, c) != (rows, columns) || !scales.is_contiguous())
        {
            throw Wrong(
                name,
                $"the weight is {Shown(weight)}, its scales are {Shown(scales)}",
                $"blocks of {Extent} x {Extent} need scales of F32 [{rows}, {columns}]");
        }
    }

    private static DiagnosticException Wrong(string name, string what, string help)
        => DiagnosticException.Of(Codes.Fp8Blocks, name, what, help);
}

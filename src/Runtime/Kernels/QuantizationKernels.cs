// E4M3 on machines without it: values are rounded to what fp8 holds and kept in their own element type.
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>
/// OCP E4M3 (arXiv 2209.05433): 4 bits of exponent with bias 7, 3 of mantissa; no infinities; largest 448, smallest 2^-9.
/// </summary>
public static class E4M3
{
    public const float Largest = 448;

    /// <summary>The nearest value that E4M3 holds, ties to even; beyond 448, 448; NaN stays NaN.</summary>
    public static float Round(float value)
    {
        var magnitude = Math.Abs(value);
        if (float.IsNaN(value))
            return float.NaN;
        if (magnitude >= Largest)
            return MathF.CopySign(Largest, value);
        // below 2^-6 values are multiples of 2^-9
        if (magnitude < 0.015625f)
            return MathF.CopySign(MathF.Round(magnitude * 512, MidpointRounding.ToEven) / 512, value);
        // fp32 keeps 23 bits of mantissa, E4M3 three
        var bits = BitConverter.SingleToUInt32Bits(magnitude);
        var rounded = (bits + 0x7FFFFu + ((bits >> 20) & 1)) & ~0xFFFFFu;
        return MathF.CopySign(BitConverter.UInt32BitsToSingle(rounded), value);
    }
}

internal static unsafe class QuantizationKernels
{
    /// <summary>a -> out; Ints block extents by dim. Per block: scale = max|a| / 448, out = e4m3(a / scale) * scale.</summary>
    public static void Fp8Quantize(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            Quantize<BF16>(call);
        else
            Quantize<F32>(call);
    }

    private static void Quantize<T>(in KernelCall call)
        where T : struct, IElement
    {
        var source = call.In(0);
        var target = call.Out().Fill(ElementwiseKernels.Rows(call.Inputs[0]));
        // rows store batch, seq and expert as one dim, of which each index is a block
        var blocks = call.Ints(0);
        var skip = call.Inputs[0].Info.Routed ? 2 : 0;
        var extents = source.shape;
        var last = extents.Length - 1;
        if (last < 0 || blocks.Count - skip != extents.Length)
            throw new InvalidOperationException($"{blocks.Count} block extents for [{string.Join(", ", extents)}]");

        long width = extents[last], inner = blocks[last + skip], lines = 1;
        var strides = new long[extents.Length];
        long grid = 1;
        for (var d = last; d >= 0; d--)
        {
            strides[d] = grid;
            grid *= (extents[d] + blocks[d + skip] - 1) / blocks[d + skip];
            lines *= d < last ? extents[d] : 1;
        }

        void* from = source.Pointer(), to = target.Pointer();
        var scales = new float[grid];
        var index = new long[extents.Length];
        for (long line = 0; line < lines; line++)
        {
            Next(line);
            var at = Block();
            for (long i = 0; i < width; i++)
            {
                var magnitude = Math.Abs(T.Load(from, (line * width) + i));
                ref var most = ref scales[at + (i / inner)];
                // NaN wins, and stays
                most = magnitude > most || float.IsNaN(magnitude) ? magnitude : most;
            }
        }

        for (long block = 0; block < grid; block++)
            scales[block] = float.IsFinite(scales[block]) ? scales[block] / E4M3.Largest : float.NaN;

        for (long line = 0; line < lines; line++)
        {
            Next(line);
            var at = Block();
            for (long i = 0; i < width; i++)
            {
                var scale = scales[at + (i / inner)];
                var value = T.Load(from, (line * width) + i);
                // a scale of zero: nothing in the block is larger than 448 times the smallest fp32
                T.Store(to, (line * width) + i, scale == 0 ? 0 * value : E4M3.Round(value / scale) * scale);
            }
        }

        void Next(long line)
        {
            for (var d = last - 1; d >= 0; d--)
                (line, index[d]) = Math.DivRem(line, extents[d]);
        }

        long Block()
        {
            long block = 0;
            for (var d = 0; d < last; d++)
                block += index[d] / blocks[d + skip] * strides[d];
            return block;
        }
    }
}

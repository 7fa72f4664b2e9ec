// Look-ups in a slice of the vocabulary; ids outside it yield zeros, so that slices add up.
using System.Runtime.InteropServices;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class VocabularyKernels
{
    /// <summary>ids[b s], w[v h], vocab[v] -> y[b s h].</summary>
    public static void Embedding(in KernelCall call)
    {
        Tensor ids = call.In(0), w = call.In(1);
        var first = First(call, 2);
        using var y = new Result(call.Out(), w.dtype);
        long rows = w.shape[0], width = w.shape[1] * TensorMemory.Width(w.dtype);
        byte* from = (byte*)w.Pointer(), to = (byte*)y.P;
        var id = (long*)ids.Pointer();
        for (long t = 0; t < ids.numel(); t++)
        {
            var row = id[t] - first;
            if (row >= 0 && row < rows)
                Buffer.MemoryCopy(from + (row * width), to + (t * width), width, width);
            else
                new Span<byte>(to + (t * width), (int)width).Clear();
        }
    }

    /// <summary>ids[b s], dy[b s h], vocab[v] -> dw[v h]; tokens are added in order, in fp32.</summary>
    public static void EmbeddingGrad(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(1).dtype))
            ScatterAdd<BF16>(call);
        else
            ScatterAdd<F32>(call);
    }

    /// <summary>z[b s v], labels[b s], vocab[v] -> y[b s]: z at the label, zero when absent.</summary>
    public static void Pick(in KernelCall call)
    {
        if (Simd.IsBFloat16(call.In(0).dtype))
            Pick<BF16>(call);
        else
            Pick<F32>(call);
    }

    /// <summary>dy[b s], labels[b s], vocab[v] -> dz[b s v].</summary>
    public static void PickGrad(in KernelCall call)
    {
        using var dy = Operand.Float(call.In(0));
        var label = (long*)call.In(1).Pointer();
        var first = First(call, 2);
        var target = call.Out().Fill();
        target.zero_().On(target);
        var vocab = target.shape[^1];
        var p = target.Pointer();
        var half = Simd.IsBFloat16(target.dtype);
        for (long t = 0; t < call.In(0).numel(); t++)
        {
            var at = label[t] - first;
            if (at < 0 || at >= vocab)
                continue;
            if (half)
                BF16.Store(p, (t * vocab) + at, dy.Floats[t]);
            else
                F32.Store(p, (t * vocab) + at, dy.Floats[t]);
        }
    }

    private static long First(in KernelCall call, int input) => call.In(input).numel() == 0 ? 0 : *(long*)call.In(input).Pointer();

    private static void ScatterAdd<T>(in KernelCall call)
        where T : struct, IElement
    {
        Tensor ids = call.In(0), dy = call.In(1);
        var first = First(call, 2);
        using var dw = new Result(call.Out(), ScalarType.Float32);
        NativeMemory.Clear(dw.P, (nuint)(dw.Count * 4));
        long rows = call.In(2).numel(), width = dy.shape[^1];
        var id = (long*)ids.Pointer();
        var p = dy.Pointer();
        for (long t = 0; t < ids.numel(); t++)
        {
            var row = id[t] - first;
            if (row < 0 || row >= rows)
                continue;
            long from = t * width, to = row * width, i = 0;
            for (; i <= width - 8; i += 8)
                F32.Store8(dw.P, to + i, F32.Load8(dw.P, to + i) + T.Load8(p, from + i));
            for (; i < width; i++)
                dw.Floats[to + i] += T.Load(p, from + i);
        }
    }

    private static void Pick<T>(in KernelCall call)
        where T : struct, IElement
    {
        var z = call.In(0);
        var label = (long*)call.In(1).Pointer();
        var first = First(call, 2);
        using var y = new Result(call.Out(), ScalarType.Float32);
        var vocab = z.shape[^1];
        var p = z.Pointer();
        for (long t = 0; t < y.Count; t++)
        {
            var at = label[t] - first;
            y.Floats[t] = at >= 0 && at < vocab ? T.Load(p, (t * vocab) + at) : 0;
        }
    }
}

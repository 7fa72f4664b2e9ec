// The output head under cross-entropy: logits of a block of the vocabulary at a time, used up before the next.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class HeadKernels
{
    /// <summary>Bytes of logits that exist at once; one block of the vocabulary, if that is more.</summary>
    private const long Workspace = 16 << 20;

    /// <summary>h[b s k], w[v k], labels[b s], vocab[v] -> lse[b s c], at[b s].</summary>
    public static void LinearLogSumExp(in KernelCall call)
    {
        using var logits = new Logits(call);
        using var lse = new Result(call.Out(0), ScalarType.Float32);
        using var at = new Result(call.Out(1), ScalarType.Float32);
        new Span<float>(at.Floats, (int)at.Count).Clear();
        for (var first = 0; first < logits.Vocab; first += logits.Width)
        {
            using var z = logits.Compute(first);
            var width = (int)z.shape[1];
            var p = (float*)z.Pointer();
            for (var t = 0; t < logits.Tokens; t++)
            {
                var row = p + ((long)t * width);
                var label = logits.LabelIn(t, first, width);
                if (label >= 0)
                    at.Floats[t] = row[label];
                for (var i = 0; i < width; i += logits.Block)
                    lse.Floats[((long)t * logits.Blocks) + ((first + i) / logits.Block)] = LogSumExp(row + i, logits.Block);
            }
        }
    }

    /// <summary>h, w, labels, vocab, lse, dlse[b s c], dat[b s] -> dh[b s k], dw[v k].</summary>
    public static void LinearLogSumExpGrad(in KernelCall call)
    {
        using var logits = new Logits(call);
        using var lse = Operand.Float(call.In(4));
        using var dlse = Operand.Float(call.In(5));
        using var dat = Operand.Float(call.In(6));
        Tensor dh = call.Out(0).Fill(), dw = call.Out(1).Fill();
        using var wideDh = dh.dtype == ScalarType.Float32 ? null : empty(dh.shape, dtype: ScalarType.Float32);
        using var sumDh = (wideDh ?? dh).view(logits.Tokens, -1);
        for (var first = 0; first < logits.Vocab; first += logits.Width)
        {
            using var z = logits.Compute(first);
            var width = (int)z.shape[1];
            var p = (float*)z.Pointer();
            for (var t = 0; t < logits.Tokens; t++)
            {
                var row = p + ((long)t * width);
                for (var i = 0; i < width; i += logits.Block)
                {
                    var c = ((long)t * logits.Blocks) + ((first + i) / logits.Block);
                    Softmax(row + i, logits.Block, lse.Floats[c], dlse.Floats[c]);
                }

                var label = logits.LabelIn(t, first, width);
                if (label >= 0)
                    row[label] += dat.Floats[t];
            }

            using var w = logits.Weight(first);
            sumDh.addmm_(z, w, first == 0 ? 0f : 1f, 1f).On(sumDh);
            using var turned = z.t();
            using var part = dw.narrow(0, first, width);
            if (dw.dtype == ScalarType.Float32)
                part.addmm_(turned, logits.Hidden, 0f, 1f).On(part);
            else
            {
                using var wide = turned.mm(logits.Hidden);
                part.copy_(wide).On(part);
            }
        }

        if (wideDh is not null)
            dh.copy_(wideDh).On(dh);
    }

    private static float LogSumExp(float* x, int n)
    {
        var largest = Simd.Max(x, n);
        var shift = Vector256.Create(largest);
        var sums = Vector256<float>.Zero;
        var i = 0;
        for (; i <= n - 8; i += 8)
            sums += Vector256.Exp(Vector256.Load(x + i) - shift);
        var total = Simd.Total(sums);
        for (; i < n; i++)
            total += MathF.Exp(x[i] - largest);
        return largest + MathF.Log(total);
    }

    /// <summary>x becomes exp(x - lse) * d.</summary>
    private static void Softmax(float* x, int n, float lse, float d)
    {
        Vector256<float> shift = Vector256.Create(lse), factor = Vector256.Create(d);
        var i = 0;
        for (; i <= n - 8; i += 8)
            (Vector256.Exp(Vector256.Load(x + i) - shift) * factor).Store(x + i);
        for (; i < n; i++)
            x[i] = MathF.Exp(x[i] - lse) * d;
    }

    /// <summary>Logits of some blocks of the vocabulary for all tokens, in fp32, in memory that is used again.</summary>
    private readonly ref struct Logits
    {
        private readonly Tensor _w;
        private readonly Tensor? _wide;
        private readonly Tensor _space;
        private readonly long* _labels;
        private readonly long _firstId;

        public Logits(in KernelCall call)
        {
            var h = call.In(0);
            _w = call.In(1);
            Block = call.Int(0);
            Vocab = (int)_w.shape[0];
            Tokens = (int)call.In(2).numel();
            Blocks = Vocab / Block;
            var blocks = Math.Clamp(Workspace / (4L * Tokens * Block), 1, Blocks);
            Width = (int)blocks * Block;
            _wide = h.dtype == ScalarType.Float32 ? null : h.to_type(ScalarType.Float32);
            Hidden = (_wide ?? h).view(Tokens, -1);
            _space = empty([(long)Tokens * Width], dtype: ScalarType.Float32);
            _labels = (long*)call.In(2).Pointer();
            _firstId = *(long*)call.In(3).Pointer();
        }

        public int Block { get; }

        public int Blocks { get; }

        public int Vocab { get; }

        public int Tokens { get; }

        /// <summary>Ids whose logits exist at once; fewer at the end.</summary>
        public int Width { get; }

        /// <summary>Hidden states [tokens, k].</summary>
        public Tensor Hidden { get; }

        /// <summary>Rows of the head from `first` on, in fp32; the caller disposes them.</summary>
        public Tensor Weight(int first) => Products.WideRows(_w, first, Math.Min(Width, Vocab - first));

        /// <summary>Logits [tokens, width] of the ids from `first` on; they last until the next call.</summary>
        public Tensor Compute(int first)
        {
            using var w = Weight(first);
            using var turned = w.t();
            using var space = _space.narrow(0, 0, Tokens * w.shape[0]);
            var z = space.view(Tokens, -1);
            z.addmm_(Hidden, turned, 0f, 1f).On(z);
            return z;
        }

        /// <summary>Where the token's label lies among `width` ids from `first` on; -1 elsewhere.</summary>
        public int LabelIn(int token, int first, int width)
        {
            var at = _labels[token] - _firstId - first;
            return at >= 0 && at < width ? (int)at : -1;
        }

        public void Dispose()
        {
            Hidden.Dispose();
            _wide?.Dispose();
            _space.Dispose();
        }
    }
}

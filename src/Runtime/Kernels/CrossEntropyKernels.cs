// The output head under cross-entropy, vocabulary whole: all logits of a chunk of tokens at a time, used up before the next.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

internal static unsafe class CrossEntropyKernels
{
    /// <summary>h[b s k], w[v k], labels[b s], vocab[v] -> loss[b s].</summary>
    public static void Loss(in KernelCall call)
    {
        using var head = new Head(call);
        using var loss = new Result(call.Out(0), ScalarType.Float32);
        for (var first = 0; first < head.Tokens; first += head.Chunk)
        {
            var count = Math.Min(head.Chunk, head.Tokens - first);
            var z = head.Logits(first, count);
            for (var t = 0; t < count; t++)
                loss.Floats[first + t] = Exponentials(z + ((long)t * head.Vocab), head.Vocab, head.LabelOf(first + t), out _);
        }
    }

    /// <summary>h, w, labels, vocab, dloss[b s] -> loss[b s], dh[b s k], dw[v k] fp32.</summary>
    public static void LossAndGradient(in KernelCall call)
    {
        using var head = new Head(call);
        using var dloss = Operand.Float(call.In(4));
        using var loss = new Result(call.Out(0), ScalarType.Float32);
        Tensor dh = call.Out(1).Fill(), dw = call.Out(2).Fill();
        using var wideDh = dh.dtype == ScalarType.Float32 ? null : empty(dh.shape, dtype: ScalarType.Float32);
        using var sumDh = (wideDh ?? dh).view(head.Tokens, -1);
        using var weighed = empty([head.Chunk, head.Features], dtype: ScalarType.Float32);
        var to = (float*)weighed.Pointer();
        var weights = new float[head.Chunk];
        for (var first = 0; first < head.Tokens; first += head.Chunk)
        {
            var count = Math.Min(head.Chunk, head.Tokens - first);
            var z = head.Logits(first, count);
            for (var t = 0; t < count; t++)
            {
                var row = z + ((long)t * head.Vocab);
                var label = head.LabelOf(first + t);
                loss.Floats[first + t] = Exponentials(row, head.Vocab, label, out var sum);

                // the gradient of the logits is this row, times a weight that is left to the narrow h and dh
                if (label >= 0)
                    row[label] -= sum;
                weights[t] = dloss.Floats[first + t] / sum;
                Scale(head.State(first + t), weights[t], to + ((long)t * head.Features), head.Features);
            }

            using var rows = weighed.narrow(0, 0, count);
            head.AddWeightGradient(rows, first, dw);
            using var part = sumDh.narrow(0, first, count);
            head.HiddenGradient(count, part);
            var gradient = (float*)part.Pointer();
            for (var t = 0; t < count; t++)
                Scale(gradient + ((long)t * head.Features), weights[t], gradient + ((long)t * head.Features), head.Features);
        }

        if (wideDh is not null)
            dh.copy_(wideDh).On(dh);
    }

    private static void Scale(float* from, float factor, float* to, int n)
    {
        var factors = Vector256.Create(factor);
        var i = 0;
        for (; i <= n - 8; i += 8)
            (Vector256.Load(from + i) * factors).Store(to + i);
        for (; i < n; i++)
            to[i] = from[i] * factor;
    }

    /// <summary>x becomes exp(x - its maximum); the sum of that, and log-sum-exp less the label's element (0 without one).</summary>
    private static float Exponentials(float* x, int n, int label, out float sum)
    {
        var at = label < 0 ? 0 : x[label];
        var largest = Simd.Max(x, n);
        var shift = Vector256.Create(largest);
        var sums = Vector256<float>.Zero;
        var i = 0;
        for (; i <= n - 8; i += 8)
        {
            var e = Vector256.Exp(Vector256.Load(x + i) - shift);
            e.Store(x + i);
            sums += e;
        }

        sum = Simd.Total(sums);
        for (; i < n; i++)
            sum += x[i] = MathF.Exp(x[i] - largest);
        return largest + MathF.Log(sum) - at;
    }

    /// <summary>Hidden states, head and the logits of a chunk of tokens, all products in fp32.</summary>
    private readonly ref struct Head
    {
        /// <summary>Bytes of logits that exist at once, as long as that is LeastChunk tokens.</summary>
        private const long Workspace = 16 << 20;

        /// <summary>Each chunk reads the head twice and adds to its gradient: fewer tokens would wait for memory.</summary>
        private const int LeastChunk = 256;

        /// <summary>Bytes of a bf16 head that are fp32 at once.</summary>
        private const long WideBytes = 16 << 20;

        private readonly Tensor _w;
        private readonly Tensor _hidden;
        private readonly Tensor _space;
        private readonly int _block;
        private readonly long* _labels;
        private readonly long _firstId;

        public Head(in KernelCall call)
        {
            _w = call.In(1);
            Vocab = (int)_w.shape[0];
            Features = (int)_w.shape[1];
            Tokens = (int)call.In(2).numel();
            Chunk = (int)Math.Min(Tokens, Math.Max(LeastChunk, Workspace / (4L * Vocab)));
            using var h = call.In(0).to_type(ScalarType.Float32);
            _hidden = h.view(Tokens, Features);
            _block = _w.dtype == ScalarType.Float32 ? Vocab : (int)Math.Clamp(WideBytes / (4L * Features), 1, Vocab);
            _space = empty([Chunk, Vocab], dtype: ScalarType.Float32);
            _labels = (long*)call.In(2).Pointer();
            _firstId = *(long*)call.In(3).Pointer();
        }

        public int Tokens { get; }

        public int Vocab { get; }

        public int Features { get; }

        /// <summary>Tokens whose logits exist at once; fewer at the end.</summary>
        public int Chunk { get; }

        public float* State(int token) => (float*)_hidden.Pointer() + ((long)token * Features);

        /// <summary>The label as an index into the vocabulary, or -1.</summary>
        public int LabelOf(int token)
        {
            var at = _labels[token] - _firstId;
            return at >= 0 && at < Vocab ? (int)at : -1;
        }

        /// <summary>Logits [count, vocab] of tokens; they last until the next call.</summary>
        public float* Logits(int first, int count)
        {
            using var h = _hidden.narrow(0, first, count);
            for (var v = 0; v < Vocab; v += _block)
            {
                using var w = Rows(v);
                using var turned = w.t();
                using var z = Columns(count, v, (int)w.shape[0]);
                z.addmm_(h, turned, 0f, 1f).On(z);
            }

            return (float*)_space.Pointer();
        }

        /// <summary>dw = z^T h for the chunk that begins at token 0; later ones are added.</summary>
        public void AddWeightGradient(Tensor h, int first, Tensor dw)
        {
            using var z = Columns((int)h.shape[0], 0, Vocab);
            using var turned = z.t();
            dw.addmm_(turned, h, first == 0 ? 0f : 1f, 1f).On(dw);
        }

        /// <summary>dh = z w, for the last logits' tokens.</summary>
        public void HiddenGradient(int count, Tensor dh)
        {
            for (var v = 0; v < Vocab; v += _block)
            {
                using var w = Rows(v);
                using var z = Columns(count, v, (int)w.shape[0]);
                dh.addmm_(z, w, v == 0 ? 0f : 1f, 1f).On(dh);
            }
        }

        public void Dispose()
        {
            _hidden.Dispose();
            _space.Dispose();
        }

        private Tensor Columns(int count, int first, int width)
        {
            using var rows = _space.narrow(0, 0, count);
            return rows.narrow(1, first, width);
        }

        /// <summary>Rows of the head in fp32; the caller disposes them.</summary>
        private Tensor Rows(int first) => Products.WideRows(_w, first, Math.Min(_block, Vocab - first));
    }
}

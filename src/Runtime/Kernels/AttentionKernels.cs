// Causal attention with exact arithmetic: fp32 products and softmax, one block of queries of one head at a time.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

// b batch, s queries, t keys, n heads, d features of q and k, e features of v.
internal static unsafe class AttentionKernels
{
    private const int Block = 128;

    /// <summary>q[b s n d], k[b t n d], v[b t n e] -> out[b s n e], lse[b n s]; Float scale, Ints off (axes that split s).</summary>
    public static void Attention(in KernelCall call)
    {
        using var heads = new Heads(call, 0);
        var shape = heads.Out;
        var result = call.Out(0).Fill();
        using var wide = result.dtype == ScalarType.Float32 ? null : empty(shape, dtype: ScalarType.Float32);
        using var lse = new Result(call.Out(1), ScalarType.Float32);
        using var scratch = empty(Math.Min(Block, heads.S) * heads.T, dtype: ScalarType.Float32);
        for (var b = 0; b < heads.B; b++)
        {
            for (var n = 0; n < heads.N; n++)
            {
                using var q = Head(heads.Q, b, n);
                using var k = Head(heads.K, b, n);
                using var v = Head(heads.V, b, n);
                using var y = Head(wide ?? result, b, n);
                using var kt = k.t();
                for (var first = 0; first < heads.S; first += Block)
                {
                    var rows = Math.Min(Block, heads.S - first);
                    var keys = Math.Min(heads.T, heads.Offset + first + rows);
                    using var scores = Square(scratch, rows, keys);
                    using var qRows = q.narrow(0, first, rows);
                    using var yRows = y.narrow(0, first, rows);
                    using var ktKeys = kt.narrow(1, 0, keys);
                    using var vKeys = v.narrow(0, 0, keys);
                    scores.addmm_(qRows, ktKeys, 0f, 1f).On(scores);
                    var p = (float*)scratch.Pointer();
                    for (var i = 0; i < rows; i++)
                    {
                        var seen = Math.Min(keys, heads.Offset + first + i + 1);
                        lse.Floats[(((b * heads.N) + n) * heads.S) + first + i] = Softmax(p + ((long)i * keys), seen, keys, heads.Scale);
                    }

                    yRows.addmm_(scores, vKeys, 0f, 1f).On(yRows);
                }
            }
        }

        if (wide is not null)
            result.copy_(wide).On(result);
    }

    /// <summary>dout, q, k, v, out, lse -> dq, dk, dv; Float scale, Ints off.</summary>
    public static void AttentionGrad(in KernelCall call)
    {
        using var heads = new Heads(call, 1);
        using var wideDout = Wide(call.In(0));
        using var wideOut = Wide(call.In(4));
        using var lse = Operand.Float(call.In(5));
        using var dq = empty(heads.Q.shape, dtype: ScalarType.Float32);
        using var dk = zeros(heads.K.shape, dtype: ScalarType.Float32);
        using var dv = zeros(heads.V.shape, dtype: ScalarType.Float32);
        using var scratch = empty(Math.Min(Block, heads.S) * heads.T, dtype: ScalarType.Float32);
        using var scratchGrad = empty(Math.Min(Block, heads.S) * heads.T, dtype: ScalarType.Float32);
        var pDout = (float*)wideDout.Pointer();
        var pOut = (float*)wideOut.Pointer();
        for (var b = 0; b < heads.B; b++)
        {
            for (var n = 0; n < heads.N; n++)
            {
                using var q = Head(heads.Q, b, n);
                using var k = Head(heads.K, b, n);
                using var v = Head(heads.V, b, n);
                using var dy = Head(wideDout, b, n);
                using var dqHead = Head(dq, b, n);
                using var dkHead = Head(dk, b, n);
                using var dvHead = Head(dv, b, n);
                for (var first = 0; first < heads.S; first += Block)
                {
                    var rows = Math.Min(Block, heads.S - first);
                    var keys = Math.Min(heads.T, heads.Offset + first + rows);
                    using var scores = Square(scratch, rows, keys);
                    using var grads = Square(scratchGrad, rows, keys);
                    using var qRows = q.narrow(0, first, rows);
                    using var dyRows = dy.narrow(0, first, rows);
                    using var kKeys = k.narrow(0, 0, keys);
                    using var vKeys = v.narrow(0, 0, keys);
                    using var kt = kKeys.t();
                    using var vt = vKeys.t();
                    scores.addmm_(qRows, kt, 0f, 1f).On(scores);
                    grads.addmm_(dyRows, vt, 0f, 1f).On(grads);
                    float* p = (float*)scratch.Pointer(), g = (float*)scratchGrad.Pointer();
                    for (var i = 0; i < rows; i++)
                    {
                        var at = ((((long)b * heads.S) + first + i) * heads.N + n) * heads.E;
                        var delta = Simd.Dot<F32, F32>(pDout, at, pOut, at, heads.E);
                        var seen = Math.Min(keys, heads.Offset + first + i + 1);
                        var total = lse.Floats[(((b * heads.N) + n) * heads.S) + first + i];
                        SoftmaxGrad(p + ((long)i * keys), g + ((long)i * keys), seen, keys, heads.Scale, total, delta);
                    }

                    using var dqRows = dqHead.narrow(0, first, rows);
                    using var dkKeys = dkHead.narrow(0, 0, keys);
                    using var dvKeys = dvHead.narrow(0, 0, keys);
                    using var gt = grads.t();
                    using var pt = scores.t();
                    dqRows.addmm_(grads, kKeys, 0f, 1f).On(dqRows);
                    dkKeys.addmm_(gt, qRows, 1f, 1f).On(dkKeys);
                    dvKeys.addmm_(pt, dyRows, 1f, 1f).On(dvKeys);
                }
            }
        }

        call.Out(0).AdoptCopy(dq);
        call.Out(1).AdoptCopy(dk);
        call.Out(2).AdoptCopy(dv);
    }

    /// <summary>In place: row -> probabilities of the first `seen` keys, zero after; returns log-sum-exp of the scaled scores.</summary>
    private static float Softmax(float* row, int seen, int keys, float scale)
    {
        var max = float.NegativeInfinity;
        for (var j = 0; j < seen; j++)
            max = MathF.Max(max, row[j] * scale);
        var scales = Vector256.Create(scale);
        var maxima = Vector256.Create(max);
        var sums = Vector256<float>.Zero;
        var i = 0;
        for (; i <= seen - 8; i += 8)
        {
            var e = Vector256.Exp((F32.Load8(row, i) * scales) - maxima);
            sums += e;
            F32.Store8(row, i, e);
        }

        var sum = Simd.Total(sums);
        for (; i < seen; i++)
        {
            row[i] = MathF.Exp((row[i] * scale) - max);
            sum += row[i];
        }

        var share = 1 / sum;
        for (i = 0; i < seen; i++)
            row[i] *= share;
        new Span<float>(row + seen, keys - seen).Clear();
        return max + MathF.Log(sum);
    }

    /// <summary>In place: scores -> probabilities, gradients of probabilities -> gradients of scores; zero after `seen`.</summary>
    private static void SoftmaxGrad(float* scores, float* grads, int seen, int keys, float scale, float lse, float delta)
    {
        var scales = Vector256.Create(scale);
        var totals = Vector256.Create(lse);
        var deltas = Vector256.Create(delta);
        var i = 0;
        for (; i <= seen - 8; i += 8)
        {
            var p = Vector256.Exp((F32.Load8(scores, i) * scales) - totals);
            F32.Store8(scores, i, p);
            F32.Store8(grads, i, p * (F32.Load8(grads, i) - deltas) * scales);
        }

        for (; i < seen; i++)
        {
            var p = MathF.Exp((scores[i] * scale) - lse);
            scores[i] = p;
            grads[i] = p * (grads[i] - delta) * scale;
        }

        new Span<float>(scores + seen, keys - seen).Clear();
        new Span<float>(grads + seen, keys - seen).Clear();
    }

    private static Tensor Head(Tensor tensor, long b, long n)
    {
        using var batch = tensor.select(0, b);
        return batch.select(1, n);
    }

    private static Tensor Square(Tensor scratch, int rows, int keys)
    {
        using var flat = scratch.narrow(0, 0, (long)rows * keys);
        return flat.view(rows, keys);
    }

    private static Tensor Wide(Tensor tensor) => tensor.dtype == ScalarType.Float32 ? tensor.alias() : tensor.to_type(ScalarType.Float32);

    /// <summary>q, k, v in fp32, their extents, and where the first query stands among the keys.</summary>
    private sealed class Heads : IDisposable
    {
        public Heads(in KernelCall call, int first)
        {
            Q = Wide(call.In(first));
            K = Wide(call.In(first + 1));
            V = Wide(call.In(first + 2));
            B = (int)Q.shape[0];
            S = (int)Q.shape[1];
            N = (int)Q.shape[2];
            T = (int)K.shape[1];
            E = (int)V.shape[3];
            Scale = (float)call.Float(0);
            Offset = call.Rank.BlockOf(call.Ints(1)) * S;
            if (Offset + S > T)
                throw new InvalidOperationException($"{S} queries from position {Offset} on do not fit {T} keys");
        }

        public Tensor Q { get; }

        public Tensor K { get; }

        public Tensor V { get; }

        public int B { get; }

        public int S { get; }

        public int N { get; }

        public int T { get; }

        public int E { get; }

        public float Scale { get; }

        public int Offset { get; }

        public long[] Out => [B, S, N, E];

        public void Dispose()
        {
            Q.Dispose();
            K.Dispose();
            V.Dispose();
        }
    }
}

// Causal attention with exact arithmetic: fp32 products and softmax, a block of queries of some heads at a time.
using System.Runtime.Intrinsics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

// b batch, s queries, t keys, n heads, d features of q and k, e features of v.
internal static unsafe class AttentionKernels
{
    /// <summary>Queries of a block, and the scores (512 KiB) that a block may hold.</summary>
    private const int Rows = 64, Scores = 1 << 17;

    /// <summary>q[b s n d], k[b t n d], v[b t n e] -> out[b s n e], lse[b n s]; Float scale; an optional last operand says at which key each query stands.</summary>
    public static void Attention(in KernelCall call)
    {
        using var heads = new Heads(call, 0, 3);
        var result = call.Out(0).Fill();
        using var wide = Products.Wide(result, ScalarType.Float32);
        using var lse = new Result(call.Out(1), ScalarType.Float32);
        foreach (var block in heads.Blocks())
        {
            using var q = heads.Queries(heads.Q, block);
            using var k = heads.Keys(heads.K, block);
            using var v = heads.Keys(heads.V, block);
            using var y = heads.Queries(wide ?? result, block);
            using var kt = k.transpose(1, 2);
            using var scores = q.bmm(kt);
            var p = (float*)scores.Pointer();
            for (var n = 0; n < block.Count; n++)
            {
                for (var i = 0; i < block.Rows; i++, p += block.Keys)
                    lse.Floats[heads.At(block, n, i)] = Softmax(p, heads.Seen(block, i), block.Keys, heads.Scale);
            }

            using var part = scores.bmm(v);
            y.copy_(part).On(y);
        }

        if (wide is not null)
            result.copy_(wide).On(result);
    }

    /// <summary>dout, q, k, v, out, lse -> dq, dk, dv; Float scale; positions as above.</summary>
    public static void AttentionGrad(in KernelCall call)
    {
        using var heads = new Heads(call, 1, 6);
        using var dout = Wide(call.In(0));
        using var result = Wide(call.In(4));
        using var lse = Operand.Float(call.In(5));
        using var dq = empty(heads.Q.shape, dtype: ScalarType.Float32);
        using var dk = zeros(heads.K.shape, dtype: ScalarType.Float32);
        using var dv = zeros(heads.V.shape, dtype: ScalarType.Float32);
        var pDout = dout.Pointer();
        var pOut = result.Pointer();
        foreach (var block in heads.Blocks())
        {
            using var q = heads.Queries(heads.Q, block);
            using var k = heads.Keys(heads.K, block);
            using var v = heads.Keys(heads.V, block);
            using var dy = heads.Queries(dout, block);
            using var kt = k.transpose(1, 2);
            using var vt = v.transpose(1, 2);
            using var scores = q.bmm(kt);
            using var grads = dy.bmm(vt);
            float* p = (float*)scores.Pointer(), g = (float*)grads.Pointer();
            for (var n = 0; n < block.Count; n++)
            {
                for (var i = 0; i < block.Rows; i++, p += block.Keys, g += block.Keys)
                {
                    var at = ((((long)block.Batch * heads.S) + block.First + i) * heads.N + block.Head + n) * heads.E;
                    var delta = Simd.Dot<F32, F32>(pDout, at, pOut, at, heads.E);
                    SoftmaxGrad(p, g, heads.Seen(block, i), block.Keys, heads.Scale, lse.Floats[heads.At(block, n, i)], delta);
                }
            }

            using var gt = grads.transpose(1, 2);
            using var pt = scores.transpose(1, 2);
            using var dqPart = grads.bmm(k);
            using var dkPart = gt.bmm(q);
            using var dvPart = pt.bmm(dy);
            using var dqRows = heads.Queries(dq, block);
            using var dkKeys = heads.Keys(dk, block);
            using var dvKeys = heads.Keys(dv, block);
            dqRows.copy_(dqPart).On(dqRows);
            dkKeys.add_(dkPart, Scalars.One).On(dkKeys);
            dvKeys.add_(dvPart, Scalars.One).On(dvKeys);
        }

        call.Out(0).AdoptCopy(dq);
        call.Out(1).AdoptCopy(dk);
        call.Out(2).AdoptCopy(dv);
    }

    /// <summary>In place: row -> probabilities of the first `seen` keys, zero after; returns log-sum-exp of the scaled scores.</summary>
    internal static float Softmax(float* row, int seen, int keys, float scale)
    {
        var scales = Vector256.Create(scale);
        var maxima = Vector256.Create(float.NegativeInfinity);
        var i = 0;
        for (; i <= seen - 8; i += 8)
            maxima = Vector256.Max(maxima, F32.Load8(row, i) * scales);
        var max = float.NegativeInfinity;
        for (var lane = 0; lane < 8; lane++)
            max = MathF.Max(max, maxima[lane]);
        for (; i < seen; i++)
            max = MathF.Max(max, row[i] * scale);
        maxima = Vector256.Create(max);
        var sums = Vector256<float>.Zero;
        for (i = 0; i <= seen - 8; i += 8)
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
        var shares = Vector256.Create(share);
        for (i = 0; i <= seen - 8; i += 8)
            F32.Store8(row, i, F32.Load8(row, i) * shares);
        for (; i < seen; i++)
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

    private static Tensor Wide(Tensor tensor) => tensor.dtype == ScalarType.Float32 ? tensor.alias() : tensor.to_type(ScalarType.Float32);

    /// <summary>Queries [First, First + Rows) of heads [Head, Head + Count) of a sequence, and the keys they see.</summary>
    private readonly record struct Block(int Batch, int Head, int Count, int First, int Rows, int Keys);

    /// <summary>q, k, v in fp32, their extents, and where each query stands among the keys.</summary>
    private sealed class Heads : IDisposable
    {
        private readonly int[] _positions;

        public Heads(in KernelCall call, int first, int positions)
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
            _positions = new int[S];
            var told = call.Inputs.Length > positions ? (long*)call.In(positions).Pointer() : null;
            for (var i = 0; i < S; i++)
            {
                var at = told is null ? i : told[i];
                _positions[i] = at >= 0 && at < T
                    ? (int)at
                    : throw new InvalidOperationException($"query {i} stands at position {at}, but there are {T} keys");
            }
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

        /// <summary>All blocks, in a fixed order.</summary>
        public IEnumerable<Block> Blocks()
        {
            for (var b = 0; b < B; b++)
            {
                for (var first = 0; first < S; first += AttentionKernels.Rows)
                {
                    var rows = Math.Min(AttentionKernels.Rows, S - first);
                    var keys = 1 + _positions[first..(first + rows)].Max();
                    var count = Math.Clamp(Scores / (rows * keys), 1, N);
                    for (var n = 0; n < N; n += count)
                        yield return new Block(b, n, Math.Min(count, N - n), first, rows, keys);
                }
            }
        }

        /// <summary>Keys that query i of a block may look at.</summary>
        public int Seen(Block block, int i) => _positions[block.First + i] + 1;

        /// <summary>Place of a query in [b n s].</summary>
        public long At(Block block, int n, int i) => ((((long)block.Batch * N) + block.Head + n) * S) + block.First + i;

        /// <summary>The block's part of [b s n x] as [n s x]; the caller disposes it.</summary>
        public Tensor Queries(Tensor tensor, Block block) => Part(tensor, block, block.First, block.Rows);

        /// <summary>The block's part of [b t n x] as [n t x]; the caller disposes it.</summary>
        public Tensor Keys(Tensor tensor, Block block) => Part(tensor, block, 0, block.Keys);

        private static Tensor Part(Tensor tensor, Block block, long first, long length)
        {
            using var sequence = tensor.select(0, block.Batch);
            using var rows = sequence.narrow(0, first, length);
            using var heads = rows.narrow(1, block.Head, block.Count);
            return heads.transpose(0, 1);
        }

        public void Dispose()
        {
            Q.Dispose();
            K.Dispose();
            V.Dispose();
        }
    }
}

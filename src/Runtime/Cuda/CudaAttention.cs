// Causal attention on a GPU, as the plan says: by cuDNN, or in exact fp32 arithmetic, a block of queries at a time.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

// b batch, s queries, t keys, n heads, d features of q and k, e features of v.
internal static class CudaAttention
{
    /// <summary>Elements of scores that exist at once in exact arithmetic.</summary>
    private const long Scores = 64 << 20;

    /// <summary>q[b s n d], k[b t n d], v[b t n e] (, positions[s]) -> out[b s n e], lse[b n s].</summary>
    public static void Attention(in KernelCall call)
    {
        var scale = call.Float(0);
        if (!CudaPath.IsLibrary(call, KernelId.Attention, 1))
        {
            Exact(call, scale);
            return;
        }

        using var q = call.In(0).transpose(1, 2);
        using var k = call.In(1).transpose(1, 2);
        using var v = call.In(2).transpose(1, 2);
        var results = Aten.Attention(q, k, v, scale);
        using var result = results[0];
        using var lse = results[1];
        call.Out(0).Adopt(result.transpose(1, 2));
        call.Out(1).Adopt(lse.squeeze(-1));
    }

    /// <summary>dout, q, k, v, out, lse (, positions) -> dq, dk, dv.</summary>
    public static void AttentionGrad(in KernelCall call)
    {
        var scale = call.Float(0);
        if (!CudaPath.IsLibrary(call, KernelId.AttentionGrad, 1))
        {
            ExactGrad(call, scale);
            return;
        }

        using var dout = call.In(0).transpose(1, 2);
        using var q = call.In(1).transpose(1, 2);
        using var k = call.In(2).transpose(1, 2);
        using var v = call.In(3).transpose(1, 2);
        using var result = call.In(4).transpose(1, 2);
        using var lse = call.In(5).unsqueeze(-1);
        var gradients = Aten.AttentionGrad(dout, q, k, v, result, lse, scale);
        for (var i = 0; i < 3; i++)
        {
            using var gradient = gradients[i];
            call.Out(i).Adopt(gradient.transpose(1, 2));
        }
    }

    private static void Exact(in KernelCall call, double scale)
    {
        Tensor result = call.Out(0).Fill(), lse = call.Out(1).Fill();
        using var heads = new Heads(call, 0, 3);
        using var factor = (TorchSharp.Scalar)scale;
        for (long b = 0; b < heads.B; b++)
        {
            using var k = heads.Of(heads.K, b, 0, heads.T);
            using var v = heads.Of(heads.V, b, 0, heads.T);
            using var kt = k.transpose(1, 2);
            for (long first = 0; first < heads.S; first += heads.Block)
            {
                var rows = Math.Min(heads.Block, heads.S - first);
                using var q = heads.Of(heads.Q, b, first, rows);
                using var scores = q.bmm(kt);
                scores.mul_(factor).On(scores);
                heads.Mask(scores, first, rows);
                using var total = scores.logsumexp(-1);
                using var p = scores.softmax(-1);
                using var part = p.bmm(v);
                using var place = heads.Of(result, b, first, rows);
                place.copy_(part).On(place);
                using var sequence = lse.select(0, b);
                using var at = sequence.narrow(1, first, rows);
                at.copy_(total).On(at);
            }
        }
    }

    private static void ExactGrad(in KernelCall call, double scale)
    {
        using var heads = new Heads(call, 1, 6);
        using var dout = Gpu.Float(call.In(0));
        using var result = Gpu.Float(call.In(4));
        using var lse = Gpu.Float(call.In(5));
        using var dq = empty_like(heads.Q);
        using var dk = zeros_like(heads.K);
        using var dv = zeros_like(heads.V);
        using var factor = (TorchSharp.Scalar)scale;
        for (long b = 0; b < heads.B; b++)
        {
            using var k = heads.Of(heads.K, b, 0, heads.T);
            using var v = heads.Of(heads.V, b, 0, heads.T);
            using var kt = k.transpose(1, 2);
            using var vt = v.transpose(1, 2);
            using var dkOf = heads.Of(dk, b, 0, heads.T);
            using var dvOf = heads.Of(dv, b, 0, heads.T);
            for (long first = 0; first < heads.S; first += heads.Block)
            {
                var rows = Math.Min(heads.Block, heads.S - first);
                using var q = heads.Of(heads.Q, b, first, rows);
                using var dy = heads.Of(dout, b, first, rows);
                using var y = heads.Of(result, b, first, rows);
                using var sequence = lse.select(0, b);
                using var totals = sequence.narrow(1, first, rows);
                using var total = totals.unsqueeze(-1);
                using var p = q.bmm(kt);
                p.mul_(factor).On(p);
                heads.Mask(p, first, rows);
                p.sub_(total).On(p);
                p.exp_().On(p);
                using var g = dy.bmm(vt);
                using var products = dy.mul(y);
                using var delta = products.sum(-1, keepdim: true);
                g.sub_(delta).On(g);
                g.mul_(p).On(g);
                g.mul_(factor).On(g);
                using var dqPart = g.bmm(k);
                using var place = heads.Of(dq, b, first, rows);
                place.copy_(dqPart).On(place);
                using var gt = g.transpose(1, 2);
                using var pt = p.transpose(1, 2);
                using var dkPart = gt.bmm(q);
                using var dvPart = pt.bmm(dy);
                dkOf.add_(dkPart, Scalars.One).On(dkOf);
                dvOf.add_(dvPart, Scalars.One).On(dvOf);
            }
        }

        call.Out(0).AdoptCopy(dq);
        call.Out(1).AdoptCopy(dk);
        call.Out(2).AdoptCopy(dv);
    }

    /// <summary>q, k, v in fp32, and which keys each query sees.</summary>
    private sealed class Heads : IDisposable
    {
        private readonly Tensor _positions;
        private readonly Tensor _keys;

        public Heads(in KernelCall call, int first, int positions)
        {
            Q = Gpu.Float(call.In(first));
            K = Gpu.Float(call.In(first + 1));
            V = Gpu.Float(call.In(first + 2));
            B = Q.shape[0];
            S = Q.shape[1];
            T = K.shape[1];
            Block = Math.Clamp(Scores / Math.Max(1, T * Q.shape[2]), 1, Math.Max(1, S));
            _keys = arange(T, dtype: ScalarType.Int64, device: Q.device);
            using var told = call.Inputs.Length > positions ? call.In(positions).alias() : arange(S, dtype: ScalarType.Int64, device: Q.device);
            _positions = told.unsqueeze(-1);
        }

        public Tensor Q { get; }

        public Tensor K { get; }

        public Tensor V { get; }

        public long B { get; }

        public long S { get; }

        public long T { get; }

        /// <summary>Queries whose scores exist at once.</summary>
        public long Block { get; }

        /// <summary>A part of [b s n x] as [n s x]; the caller disposes it.</summary>
        public Tensor Of(Tensor tensor, long b, long first, long length)
        {
            using var sequence = tensor.select(0, b);
            using var rows = sequence.narrow(0, first, length);
            return rows.transpose(0, 1);
        }

        /// <summary>scores[n rows t]: minus infinity where the key is behind the query.</summary>
        public void Mask(Tensor scores, long first, long rows)
        {
            using var mine = _positions.narrow(0, first, rows);
            using var hidden = _keys.gt(mine);
            using var none = (TorchSharp.Scalar)float.NegativeInfinity;
            scores.masked_fill_(hidden, none).On(scores);
        }

        public void Dispose()
        {
            Q.Dispose();
            K.Dispose();
            V.Dispose();
            _positions.Dispose();
            _keys.Dispose();
        }
    }
}

// The output head under cross-entropy on a GPU: logits of a chunk of tokens in fp32, used up before the next.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaHead
{
    /// <summary>Bytes of logits that exist at once.</summary>
    private const long Workspace = 1L << 30;

    private const int Threads = 512;

    /// <summary>h[b s k], w[v k], labels[b s], vocab[v] -> loss[b s].</summary>
    public static void LinearCrossEntropy(in KernelCall call)
    {
        using var head = new Head(call);
        using var loss = new Target(call.Out(0), ScalarType.Float32);
        using var losses = loss.Tensor.view(-1);
        for (long first = 0; first < head.Tokens; first += head.Chunk)
        {
            var count = Math.Min(head.Chunk, head.Tokens - first);
            using var z = head.Logits(first, count);
            using var labels = head.Labels.narrow(0, first, count);
            using var part = losses.narrow(0, first, count);
            Gpu.Launch("Vocabulary", "cross_entropy", count, Threads, z, labels, head.Ids, null, part, null, false, count, head.Vocab);
        }
    }

    /// <summary>h, w, labels, vocab, dloss[b s] -> loss[b s], dh[b s k], dw[v k] fp32.</summary>
    public static void LinearCrossEntropyGrad(in KernelCall call)
    {
        using var head = new Head(call);
        using var loss = new Target(call.Out(0), ScalarType.Float32);
        using var given = Gpu.Float(call.In(4));
        using var dloss = given.view(-1);
        using var losses = loss.Tensor.view(-1);
        using var gradients = new Gradients(call, head, 1);
        for (long first = 0; first < head.Tokens; first += head.Chunk)
        {
            var count = Math.Min(head.Chunk, head.Tokens - first);
            using var z = head.Logits(first, count);
            using var dz = Gpu.Empty(z, head.Hidden.dtype, count, head.Vocab);
            using var labels = head.Labels.narrow(0, first, count);
            using var weights = dloss.narrow(0, first, count);
            using var part = losses.narrow(0, first, count);
            Gpu.Launch(
                "Vocabulary", "cross_entropy", count, Threads, z, labels, head.Ids, weights, part, dz, Gpu.IsBFloat16(dz), count, head.Vocab);
            gradients.Add(dz, first, count);
        }
    }

    /// <summary>h[b s k], w[v k], labels[b s], vocab[v] -> lse[b s c], at[b s]; Int block.</summary>
    public static void LinearLogSumExp(in KernelCall call)
    {
        using var head = new Head(call);
        var block = call.Int(0);
        using var lse = new Target(call.Out(0), ScalarType.Float32);
        using var at = new Target(call.Out(1), ScalarType.Float32);
        using var sums = lse.Tensor.view(head.Tokens, -1);
        using var picked = at.Tensor.view(-1);
        for (long first = 0; first < head.Tokens; first += head.Chunk)
        {
            var count = Math.Min(head.Chunk, head.Tokens - first);
            using var z = head.Logits(first, count);
            using var labels = head.Labels.narrow(0, first, count);
            using var part = sums.narrow(0, first, count);
            using var mine = picked.narrow(0, first, count);
            Gpu.Launch("Vocabulary", "log_sum_exp", count * (head.Vocab / block), 256, z, labels, head.Ids, part, mine, count, head.Vocab, block);
        }
    }

    /// <summary>h, w, labels, vocab, lse, dlse[b s c], dat[b s] -> dh[b s k], dw[v k].</summary>
    public static void LinearLogSumExpGrad(in KernelCall call)
    {
        using var head = new Head(call);
        var block = call.Int(0);
        using var givenLse = Gpu.Float(call.In(4));
        using var givenDlse = Gpu.Float(call.In(5));
        using var givenDat = Gpu.Float(call.In(6));
        using var lse = givenLse.view(head.Tokens, -1);
        using var dlse = givenDlse.view(head.Tokens, -1);
        using var dat = givenDat.view(-1);
        using var gradients = new Gradients(call, head, 0);
        for (long first = 0; first < head.Tokens; first += head.Chunk)
        {
            var count = Math.Min(head.Chunk, head.Tokens - first);
            using var z = head.Logits(first, count);
            using var dz = Gpu.Empty(z, head.Hidden.dtype, count, head.Vocab);
            using var labels = head.Labels.narrow(0, first, count);
            using var l = lse.narrow(0, first, count);
            using var dl = dlse.narrow(0, first, count);
            using var da = dat.narrow(0, first, count);
            Gpu.Launch(
                "Vocabulary", "log_sum_exp_grad", count, 256, z, labels, head.Ids, l, dl, da, dz, Gpu.IsBFloat16(dz), count, head.Vocab, block);
            gradients.Add(dz, first, count);
        }
    }

    /// <summary>Hidden states, head and labels, and the logits of a chunk of tokens.</summary>
    private sealed class Head : IDisposable
    {
        public Head(in KernelCall call)
        {
            Tensor h = call.In(0), w = call.In(1);
            var type = Gpu.IsBFloat16(h) && Gpu.IsBFloat16(w) ? ScalarType.BFloat16 : ScalarType.Float32;
            using var hidden = Gpu.As(h, type);
            Weight = Gpu.As(w, type);
            Vocab = (int)w.shape[0];
            Tokens = call.In(2).numel();
            Hidden = hidden.view(Tokens, -1);
            Labels = call.In(2).view(-1);
            Ids = call.In(3);
            Chunk = Math.Clamp(Workspace / (4L * Vocab), 1, Math.Max(1, Tokens));
        }

        public Tensor Hidden { get; }

        public Tensor Weight { get; }

        public Tensor Labels { get; }

        public Tensor Ids { get; }

        public long Tokens { get; }

        public int Vocab { get; }

        public long Chunk { get; }

        /// <summary>fp32 [count, vocab].</summary>
        public Tensor Logits(long first, long count)
        {
            using var h = Hidden.narrow(0, first, count);
            using var turned = Weight.t();
            return Gpu.IsBFloat16(Hidden) ? Aten.MmWide(h, turned) : h.mm(turned);
        }

        public void Dispose()
        {
            Hidden.Dispose();
            Weight.Dispose();
            Labels.Dispose();
        }
    }

    /// <summary>dh and dw from the gradients of chunks of logits, summed in order of tokens.</summary>
    private readonly ref struct Gradients
    {
        private readonly Head _head;
        private readonly SlotValue _dw;
        private readonly Target _dh;
        private readonly Tensor _rows;

        public Gradients(in KernelCall call, Head head, int output)
        {
            _head = head;
            _dh = new Target(call.Out(output), head.Hidden.dtype);
            _rows = _dh.Tensor.view(head.Tokens, -1);
            _dw = call.Out(output + 1);
        }

        public void Add(Tensor dz, long first, long count)
        {
            using var h = _head.Hidden.narrow(0, first, count);
            using var dh = _rows.narrow(0, first, count);
            dh.addmm_(dz, _head.Weight, 0f, 1f).On(dh);
            using var turned = dz.t();
            var narrow = Gpu.IsBFloat16(dz);
            if (first == 0 && !narrow)
            {
                _dw.Adopt(turned.mm(h));
                return;
            }

            using var part = narrow ? Aten.MmWide(turned, h) : turned.mm(h);
            if (first == 0)
                _dw.Adopt(part.alias());
            else
            {
                var dw = _dw.Tensor;
                Gpu.Launch("Elementwise", $"accumulate_f32_{Gpu.Type(dw)}", Gpu.Blocks(dw.numel()), 256, part, dw, dw.numel(), false, false);
            }
        }

        public void Dispose()
        {
            _rows.Dispose();
            _dh.Dispose();
        }
    }
}

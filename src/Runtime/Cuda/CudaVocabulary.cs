// Look-ups in a slice of the vocabulary on a GPU; CUDA C++ in Vocabulary.cu.
using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

internal static class CudaVocabulary
{
    /// <summary>ids[b s], w[v h], vocab[v] -> y[b s h].</summary>
    public static void Embedding(in KernelCall call)
    {
        Tensor ids = call.In(0), w = call.In(1);
        using var y = new Target(call.Out(), w.dtype);
        var bytes = w.shape[1] * TensorMemory.Width(w.dtype);
        var unit = bytes % 16 == 0 ? 16 : 2;
        var h = (int)(bytes / unit);
        Gpu.Launch(
            "Vocabulary", unit == 16 ? "embedding16" : "embedding2", ids.numel(), Gpu.Threads(h, false), ids, w, call.In(2), y.Tensor, ids.numel(), w.shape[0], h);
    }

    /// <summary>ids[b s], dy[b s h], vocab[v] -> dw[v h]; equal ids are added in order of tokens, in fp32.</summary>
    public static void EmbeddingGrad(in KernelCall call)
    {
        Tensor ids = call.In(0), dy = call.In(1), vocab = call.In(2);
        var dw = call.Out().Fill();
        dw.zero_().On(dw);
        var h = (int)dy.shape[^1];
        using var flat = ids.reshape(-1);
        var (sorted, order) = sort(flat, dim: 0, descending: false, stable: true);
        using (sorted)
        using (order)
        {
            Gpu.Launch(
                "Vocabulary", "embedding_grad", ids.numel(), Gpu.Threads(h, false), sorted, order, dy, Gpu.IsBFloat16(dy), vocab, dw, Gpu.IsBFloat16(dw), ids.numel(),
                vocab.numel(), h);
        }
    }

    /// <summary>z[b s v], labels[b s], vocab[v] -> y[b s].</summary>
    public static void Pick(in KernelCall call)
    {
        Tensor z = call.In(0), y = call.Out().Fill();
        Gpu.Launch(
            "Vocabulary", "pick", Gpu.Blocks(y.numel()), 256, z, Gpu.IsBFloat16(z), call.In(1), call.In(2), y, Gpu.IsBFloat16(y), y.numel(), z.shape[^1]);
    }

    /// <summary>dy[b s], labels[b s], vocab[v] -> dz[b s v].</summary>
    public static void PickGrad(in KernelCall call)
    {
        Tensor dy = call.In(0), dz = call.Out().Fill();
        dz.zero_().On(dz);
        Gpu.Launch(
            "Vocabulary", "pick_grad", Gpu.Blocks(dy.numel()), 256, dy, Gpu.IsBFloat16(dy), call.In(1), call.In(2), dz, Gpu.IsBFloat16(dz), dy.numel(), dz.shape[^1]);
    }
}

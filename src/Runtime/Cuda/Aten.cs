// Operators of LibTorch that TorchSharp does not bind, reached through fixed TorchScript.
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Cuda;

/// <summary>One compiled unit; the source is ours and tested, since one that does not compile would end the process.</summary>
internal static class Aten
{
    // 6 is fp32 and 4 i64, as TorchScript numbers element types. Causal attention without dropout reads neither seed nor offset, and
    // wants undefined tensors for bias and sequence lengths: a gradient that is not asked for is one.
    private const string Source = """
        def grouped_mm(x, w, offsets):
            return torch._grouped_mm(x, w, offsets)

        def mm_wide(a, b):
            return torch.mm(a, b, out_dtype=6)

        def attention(q, k, v, scale: float):
            r = torch._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
            return [r[0], r[1]]

        def undefined():
            x = torch.zeros([0, 1])
            return torch.native_layer_norm_backward(x, x, [1], x, x, None, None, [False, False, False])[0]

        def attention_grad(dout, q, k, v, out, lse, mq: int, mk: int, scale: float):
            none = undefined()
            seed = torch.zeros([], dtype=4, device=q.device)
            offset = seed
            r = torch._scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, lse, seed, offset, none, none, none, mq, mk, 0.0, True, scale=scale)
            return [r[0], r[1], r[2]]

        """;

    private static readonly Lazy<jit.CompilationUnit> Unit = new(static () => jit.compile(Source));

    /// <summary>x[rows k] w[E k n], ends[E] -> [rows n]; x[n rows], w[rows k], ends -> [E n k]. bf16, strides in multiples of 16 bytes.</summary>
    public static Tensor GroupedMm(Tensor x, Tensor w, Tensor ends) => (Tensor)Unit.Value.invoke("grouped_mm", x, w, ends);

    /// <summary>bf16 a[m k] b[k n] -> fp32 [m n].</summary>
    public static Tensor MmWide(Tensor a, Tensor b) => (Tensor)Unit.Value.invoke("mm_wide", a, b);

    /// <summary>Causal attention by cuDNN over [b n s d]: out, log-sum-exp [b n s 1] fp32.</summary>
    public static Tensor[] Attention(Tensor q, Tensor k, Tensor v, double scale) => (Tensor[])Unit.Value.invoke("attention", q, k, v, scale);

    /// <summary>dq, dk, dv.</summary>
    public static Tensor[] AttentionGrad(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor result, Tensor lse, double scale)
        => (Tensor[])Unit.Value.invoke("attention_grad", dout, q, k, v, result, lse, q.shape[2], k.shape[2], scale);
}

// One decoder layer: attention, then a dense feed-forward or a mixture of experts, each added to the residual stream.
// B batch, S seq, H hidden.

namespace DeepSeekGraph.Models;

/// Decoder layers.
public static class Block
{
    /// x + attention(norm(x)), then + feed-forward(norm(x)); `mask`, if any, is 0 for tokens that go to no routed expert.
    public static Tensor Decoder(
        ModelScope m,
        Tensor x_BSH,
        DeepSeekV3Config c,
        bool sparse,
        BalanceTerms? balance = null,
        Tensor? mask_BS = null,
        LatentCache? cache = null)
    {
        var a_BSH = m.RmsNorm("input_layernorm", x_BSH, c.RmsNormEps);
        x_BSH += m.Scope("self_attn", s => Attention.Mla(s, a_BSH, c, cache).Residual());

        var f_BSH = m.RmsNorm("post_attention_layernorm", x_BSH, c.RmsNormEps);
        return x_BSH + m.Scope(
            "mlp",
            s => (sparse ? Experts.Moe(s, f_BSH, c, balance, mask_BS) : s.SwiGlu(f_BSH, c.IntermediateSize)).Residual());
    }
}

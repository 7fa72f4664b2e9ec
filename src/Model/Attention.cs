// Multi-head latent attention (arXiv 2412.19437, section 2.1.1): keys and values come from one small latent.
// B batch, S seq, H hidden, N heads, Q q_lora, L kv_lora, D qk_dim (nope + rope of a head), R rope, V v_dim.

namespace DeepSeekGraph.Models;

/// Attention blocks.
public static class Attention
{
    /// Of the latents' norms: the published code gives rms_norm_eps to the other norms only (it differs in Moonlight).
    private const double LatentEps = 1e-6;

    /// Queries and keys have a part without position (nope) and a rotated one (rope); the rotated key serves all heads.
    public static Tensor Mla(ModelScope m, Tensor x_BSH, DeepSeekV3Config c)
    {
        var table = m.RotaryTable(c.Rotary, x_BSH.Extent("seq"));

        // queries: through their latent, if there is one
        var q_BSND = c.QLoraRank == 0
            ? m.Linear("q_proj", x_BSH, ("heads", c.NumAttentionHeads), ("qk_dim", c.QkHeadDim))
            : m.Linear(
                "q_b_proj",
                m.RmsNorm("q_a_layernorm", m.Linear("q_a_proj", x_BSH, ("q_lora", c.QLoraRank)), LatentEps),
                ("heads", c.NumAttentionHeads),
                ("qk_dim", c.QkHeadDim));
        q_BSND = RotateQueries(q_BSND, table, c);

        // keys and values: one projection makes the latent and the key that is rotated
        var compressed = m.Linear("kv_a_proj_with_mqa", x_BSH, ("kv_a", c.KvLoraRank + c.QkRopeHeadDim));
        var latent_BSL = compressed.Slice("kv_a", 0, c.KvLoraRank).Rename("kv_a", "kv_lora");
        var kPe_BSR = compressed.Slice("kv_a", c.KvLoraRank, c.QkRopeHeadDim).Rename("kv_a", "rope");
        var kv_BSND = m.Linear(
            "kv_b_proj",
            m.RmsNorm("kv_a_layernorm", latent_BSL, LatentEps),
            ("heads", c.NumAttentionHeads),
            ("kv_dim", c.QkNopeHeadDim + c.VHeadDim));
        var k_BSND = RotateKeys(kv_BSND, kPe_BSR, table, c);
        var v_BSNV = kv_BSND.Slice("kv_dim", c.QkNopeHeadDim, c.VHeadDim).Rename("kv_dim", "v_dim");

        var out_BSNV = q_BSND.CausalAttention(k_BSND, v_BSNV, c.SoftmaxScale);
        return m.Linear("o_proj", out_BSNV, ("hidden", x_BSH.Extent("hidden")));
    }

    /// The same, to be added to the residual stream, from the sizes that matter; the hidden size is x's.
    public static Tensor Mla(
        ModelScope m, Tensor x_BSH, int heads, int kvLora, int qLora = 0, int nope = 32, int rope = 16, int value = 32)
        => Mla(m, x_BSH, new DeepSeekV3Config
        {
            NumAttentionHeads = heads,
            KvLoraRank = kvLora,
            QLoraRank = qLora,
            QkNopeHeadDim = nope,
            QkRopeHeadDim = rope,
            VHeadDim = value,
            RopeScaling = null,
        }).Residual();

    // Fusion turns this chain into one op, rope_q.
    private static Tensor RotateQueries(Tensor q_BSND, Tensor table, DeepSeekV3Config c)
    {
        var qNope = q_BSND.Slice("qk_dim", 0, c.QkNopeHeadDim);
        var qPe = q_BSND.Slice("qk_dim", c.QkNopeHeadDim, c.QkRopeHeadDim).Rename("qk_dim", "rope").Rope(table);
        return Tensor.Concat("qk_dim", qNope, qPe.Rename("rope", "qk_dim"));
    }

    // Fusion turns this chain and the slice of the values into one op, rope_kv.
    private static Tensor RotateKeys(Tensor kv_BSND, Tensor kPe_BSR, Tensor table, DeepSeekV3Config c)
    {
        var kNope = kv_BSND.Slice("kv_dim", 0, c.QkNopeHeadDim).Rename("kv_dim", "qk_dim");
        var kPe = kPe_BSR.Rope(table).Broadcast("heads", c.NumAttentionHeads, dim: 2).Rename("rope", "qk_dim");
        return Tensor.Concat("qk_dim", kNope, kPe);
    }
}

// Multi-head latent attention (arXiv 2412.19437, section 2.1.1): keys and values come from one small latent.
// B batch, S seq, H hidden, N heads, Q q_lora, L kv_lora, D qk_dim (nope + rope of a head), R rope, V v_dim.

namespace DeepSeekGraph.Models;

/// Attention blocks.
public static class Attention
{
    /// Of the latents' norms: the published code gives rms_norm_eps to the other norms only (it differs in Moonlight).
    private const double LatentEps = 1e-6;

    /// Queries and keys have a part without position (nope) and a rotated one (rope); the rotated key serves all heads.
    /// With a cache, what later tokens need of these is kept; a decoding pass sees those before its own there.
    public static Tensor Mla(ModelScope m, Tensor x_BSH, DeepSeekV3Config c, LatentCache? cache = null)
    {
        var table = cache is { IsDecoding: true }
            ? m.RotaryTable(c.Rotary, cache.Positions_BS)
            : m.RotaryTable(c.Rotary, x_BSH.Extent("seq"));

        // queries: through their latent, if there is one
        var q_BSND = c.QLoraRank == 0
            ? m.Linear("q_proj", x_BSH, ("heads", c.NumAttentionHeads), ("qk_dim", c.QkHeadDim))
            : m.Linear(
                "q_b_proj",
                m.RmsNorm("q_a_layernorm", m.Linear("q_a_proj", x_BSH, ("q_lora", c.QLoraRank)), LatentEps),
                ("heads", c.NumAttentionHeads),
                ("qk_dim", c.QkHeadDim));

        // keys and values: one projection makes the latent and the key that is rotated
        var compressed = m.Linear("kv_a_proj_with_mqa", x_BSH, ("kv_a", c.KvLoraRank + c.QkRopeHeadDim));
        var latent_BSL = m.RmsNorm(
            "kv_a_layernorm",
            compressed.Slice("kv_a", 0, c.KvLoraRank).Rename("kv_a", "kv_lora"),
            LatentEps);
        var kPe_BSR = compressed.Slice("kv_a", c.KvLoraRank, c.QkRopeHeadDim).Rename("kv_a", "rope");
        var kvUp_NDL = m.Weight(
            "kv_b_proj.weight", m.Normal(),
            ("heads", c.NumAttentionHeads), ("kv_dim", c.QkNopeHeadDim + c.VHeadDim), ("kv_lora", c.KvLoraRank));

        var kept = cache?.Write(m, latent_BSL, kPe_BSR.Rope(table));
        var out_BSNV = cache is { IsDecoding: true }
            ? Absorbed(q_BSND, kvUp_NDL, kept!, cache.Positions_BS, table, c)
            : Expanded(q_BSND, latent_BSL.MatMul(kvUp_NDL), kPe_BSR, table, c);
        return m.Linear("o_proj", out_BSNV, ("hidden", x_BSH.Extent("hidden")));
    }

    /// Every head's keys and values of these tokens, each of which sees those before it.
    private static Tensor Expanded(
        Tensor q_BSND, Tensor kv_BSND, Tensor kPe_BSR, Tensor table, DeepSeekV3Config c)
    {
        var k_BSND = RotateKeys(kv_BSND, kPe_BSR, table, c);
        var v_BSNV = kv_BSND.Slice("kv_dim", c.QkNopeHeadDim, c.VHeadDim).Rename("kv_dim", "v_dim");

        return RotateQueries(q_BSND, table, c).CausalAttention(k_BSND, v_BSNV, c.SoftmaxScale);
    }

    /// The same over the cache, in the space of the latent (arXiv 2405.04434, section 2.1.2): q^T (W l) = (W^T q)^T l, so that
    /// no key or value of a head is ever made; a step costs kv_lora + rope numbers read for each token seen.
    private static Tensor Absorbed(
        Tensor q_BSND, Tensor kvUp_NDL, Tensor cache_BCW, Tensor positions_BS, Tensor table, DeepSeekV3Config c)
    {
        var qNope = q_BSND.Slice("qk_dim", 0, c.QkNopeHeadDim).Rename("qk_dim", "kv_dim");
        var qPe = q_BSND.Slice("qk_dim", c.QkNopeHeadDim, c.QkRopeHeadDim).Rename("qk_dim", "rope").Rope(table);
        var qLatent = qNope.Apply(
            Op.NewContract("batch seq heads kv_dim+, heads kv_dim+ kv_lora -> batch seq heads kv_lora"),
            kvUp_NDL.Slice("kv_dim", 0, c.QkNopeHeadDim));
        var q_BSNW = Tensor.Concat(
            LatentCache.Axis, qLatent.Rename("kv_lora", LatentCache.Axis), qPe.Rename("rope", LatentCache.Axis));
        return q_BSNW
            .Apply(Op.NewCacheAttention(c.SoftmaxScale, c.KvLoraRank), cache_BCW, positions_BS)
            .Apply(
                Op.NewContract("batch seq heads kv_lora+, heads v_dim kv_lora+ -> batch seq heads v_dim"),
                kvUp_NDL.Slice("kv_dim", c.QkNopeHeadDim, c.VHeadDim).Rename("kv_dim", "v_dim"));
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

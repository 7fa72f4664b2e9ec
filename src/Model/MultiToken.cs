// Multi-token prediction (arXiv 2412.19437, section 2.2): one more layer guesses the token after the next.
// B batch, S seq, H hidden.

namespace DeepSeekGraph.Models;

/// Prediction of further tokens.
public static class MultiToken
{
    /// Hidden state of one depth: `h` of the depth before, joined with the embedding of the token that it predicted.
    public static Tensor Depth(
        ModelScope m,
        Tensor h_BSH,
        Tensor ids_BS,
        Tensor table_VH,
        DeepSeekV3Config c,
        BalanceTerms? balance = null,
        Tensor? mask_BS = null)
    {
        var hidden = h_BSH.Extent("hidden");
        var e_BSH = m.Embed(ids_BS, table_VH).Residual();
        var joined = Tensor.Concat(
            "hidden", m.RmsNorm("enorm", e_BSH, c.RmsNormEps), m.RmsNorm("hnorm", h_BSH, c.RmsNormEps));
        var x_BSH = m.Linear("eh_proj", joined.Rename("hidden", "hidden_pair"), ("hidden", hidden)).Residual();

        x_BSH = Block.Decoder(m, x_BSH, c, sparse: true, balance, mask_BS);
        return m.RmsNorm("shared_head.norm", x_BSH, c.RmsNormEps);
    }
}

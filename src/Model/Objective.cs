// Terms of the loss, from primitive ops, so that they split like everything else: cross-entropy and sequence-wise balance.
// B batch, S seq, V vocab, E experts.

namespace DeepSeekGraph.Models;

/// Training objectives.
public static class Objective
{
    /// sum(mask * -log softmax(z)[label]) * scale, in fp32; `scale` is one over the global number of tokens.
    public static Tensor CrossEntropy(ModelScope m, Tensor z_BSV, Tensor labels_BS, Tensor mask_BS, Tensor scale)
    {
        z_BSV = z_BSV.Cast(DType.Float32);
        z_BSV -= z_BSV.Detach().Max("vocab");
        var logSumExp_BS = z_BSV.Exp().Sum("vocab").Log();
        var atLabel_BS = z_BSV.Apply(Op.Pick, labels_BS, m.Iota("vocab", z_BSV.Extent("vocab")));
        return ((logSumExp_BS - atLabel_BS) * mask_BS).Sum("batch", "seq") * scale;
    }

    /// Sequence-wise balance loss of one layer (arXiv 2412.19437, eq. 17-20): alpha * sum_i f_i P_i, averaged over the
    /// sequences of the global batch by their valid tokens; alpha where every expert is chosen equally often.
    /// f_i counts a plain top-k of the affinities, without bias and groups, as eq. 18 says and Megatron does: the term
    /// measures how balanced the affinities themselves are, which the bias would hide. `mask` is 0 for padding, `scale`
    /// is one over the number of valid tokens of the global batch, so that every parallel layout adds up the same number.
    public static Tensor SequenceBalance(
        Tensor affinity_BSE, int topK, double alpha, Tensor mask_BS, Tensor scale)
    {
        var plain = new TopKSpec(topK, groups: 1, keepGroups: 1, zeroMasked: false, GroupScore.BestTwo);
        var chosen_BSE = affinity_BSE.Apply(Op.NewGroupTopK(plain)).Cast(DType.Float32);
        var share_BSE = affinity_BSE / (affinity_BSE.Sum("experts") + Tiny);
        var count_BE = (chosen_BSE * mask_BS).Sum("seq");
        var mass_BE = (share_BSE * mask_BS).Sum("seq");

        // f_i P_i = (E / (K T)) count_i * mass_i / T, and a sequence of T valid tokens weighs T * scale
        var product_B = (count_BE * mass_BE).Sum("experts") / (mask_BS.Sum("seq") + Tiny);
        return product_B.Sum("batch") * scale * (alpha * affinity_BSE.Extent("experts") / topK);
    }

    /// Keeps quotients of nothing by nothing zero: a sequence that is all padding, affinities that underflowed.
    private const double Tiny = 1e-20;
}

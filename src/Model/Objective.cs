// Next-token loss: cross-entropy from primitive ops, so that it splits over the vocabulary like everything else.
// B batch, S seq, V vocab.

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
}

// The sequence-wise balance loss while a model is declared: what its layers share, and their terms.

namespace DeepSeekGraph.Models;

/// Collects the balance terms of one objective's layers, each weighed by the positions that count there.
public sealed class BalanceTerms(double alpha, Tensor mask_BS, Tensor scale)
{
    private readonly List<Tensor> _terms = [];

    /// One term a mixture of experts, in order of declaration.
    public IReadOnlyList<Tensor> Terms => _terms;

    /// Adds the term of the layer being declared, and names it as a part of the metric `balance_loss`.
    public void Add(ModelScope m, Tensor affinity_BSE, int topK)
    {
        if (alpha == 0)
            return;
        var term = m.Scope("balance", _ => Objective.SequenceBalance(affinity_BSE, topK, alpha, mask_BS, scale));
        m.Output("metric:balance_loss", term);
        _terms.Add(term);
    }
}

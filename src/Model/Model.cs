// What users derive from: a model declares its forward pass, and Declare makes the graph of one training step.
// B batch, S seq, V vocab, T tokens (the sequence and what lies behind it).

using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// A model as an immutable value. Override Forward; override Train for another objective.
public abstract record Model
{
    /// Tokens behind the sequence that the objective reads as labels.
    public virtual int ExtraTokens => 1;

    /// Standard deviation of new weights.
    public virtual double InitializerRange => 0.02;

    /// Logits [batch, seq, vocab] of token ids [batch, seq].
    public abstract Tensor Forward(ModelScope m, Tensor ids_BS);

    /// Declares the objective: outputs `loss`, and metrics as `metric:name`. By default the mean next-token loss.
    public virtual void Train(ModelScope m, Tensor tokens_BT, int seqLength)
    {
        var ids_BS = Window(tokens_BT, 0, seqLength);
        var labels_BS = Window(tokens_BT, 1, seqLength);
        var (mask_BS, scale) = Weights(m, "", tokens_BT.Extent("batch"), seqLength);
        var z_BSV = Forward(m, ids_BS).Anchor("logits");
        m.Scope("loss", ModelUnit.Head, s =>
        {
            var loss = Objective.CrossEntropy(s, z_BSV, labels_BS, mask_BS, scale);
            s.Output("loss", loss);
            s.Output("metric:loss", loss);
            return loss;
        });
    }

    /// The model's sizes as `model.key=value` lines, which its plans record.
    public virtual IReadOnlyList<string> Facts => [];

    /// Mistakes of the model's own settings.
    public virtual IReadOnlyList<Diagnostic> Check() => [];

    /// The forward graph of one microbatch; mistakes are thrown together as a DiagnosticException.
    public Graph Declare(int microBatch, int seqLength)
    {
        var mistakes = Check().ToList();
        if (microBatch < 1 || seqLength < 1)
        {
            mistakes.Add(new Diagnostic(
                Codes.BatchIllegal,
                "batch",
                $"the microbatch has {microBatch} sequences of {seqLength} tokens",
                "give 1 or more of both"));
        }

        if (mistakes.Count > 0)
            throw new DiagnosticException(mistakes);

        var declaration = new Declaration { InitStd = InitializerRange };
        var m = new ModelScope(declaration);
        Train(m, m.Input("tokens", DType.Int64, ("batch", microBatch), ("tokens", seqLength + ExtraTokens)), seqLength);
        return declaration.ToGraph();
    }

    /// What every rank of the recipe's cluster will do; mistakes are thrown together as a DiagnosticException.
    public PlanSet Compile(Recipe recipe)
        => Compilation.Compile(DeclareFor(recipe), recipe.WithFacts(Facts));

    /// The same; `observe` sees what each pass leaves, numbered from 1 in the order of Pipeline.passes.
    public PlanSet Compile(Recipe recipe, Action<int, string, Progress> observe)
        => Compilation.Compile(DeclareFor(recipe), recipe.WithFacts(Facts), observe);

    /// The forward graph of one microbatch over all data ranks.
    private Graph DeclareFor(Recipe recipe)
        => Declare(recipe.MicroBatch * Compilation.Mesh(recipe).Data, recipe.SeqLength);

    /// A model from its forward pass alone.
    public static Model Of(Func<ModelScope, Tensor, Tensor> forward) => new Lambda(forward);

    /// `seqLength` tokens from `start` on, as a sequence; cut while the input is whole, so it moves nothing.
    protected static Tensor Window(Tensor tokens_BT, int start, int seqLength)
        => tokens_BT.Slice("tokens", start, seqLength).Rename("tokens", "seq");

    /// What each position counts (1, or 0 for padding), and one over the number that count in the global batch.
    protected static (Tensor Mask, Tensor Scale) Weights(ModelScope m, string objective, int batch, int seqLength)
    {
        var mask_BS = m.Input(
            objective == "" ? "loss_mask" : $"{objective}_mask", DType.Float32, ("batch", batch), ("seq", seqLength));
        var scale = m.Input(objective == "" ? "inv_tokens" : $"inv_{objective}_tokens", DType.Float32);
        return (mask_BS, scale);
    }

    private sealed record Lambda(Func<ModelScope, Tensor, Tensor> Body) : Model
    {
        public override Tensor Forward(ModelScope m, Tensor ids_BS) => Body(m, ids_BS);
    }
}

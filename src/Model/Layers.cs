// The vocabulary of model code: linear layers, norms, embedding, rotation and attention by name, over ops of the graph.

namespace DeepSeekGraph.Models;

/// What models are declared with. Linear layers keep Hugging Face's [out, in] order of weights.
public static class Layers
{
    private static readonly string[] TokenAxes = ["batch", "seq"];

    /// x W^T: contracts every axis of x but batch and seq, makes the axes named in `outputs`.
    public static Tensor Linear(this ModelScope m, string name, Tensor x, params (string Axis, int Extent)[] outputs)
    {
        var inputs = x.Type.Axes.Where(a => !TokenAxes.Contains(a.Name)).Select(a => (a.Name, a.Extent));
        return x.MatMul(m.Weight($"{name}.weight", m.Normal(), [.. outputs, .. inputs]));
    }

    /// RMSNorm over the last axis.
    public static Tensor RmsNorm(this ModelScope m, string name, Tensor x, double eps = 1e-6)
    {
        var last = x.Type.Axes.LastOrDefault(new Axis("hidden", 1));
        return x.Apply(Op.NewRmsNorm(eps), m.Weight($"{name}.weight", Init.Ones, (last.Name, last.Extent)));
    }

    /// SwiGLU feed-forward; gate and up are adjacent, so that one product makes both.
    public static Tensor SwiGlu(this ModelScope m, Tensor x_BSH, int ffn)
    {
        var h_BS2F = m.Linear("gate_up_proj", x_BSH, ("gate_up", 2), ("ffn", ffn));
        return m.Linear("down_proj", h_BS2F.Apply(Op.SwiGlu), ("hidden", x_BSH.Extent("hidden")));
    }

    /// Declares an embedding table and begins the residual stream with the ids' rows of it.
    public static Tensor Embedding(this ModelScope m, string name, Tensor ids_BS, int vocab, int hidden)
        => m.Embed(ids_BS, m.Weight($"{name}.weight", m.Normal(), ("vocab", vocab), ("hidden", hidden))).Residual();

    /// Looks ids up in a table [vocab, hidden].
    public static Tensor Embed(this ModelScope m, Tensor ids_BS, Tensor table_VH)
        => ids_BS.Apply(Op.Embedding, table_VH, m.Iota("vocab", table_VH.Extent("vocab")));

    /// cos and sin of positions 0, 1, ...; the whole model shares one table.
    public static Tensor RotaryTable(this ModelScope m, RotarySpec spec, int seqLength)
        => new ModelScope(m.Declaration).Scope(
            "rotary", ModelUnit.Shared, s => s.Iota("seq", seqLength).Apply(Op.NewRotaryTable(spec)));

    /// cos and sin of positions that differ by sequence [batch, seq]; the whole model shares one table.
    public static Tensor RotaryTable(this ModelScope m, RotarySpec spec, Tensor positions_BS)
        => new ModelScope(m.Declaration).Scope(
            "rotary", ModelUnit.Shared, _ => positions_BS.Apply(Op.NewRotaryTable(spec)));

    /// Rotates feature pairs of the last axis by the position.
    public static Tensor Rope(this Tensor x, Tensor table) => x.Apply(Op.NewRope(inverse: false), table);

    /// softmax(scale q k^T, causal) v.
    public static Tensor CausalAttention(this Tensor q_BSND, Tensor k_BSND, Tensor v_BSNV, double scale)
        => q_BSND.Apply(Op.NewAttention(scale), k_BSND, v_BSNV);

    /// exp(x) over its sum along an axis.
    public static Tensor Softmax(this Tensor x, string axis)
    {
        var e = (x - x.Detach().Max(axis)).Exp();
        return e / e.Sum(axis);
    }

    /// What joins the residual stream; recipes say how it lies (sequence parallel or not).
    public static Tensor Residual(this Tensor x_BSH) => x_BSH.Anchor("residual");

    /// Declares in a unit of the model: pipeline stages are cut between units.
    public static T Layer<T>(this ModelScope m, int index, string name, Func<ModelScope, T> body)
        => m.Scope(name, ModelUnit.NewLayer(index), body);

    /// Start of new weights: normal with the model's standard deviation.
    public static Init Normal(this ModelScope m) => Init.NewNormal(m.Declaration.InitStd);
}

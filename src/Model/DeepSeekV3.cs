// DeepSeek-V3 (arXiv 2412.19437): embedding, decoder layers, multi-token prediction, head and loss.
// B batch, S seq, H hidden, V vocab, T tokens (the sequence, its labels, and one more for each depth of MTP).

namespace DeepSeekGraph.Models;

/// The whole model. Parameters have the names of the published checkpoint.
public sealed record DeepSeekV3(DeepSeekV3Config Config) : Model
{
    /// Also names logits and hidden states as outputs, to compare with other implementations.
    public bool Observe { get; init; }

    /// Declares an input `token_mask` [batch, seq], 1 or 0: tokens at 0 (padding) go to no routed expert, are not counted and
    /// add nothing to balance losses. What attention sees is not masked: padding stands behind a sequence, or fills a row.
    public bool Masked { get; init; }

    public override int ExtraTokens => 1 + Config.NumNextnPredictLayers;

    public override double InitializerRange => Config.InitializerRange;

    public override IReadOnlyList<string> Facts
        => [.. RecordFields.Of(Config).Select(setting => $"model.{setting.Key}={setting.Text}")];

    public override IReadOnlyList<Diagnostic> Check() => ConfigCheck.Check(Config);

    public override Tensor Forward(ModelScope m, Tensor ids_BS)
        => Head(m, Decode(m, ids_BS, Table(m), balance: null, TokenMask(m, ids_BS)), HeadWeight(m));

    /// The main loss, one for each further token that is predicted, and the balance of every mixture of experts.
    public override void Train(ModelScope m, Tensor tokens_BT, int seqLength)
    {
        var batch = tokens_BT.Extent("batch");
        var depths = Config.NumNextnPredictLayers;
        var (table_VH, head_VH) = (Table(m), HeadWeight(m));

        // depth 0 predicts the next token; depth k the one k further, from the state of depth k - 1
        var weights = Weights(m, "", batch, seqLength);
        var tokens_BS = Window(tokens_BT, 0, seqLength);
        var mask_BS = TokenMask(m, tokens_BS);
        var balance = Balance(weights);
        var h_BSH = Decode(m, tokens_BS, table_VH, balance, mask_BS);
        var loss = Loss(m, "", h_BSH, weights, depth: 0);
        m.Output("metric:loss", loss);
        for (var k = 1; k <= depths; k++)
        {
            var (h, ids_BS) = (h_BSH, Window(tokens_BT, k, seqLength));
            var objective = k == 1 ? "mtp" : $"mtp{k}";
            weights = Weights(m, objective, batch, seqLength);
            var depth = Balance(weights);
            h_BSH = m.Scope(
                $"model.layers.{Config.NumHiddenLayers + k - 1}",
                ModelUnit.NewMtp(k - 1),
                s => MultiToken.Depth(s, h, ids_BS, table_VH, Config, depth, mask_BS));
            var extra = Loss(m, objective, h_BSH, weights, k);
            m.Output($"metric:{objective}_loss", extra);
            loss = Total([loss, Config.MtpLossScalingFactor / depths * extra, .. depth.Terms]);
        }

        m.Output("loss", Total([loss, .. balance.Terms]));

        BalanceTerms Balance((Tensor Mask, Tensor Scale) weights)
            => new(Config.SeqAuxLossAlpha, mask_BS is null ? weights.Mask : weights.Mask * mask_BS, weights.Scale);

        Tensor Total(Tensor[] terms)
            => terms.Length == 1 ? terms[0] : m.Scope("loss", ModelUnit.Head, s => s.Apply(Op.Add, terms)[0]);

        Tensor Loss(ModelScope m, string objective, Tensor h_BSH, (Tensor Mask, Tensor Scale) weights, int depth)
        {
            var labels_BS = Window(tokens_BT, depth + 1, seqLength);
            var (mask_BS, scale) = weights;
            var z_BSV = Head(m, h_BSH, head_VH);
            if (Observe)
                m.Output(depth == 0 ? "logits" : $"{objective}_logits", z_BSV);

            return m.Scope(
                "loss", ModelUnit.Head, s => Objective.CrossEntropy(s, z_BSV, labels_BS, mask_BS, scale));
        }
    }

    /// One pass of generation over `seqLength` new tokens of each of `batch` sequences, of at most `places` tokens each: prompts
    /// that begin, or with `decoding` tokens that follow. Inputs: `tokens`, `positions` (below zero: padding), and `last`, 1 at
    /// the one token of each sequence whose successor is asked for; with Masked also `token_mask`. Output `logits` [batch, vocab], fp32. Without MTP.
    public Graph DeclareGeneration(int batch, int seqLength, int places, bool decoding)
    {
        if (Check() is { Count: > 0 } mistakes)
            throw new DiagnosticException(mistakes);
        var declaration = new Declaration { InitStd = InitializerRange };
        var m = new ModelScope(declaration);
        var ids_BS = m.Input("tokens", DType.Int64, ("batch", batch), ("seq", seqLength));
        var positions_BS = m.Input("positions", DType.Int64, ("batch", batch), ("seq", seqLength));
        var last_BS = m.Input("last", DType.Float32, ("batch", batch), ("seq", seqLength));
        var cache = new LatentCache(positions_BS, places, decoding);
        var h_BSH = Decode(m, ids_BS, Table(m), balance: null, TokenMask(m, ids_BS), cache);
        var head_VH = HeadWeight(m);
        m.Scope("lm_head", ModelUnit.Head, s =>
        {
            var z_BV = (h_BSH * last_BS).Sum("seq").MatMul(head_VH).Anchor("logits").Cast(DType.Float32);
            s.Output("logits", z_BV);
            return z_BV;
        });
        return declaration.ToGraph();
    }

    /// Embedding and all decoder layers; the last one ends with the final norm, which head and MTP both read.
    private Tensor Decode(
        ModelScope m,
        Tensor ids_BS,
        Tensor table_VH,
        BalanceTerms? balance,
        Tensor? mask_BS,
        LatentCache? cache = null)
    {
        var c = Config;
        var x_BSH = m.Scope("model.embed_tokens", ModelUnit.Embed, s => s.Embed(ids_BS, table_VH).Residual());
        for (var i = 0; i < c.NumHiddenLayers; i++)
        {
            var (index, x) = (i, x_BSH);
            x_BSH = m.Layer(
                index,
                $"model.layers.{index}",
                s => Block.Decoder(s, x, c, c.IsSparse(index), balance, mask_BS, cache));
            if (Observe)
                m.Output($"hidden_{index + 1}", x_BSH);
        }

        var h_BSH = m.Layer(c.NumHiddenLayers - 1, "model", s => s.RmsNorm("norm", x_BSH, c.RmsNormEps));
        if (Observe)
            m.Output("hidden_last", h_BSH);

        return h_BSH;
    }

    private Tensor? TokenMask(ModelScope m, Tensor ids_BS)
        => Masked
            ? m.Input("token_mask", DType.Float32, ("batch", ids_BS.Extent("batch")), ("seq", ids_BS.Extent("seq")))
            : null;

    /// Logits; multi-token prediction shares the head.
    private static Tensor Head(ModelScope m, Tensor h_BSH, Tensor head_VH)
        => m.Scope("lm_head", ModelUnit.Head, _ => h_BSH.MatMul(head_VH).Anchor("logits"));

    private Tensor Table(ModelScope m)
        => m.Weight(
            "model.embed_tokens.weight", m.Normal(), ("vocab", Config.VocabSize), ("hidden", Config.HiddenSize));

    private Tensor HeadWeight(ModelScope m)
        => m.Weight("lm_head.weight", m.Normal(), ("vocab", Config.VocabSize), ("hidden", Config.HiddenSize));
}

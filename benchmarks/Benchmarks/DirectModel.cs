// The layers of the direct step: each adds its calls to the forward and to the backward list.
using DeepSeekGraph;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;
using Attribute = DeepSeekGraph.Attribute;
using Tensor = TorchSharp.torch.Tensor;

namespace Benchmarks;

internal sealed partial class DirectStep
{
    /// <summary>Calls are listed in forward order; the backward list is reversed when all are there.</summary>
    private void Build()
    {
        int h = _c.HiddenSize, mtp = _c.NumHiddenLayers;
        var inverse = 1.0 / (_plan.Microbatches * _plan.MicroBatch * (double)_seq);
        var (d, dm) = (Scratch("d", h), Scratch("d mtp", h));

        var x = Embedding(_ids[0], d);
        for (var i = 0; i < _c.NumHiddenLayers; i++)
            x = Decoder($"model.layers.{i}", x, d, _c.IsSparse(i), inverse);

        // The final state feeds the head and the next depth, whose gradient comes first.
        var dh = Scratch("d final", h);
        var final = Norm("model.norm", x, d, false, dh, h);
        Head(final, dh, adds: true, 0, _loss, inverse, 1);

        var name = $"model.layers.{mtp}";
        var (de, den, dhn) = (Scratch("d embedded", h), Scratch("d enorm", h), Scratch("d hnorm", h));
        var embedded = Embedding(_ids[1], de);
        var en = Norm($"{name}.enorm", embedded, de, false, den, h);
        var hn = Norm($"{name}.hnorm", final, dh, false, dhn, h);
        var (pair, dPair) = (Value.Tokens(_seq, 2 * h), Scratch("d pair", 2 * h));
        Tensor left = pair.M.narrow(1, 0, h), right = pair.M.narrow(1, h, h);
        Tensor dLeft = dPair.M.narrow(1, 0, h), dRight = dPair.M.narrow(1, h, h);
        _forward.Add(() =>
        {
            left.copy_(en.M);
            right.copy_(hn.M);
        });
        _backward.Add(() =>
        {
            den.M.copy_(dLeft);
            dhn.M.copy_(dRight);
        });
        var y = Linear($"{name}.eh_proj", pair, dPair, false, dm, h);
        y = Decoder(name, y, dm, true, inverse);
        var dLast = Scratch("d last", h);
        var last = Norm($"{name}.shared_head.norm", y, dm, false, dLast, h);
        Head(last, dLast, adds: false, 1, _mtpLoss, inverse, _c.MtpLossScalingFactor);
    }

    private Value Embedding(SlotValue ids, Value d)
    {
        var (w, x) = (_weights["model.embed_tokens.weight"], Value.Tokens(_seq, _c.HiddenSize));
        var grad = Value.Cell(DType.Float32, false, _c.VocabSize, _c.HiddenSize);
        grad.Fill();
        Calls(_forward, KernelId.Embedding, [], [ids, w.Slot, _vocab], x.Slot);
        _backward.Add(() => Add(w.G, grad.Tensor));
        Calls(_backward, KernelId.EmbeddingGrad, [], [ids, d.Slot, _vocab], grad);
        return x;
    }

    /// <summary>Mean cross-entropy; `factor` is its share of the loss.</summary>
    private void Head(Value h, Value dh, bool adds, int depth, Tensor loss, double inverse, double factor)
    {
        var (w, z) = (_weights["lm_head.weight"], Value.Tokens(_seq, _c.VocabSize));
        var labels = _labels[depth];
        var weights = full([_seq, 1], (float)inverse);
        var minus = full([_seq, 1], -1f);
        var share = full([_seq, 1], (float)(inverse * factor));
        _forward.Add(() =>
        {
            Product(z.M, h.M, w.Wt, 0);
            using var logs = z.M.log_softmax(1);
            z.M.copy_(logs);
            using var picked = logs.gather(1, labels);
            using var weighed = picked.mul(weights);
            using var sum = weighed.sum();
            loss.sub_(sum).On(loss);
        });
        _backward.Add(() =>
        {
            z.M.exp_().On(z.M);
            z.M.scatter_add_(1, labels, minus).On(z.M);
            z.M.mul_(share).On(z.M);
            Product(w.G, z.Mt, h.M, 1);
            Product(dh.M, z.M, w.W, adds ? 1 : 0);
        });
    }

    private Value Decoder(string name, Value x, Value d, bool sparse, double inverse)
    {
        int h = _c.HiddenSize, heads = _c.NumAttentionHeads;
        var (da, df, dOut) = (Scratch("da", h), Scratch("df", h), Scratch("d attention", heads, _c.VHeadDim));
        var a = Norm($"{name}.input_layernorm", x, d, true, da, h);
        var attended = Attention($"{name}.self_attn", a, da, dOut);
        var x1 = Residual($"{name}.self_attn.o_proj", x, attended, dOut, d);
        var f = Norm($"{name}.post_attention_layernorm", x1, d, true, df, h);
        return sparse ? Experts($"{name}.mlp", x1, f, df, d, inverse) : Dense($"{name}.mlp", x1, f, df, d, _c.IntermediateSize, null, false);
    }

    private Value Attention(string name, Value a, Value da, Value dOut)
    {
        int heads = _c.NumAttentionHeads, nope = _c.QkNopeHeadDim, rope = _c.QkRopeHeadDim, v = _c.VHeadDim, lora = _c.KvLoraRank;
        int qk = nope + rope;
        var (dqa, dqn, dq, dqr) = (Scratch("dqa", _c.QLoraRank), Scratch("dqn", _c.QLoraRank), Scratch("dq", heads, qk), Scratch("dqr", heads, qk));
        var qa = Linear($"{name}.q_a_proj", a, da, true, dqa, _c.QLoraRank);
        var qn = Norm($"{name}.q_a_layernorm", qa, dqa, false, dqn, _c.QLoraRank);
        var q = Linear($"{name}.q_b_proj", qn, dqn, false, dq, heads, qk);
        var qr = Value.Tokens(_seq, heads, qk);
        Calls(_forward, KernelId.RopeQ, [Attribute.NewInt(0)], [q.Slot, _table.Slot], qr.Slot);
        Calls(_backward, KernelId.RopeQ, [Attribute.NewInt(1)], [dqr.Slot, _table.Slot], dq.Slot);

        var (dkva, dLatent, dPe) = (Scratch("dkva", lora + rope), Scratch("d latent", lora), Scratch("d kpe", rope));
        var kva = Linear($"{name}.kv_a_proj_with_mqa", a, da, false, dkva, lora + rope);
        var (latent, pe) = (Value.Tokens(_seq, lora), Value.Tokens(_seq, rope));
        Tensor first = kva.M.narrow(1, 0, lora), second = kva.M.narrow(1, lora, rope);
        Tensor dFirst = dkva.M.narrow(1, 0, lora), dSecond = dkva.M.narrow(1, lora, rope);
        _forward.Add(() =>
        {
            latent.M.copy_(first);
            pe.M.copy_(second);
        });
        _backward.Add(() =>
        {
            dFirst.copy_(dLatent.M);
            dSecond.copy_(dPe.M);
        });
        var (dln, dkv, dk, dv) = (Scratch("dln", lora), Scratch("dkv", heads, nope + v), Scratch("dk", heads, qk), Scratch("dv", heads, v));
        var ln = Norm($"{name}.kv_a_layernorm", latent, dLatent, false, dln, lora);
        var kv = Linear($"{name}.kv_b_proj", ln, dln, false, dkv, heads, nope + v);
        var (k, values) = (Value.Tokens(_seq, heads, qk), Value.Tokens(_seq, heads, v));
        Calls(_forward, KernelId.RopeKv, [Attribute.NewInt(nope)], [kv.Slot, pe.Slot, _table.Slot], k.Slot, values.Slot);
        Calls(_backward, KernelId.RopeKvGrad, [Attribute.NewInt(nope)], [dk.Slot, dv.Slot, _table.Slot], dkv.Slot, dPe.Slot);

        var (result, lse) = (Value.Tokens(_seq, heads, v), Value.Heads(heads, _seq));
        var scale = Attributes(KernelId.Attention);
        Calls(_forward, KernelId.Attention, scale, [qr.Slot, k.Slot, values.Slot], result.Slot, lse.Slot);
        Calls(
            _backward, KernelId.AttentionGrad, scale,
            [dOut.Slot, qr.Slot, k.Slot, values.Slot, result.Slot, lse.Slot], dqr.Slot, dk.Slot, dv.Slot);
        return result;
    }

    /// <summary>x1 + SwiGLU(f), and `more`.</summary>
    private Value Dense(string name, Value x1, Value f, Value df, Value d, int width, Func<Value>? more, bool adds)
    {
        var (dgu, ds) = (Scratch($"dgu {width}", 2, width), Scratch($"ds {width}", width));
        var gu = Linear($"{name}.gate_up_proj", f, df, adds, dgu, 2, width);
        var s = Value.Tokens(_seq, width);
        Calls(_forward, KernelId.SwiGlu, [], [gu.Slot], s.Slot);
        Calls(_backward, KernelId.SwiGluGrad, [], [ds.Slot, gu.Slot], dgu.Slot);
        return Residual($"{name}.down_proj", x1, s, ds, d, more?.Invoke());
    }

    /// <summary>x1 + routed experts + shared experts, which come first so that their gradient of f adds to the routed ones'.</summary>
    private Value Experts(string name, Value x1, Value f, Value df, Value d, double inverse)
        => Dense(
            $"{name}.shared_experts", x1, f, df, d, _c.NSharedExperts * _c.MoeIntermediateSize,
            () => Routed(name, f, df, d, inverse), true);
}

/// Op -> OpDef: one exhaustive match, no wildcard.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Catalog

open DeepSeekGraph.Ops

/// Everything the compiler knows about an op.
let define (op: Op) : OpDef =
    match op with
    | Op.Parameter(_, t) -> Sources.parameter t
    | Op.Input(_, t) -> Sources.input t
    | Op.Cache(_, t) -> Sources.cache t
    | Op.Constant(_, t) -> Sources.constant t
    | Op.Iota axis -> Sources.iota axis
    | Op.Add -> Elementwise.add
    | Op.Sub -> Elementwise.sub
    | Op.Mul -> Elementwise.mul
    | Op.Div -> Elementwise.div
    | Op.Neg -> Elementwise.neg
    | Op.Exp -> Elementwise.exp
    | Op.Log -> Elementwise.log
    | Op.Rsqrt -> Elementwise.rsqrt
    | Op.Sigmoid -> Elementwise.sigmoid
    | Op.Silu -> Elementwise.silu
    | Op.Scale k -> Elementwise.scale k
    | Op.Offset _ -> Elementwise.offset
    | Op.Cast dtype -> Elementwise.cast dtype
    | Op.Slice(axis, start, length) -> Movement.slice axis start length
    | Op.Pad(axis, before, total) -> Movement.pad axis before total
    | Op.Concat axis -> Movement.concat axis
    | Op.Broadcast(axis, dim) -> Movement.broadcast axis dim
    | Op.Rename(from, into) -> Movement.rename from into
    | Op.Zigzag(axis, ranks, inverse) -> Movement.zigzag axis ranks inverse
    | Op.Fp8Quantize blocks -> Quantization.fp8 blocks
    | Op.Transpose permutation -> Movement.transpose permutation
    | Op.Anchor _ -> Movement.anchor
    | Op.Detach -> Movement.detach
    | Op.Contract spec -> Contraction.contract spec
    | Op.GroupedMatMul transposed -> Contraction.groupedMatMul transposed
    | Op.GroupedWeightGrad -> Contraction.groupedWeightGrad
    | Op.Sum axes -> Reduction.sum axes
    | Op.Max axes -> Reduction.max axes
    | Op.RmsNorm eps -> Normalization.rmsNorm eps
    | Op.RmsNormGradX _ -> Normalization.rmsNormGradX
    | Op.RmsNormGradW _ -> Normalization.rmsNormGradW
    | Op.AddRmsNorm eps -> Normalization.addRmsNorm eps
    | Op.RmsNormGradXAdd _ -> Normalization.rmsNormGradXAdd
    | Op.RotaryTable spec -> Position.rotaryTable spec
    | Op.Rope inverse -> Position.rope inverse
    | Op.RopeQ inverse -> Position.ropeQ inverse
    | Op.RopeKv nope -> Position.ropeKv nope
    | Op.RopeKvGrad nope -> Position.ropeKvGrad nope
    | Op.Attention scale -> Attention.attention scale
    | Op.AttentionGrad _ -> Attention.attentionGrad
    | Op.CacheWrite -> Cache.write
    | Op.CacheAttention(_, value) -> Cache.attention value
    | Op.GroupTopK spec -> Experts.groupTopK spec
    | Op.Router spec -> Experts.router spec
    | Op.RouterGrad _ -> Experts.routerGrad
    | Op.Balance(topK, eps) -> Experts.balance topK eps
    | Op.BalanceGrad _ -> Experts.balanceGrad
    | Op.Route(topK, experts) -> Experts.route topK experts
    | Op.Permute fused -> Experts.permute fused
    | Op.Unpermute fused -> Experts.unpermute fused
    | Op.RouteProbs -> Experts.routeProbs
    | Op.UnrouteProbs -> Experts.unrouteProbs
    | Op.PermuteWithProbs -> Experts.permuteWithProbs
    | Op.UnpermuteWithProbs -> Experts.unpermuteWithProbs
    | Op.SwiGlu -> Gated.swiGlu
    | Op.SwiGluGrad -> Gated.swiGluGrad
    | Op.SwiGluProbs -> Gated.swiGluProbs
    | Op.SwiGluProbsGrad -> Gated.swiGluProbsGrad
    | Op.Embedding -> Vocabulary.embedding
    | Op.EmbeddingGrad -> Vocabulary.embeddingGrad
    | Op.Pick -> Vocabulary.pick
    | Op.PickGrad -> Vocabulary.pickGrad
    | Op.LinearLogSumExp block -> Head.linearLogSumExp block
    | Op.LinearLogSumExpGrad block -> Head.linearLogSumExpGrad block
    | Op.LinearCrossEntropy -> Head.linearCrossEntropy
    | Op.LinearCrossEntropyGrad -> Head.linearCrossEntropyGrad
    | Op.Collective(kind, _, t) -> Collective.collective kind t
    | Op.LocalSlice(_, _, t) -> Collective.localSlice t

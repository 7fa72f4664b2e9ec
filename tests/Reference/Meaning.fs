/// What each op computes, written for obviousness and without regard to speed.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Reference.Meaning

open DeepSeekGraph

/// 1 where an id of operand `ids` equals the id `vocab` lists at v.
let private same (ids: DenseTensor) (vocab: DenseTensor) (token: int[]) v =
    if Dense.at ids token = vocab.Data[v] then 1.0 else 0.0

let private embedding (ids: DenseTensor) (w: DenseTensor) vocab =
    Dense.init [| yield! ids.Extents; w.Extents[1] |] (fun i ->
        List.sum [
            for v in 0 .. w.Extents[0] - 1 -> same ids vocab i[..1] v * Dense.at w [| v; i[2] |]
        ])

let private embeddingGrad (ids: DenseTensor) (dy: DenseTensor) (vocab: DenseTensor) =
    let out = Dense.zeros [| vocab.Data.Length; dy.Extents[2] |]

    Dense.each dy.Extents (fun i ->
        for v in 0 .. vocab.Data.Length - 1 do
            Dense.accumulate out [| v; i[2] |] (same ids vocab i[..1] v * Dense.at dy i))

    out

let private pick (z: DenseTensor) (labels: DenseTensor) (vocab: DenseTensor) =
    Dense.init labels.Extents (fun i ->
        List.sum [
            for v in 0 .. vocab.Data.Length - 1 ->
                if same labels vocab i v = 1.0 then Dense.at z [| i[0]; i[1]; v |] else 0.0
        ])

let private pickGrad (dy: DenseTensor) (labels: DenseTensor) (vocab: DenseTensor) =
    Dense.init [| yield! dy.Extents; vocab.Data.Length |] (fun i -> same labels vocab i[..1] i[2] * Dense.at dy i[..1])

/// z[b, s, v] of hidden states and a head.
let private logits (h: DenseTensor) (w: DenseTensor) =
    Dense.init [| h.Extents[0]; h.Extents[1]; w.Extents[0] |] (fun i ->
        List.sum [
            for k in 0 .. w.Extents[1] - 1 -> Dense.at h [| i[0]; i[1]; k |] * Dense.at w [| i[2]; k |]
        ])

let private linearLogSumExp block (h: DenseTensor) (w: DenseTensor) labels vocab =
    let z = logits h w

    [|
        Dense.init [| h.Extents[0]; h.Extents[1]; w.Extents[0] / block |] (fun i ->
            let part = [
                for v in i[2] * block .. (i[2] + 1) * block - 1 -> Dense.at z [| i[0]; i[1]; v |]
            ]

            let top = List.max part
            top + log (List.sumBy (fun x -> exp (x - top)) part))
        pick z labels vocab
    |]

/// Log-sum-exp of all logits of a token less the label's.
let private linearCrossEntropy (h: DenseTensor) (w: DenseTensor) labels vocab =
    let parts = linearLogSumExp w.Extents[0] h w labels vocab
    Dense.init labels.Extents (fun i -> Dense.at parts[0] [| i[0]; i[1]; 0 |] - Dense.at parts[1] i)

/// dz = exp(z - lse) dlse, and dat at the label.
let private linearLogSumExpGrad block (x: DenseTensor[]) =
    let h, w, labels, vocab, lse, dlse, dat = x[0], x[1], x[2], x[3], x[4], x[5], x[6]
    let z = logits h w
    let atLabel = pickGrad dat labels vocab

    let dz =
        Dense.init z.Extents (fun i ->
            let c = [| i[0]; i[1]; i[2] / block |]
            exp (Dense.at z i - Dense.at lse c) * Dense.at dlse c + Dense.at atLabel i)

    let dh, dw = Dense.zeros h.Extents, Dense.zeros w.Extents

    Dense.each dz.Extents (fun i ->
        for k in 0 .. w.Extents[1] - 1 do
            Dense.accumulate dh [| i[0]; i[1]; k |] (Dense.at dz i * Dense.at w [| i[2]; k |])
            Dense.accumulate dw [| i[2]; k |] (Dense.at dz i * Dense.at h [| i[0]; i[1]; k |]))

    [| dh; dw |]

/// The loss; and dz = (softmax z - 1 at the label) dloss through the head.
let private linearCrossEntropyGrad (x: DenseTensor[]) =
    let h, w, labels, vocab, dloss = x[0], x[1], x[2], x[3], x[4]
    let parts = linearLogSumExp w.Extents[0] h w labels vocab
    let perBlock = Dense.init parts[0].Extents (fun i -> Dense.at dloss i[..1])
    let atLabel = Dense.init dloss.Extents (fun i -> -(Dense.at dloss i))

    [|
        linearCrossEntropy h w labels vocab
        yield! linearLogSumExpGrad w.Extents[0] [| h; w; labels; vocab; parts[0]; perBlock; atLabel |]
    |]

let private sum (rule: Rule) extents x = Dense.product rule 0 extents [| x |]

let private max (rule: Rule) (extents: int[]) (x: DenseTensor) =
    let out = Dense.full extents -infinity

    Dense.each x.Extents (fun i ->
        let kept = [|
            for f in rule.Factors do
                if f.Results[0] >= 0 then
                    i[f.Operands[0]]
        |]

        Dense.update out kept (fun best -> Operators.max best (Dense.at x i)))

    out

/// Results of one op from its operands; `types` are the operands' types, `rule` and `results` what inference says of them.
/// Parameters and inputs are the caller's to supply, collectives are Spmd's.
let apply (op: Op) (types: TensorType[]) (rule: Rule) (results: TensorType[]) (x: DenseTensor[]) : DenseTensor[] =
    let extents = results |> Array.map _.Extents
    let dim (name: string) = types[0].IndexOf name
    let unary f = [| Dense.map f x[0] |]
    let pointwise f = [| Dense.pointwise rule extents[0] f x |]
    let product () = [| Dense.product rule 0 extents[0] x |]

    match op with
    | Op.Parameter _
    | Op.Input _
    | Op.Cache _ -> invalidOp "parameters and inputs are given, not computed"
    | Op.Collective _
    | Op.LocalSlice _ -> invalidOp "a partitioned graph is evaluated by Spmd"
    | Op.Constant(value, _) -> [| Dense.full extents[0] value |]
    | Op.Iota axis -> [| Dense.init [| axis.Extent |] (fun i -> float i[0]) |]
    | Op.Add -> pointwise Array.sum
    | Op.Sub -> pointwise (fun v -> v[0] - v[1])
    | Op.Mul -> pointwise (fun v -> v[0] * v[1])
    | Op.Div -> pointwise (fun v -> v[0] / v[1])
    | Op.Neg -> unary (~-)
    | Op.Exp -> unary exp
    | Op.Log -> unary log
    | Op.Rsqrt -> unary (fun v -> 1.0 / sqrt v)
    | Op.Sigmoid -> unary Formulas.sigmoid
    | Op.Silu -> unary Formulas.silu
    | Op.Scale factor -> unary ((*) factor)
    | Op.Offset addend -> unary ((+) addend)
    | Op.Cast dtype when dtype.IsBool -> unary (fun v -> if v = 0.0 then 0.0 else 1.0)
    | Op.Cast dtype -> if dtype.IsFloat || not types[0].DType.IsFloat then x else unary truncate
    | Op.Anchor _
    | Op.Detach
    | Op.Route _
    | Op.Rename _ -> x
    | Op.Slice(axis, start, length) -> [| Dense.slice (dim axis) start length x[0] |]
    | Op.Pad(axis, before, total) ->
        let d = dim axis

        let zeros extent = Dense.zeros (Array.updateAt d extent x[0].Extents)

        [|
            Dense.concat d [| zeros before; x[0]; zeros (total - before - x[0].Extents[d]) |]
        |]
    | Op.Concat axis -> [| Dense.concat (dim axis) x |]
    | Op.Zigzag(axis, ranks, inverse) ->
        let d = types[0].IndexOf axis
        let blocks = Array.init (2 * ranks) (fun i -> Dense.block d i (2 * ranks) x[0])

        let order = [|
            for r in 0 .. ranks - 1 do
                yield r
                yield 2 * ranks - 1 - r
        |]

        [|
            (if inverse then
                 Array.init (2 * ranks) (fun i -> blocks[System.Array.IndexOf(order, i)])
             else
                 order |> Array.map (fun i -> blocks[i]))
            |> Dense.concat d
        |]
    | Op.Broadcast(_, d) -> [| Dense.init extents[0] (fun i -> Dense.at x[0] (Array.removeAt d i)) |]
    | Op.Fp8Quantize blocks -> [| Quantization.fp8 (Array.ofList blocks) x[0] |]
    | Op.Transpose permutation -> [|
        Dense.init extents[0] (fun i ->
            let index = Array.zeroCreate i.Length
            permutation |> List.iteri (fun result d -> index[d] <- i[result])
            Dense.at x[0] index)
      |]
    // a route is 1 where its rows are, so it is one more factor
    | Op.Contract _
    | Op.GroupedMatMul _
    | Op.GroupedWeightGrad
    | Op.Permute _
    | Op.Unpermute _
    | Op.RouteProbs
    | Op.UnrouteProbs -> product ()
    | Op.PermuteWithProbs -> [|
        Dense.init extents[0] (fun i -> Dense.at x[0] [| i[0]; i[1]; i[3] |] * Dense.at x[2] i[..2])
        Dense.map2 (*) x[1] x[2]
      |]
    | Op.UnpermuteWithProbs ->
        let experts = x[0].Extents[2]

        [|
            Dense.init extents[0] (fun i ->
                List.sum [
                    for e in 0 .. experts - 1 ->
                        Dense.at x[0] [| i[0]; i[1]; e; i[2] |] * Dense.at x[2] [| i[0]; i[1]; e |]
                ])
            Dense.map2 (*) x[1] x[2]
        |]
    | Op.Sum _ -> [| sum rule extents[0] x[0] |]
    | Op.Max _ -> [| max rule extents[0] x[0] |]
    | Op.RmsNorm eps -> [| Formulas.rmsNorm eps x[0] x[1] |]
    | Op.RmsNormGradX eps -> [| Formulas.rmsNormGradX eps x[0] x[1] x[2] |]
    | Op.RmsNormGradW eps -> [| Formulas.rmsNormGradW eps x[0] x[1] |]
    | Op.AddRmsNorm eps ->
        let sum = Dense.add x[0] x[1]
        [| sum; Formulas.rmsNorm eps sum x[2] |]
    | Op.RmsNormGradXAdd eps -> [| Dense.add (Formulas.rmsNormGradX eps x[0] x[1] x[2]) x[3] |]
    | Op.RotaryTable spec -> [| Formulas.rotaryTable spec x[0] |]
    | Op.Rope inverse when types[1].Rank = 3 -> [| Formulas.ropeEach inverse x[0] x[1] |]
    | Op.Rope inverse -> [| Formulas.rope inverse (dim types[1].Axes[0].Name) x[0] x[1] |]
    | Op.RopeQ inverse -> [| Formulas.rope inverse 1 x[0] x[1] |]
    | Op.RopeKv nope -> Formulas.ropeKv nope x[0] x[1] x[2]
    | Op.RopeKvGrad nope -> Formulas.ropeKvGrad nope x[0] x[1] x[2]
    | Op.Attention scale -> Formulas.attention scale x[0] x[1] x[2] (Array.tryItem 3 x)
    | Op.AttentionGrad scale -> Formulas.attentionGrad scale x[0] x[1] x[2] x[3] x[4] x[5] (Array.tryItem 6 x)
    | Op.CacheWrite -> [| Formulas.cacheWrite x[0] x[1] x[2] |]
    | Op.CacheAttention(scale, value) -> [| Formulas.cacheAttention scale value x[0] x[1] x[2] |]
    | Op.GroupTopK spec -> [| Formulas.groupTopK spec x[0] |]
    | Op.Router spec -> Formulas.router spec x[0] x[1]
    | Op.RouterGrad spec -> [| Formulas.routerGrad spec x[0] x[1] x[2] |]
    | Op.Balance(topK, eps) -> Formulas.balance topK eps x[0] x[1]
    | Op.BalanceGrad eps -> [| Formulas.balanceGrad eps x[0] x[1] x[2] |]
    | Op.SwiGlu -> [| Formulas.swiGlu x[0] None |]
    | Op.SwiGluGrad -> [| fst (Formulas.swiGluGrad x[0] x[1] None) |]
    | Op.SwiGluProbs -> [| Formulas.swiGlu x[0] (Some x[1]) |]
    | Op.SwiGluProbsGrad ->
        let dx, dp = Formulas.swiGluGrad x[0] x[1] (Some x[2])
        [| dx; dp |]
    | Op.Embedding -> [| embedding x[0] x[1] x[2] |]
    | Op.EmbeddingGrad -> [| embeddingGrad x[0] x[1] x[2] |]
    | Op.Pick -> [| pick x[0] x[1] x[2] |]
    | Op.LinearLogSumExp block -> linearLogSumExp block x[0] x[1] x[2] x[3]
    | Op.LinearLogSumExpGrad block -> linearLogSumExpGrad block x
    | Op.LinearCrossEntropy -> [| linearCrossEntropy x[0] x[1] x[2] x[3] |]
    | Op.LinearCrossEntropyGrad -> linearCrossEntropyGrad x
    | Op.PickGrad -> [| pickGrad x[0] x[1] x[2] |]

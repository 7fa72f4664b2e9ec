/// Where bf16, where fp32: matrices and activations in the recipe's type, islands in fp32.
/// before: everything fp32 as declared; after: casts at the borders. Law: in fp32 the graph is unchanged. Cost: one cast per border.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Precision

open DeepSeekGraph

/// What an op wants of its floating operands.
[<RequireQualifiedAccess>]
type private Want =
    /// fp32 whatever comes.
    | Wide
    /// One type: fp32 if any operand is.
    | Common
    /// The first two as one type (weights, rows); the rest as it is.
    | CommonPair
    | AsIs

let private want (op: Op) =
    match op with
    // exponentials, logarithms, gates and selections (the fp32 islands of Megatron)
    | Op.Exp
    | Op.Log
    | Op.Rsqrt
    | Op.Sigmoid
    | Op.Max _
    | Op.GroupTopK _
    | Op.Router _
    | Op.RouterGrad _
    | Op.Balance _
    | Op.BalanceGrad _
    | Op.Pick
    | Op.PickGrad -> Want.Wide
    | Op.Add
    | Op.Sub
    | Op.Mul
    | Op.Div
    | Op.Concat _
    | Op.Contract _
    | Op.RmsNorm _
    | Op.RmsNormGradX _
    | Op.RmsNormGradW _
    | Op.AddRmsNorm _
    | Op.RmsNormGradXAdd _
    | Op.Attention _
    | Op.RopeKvGrad _ -> Want.Common
    | Op.LinearLogSumExp _
    | Op.LinearLogSumExpGrad _
    | Op.LinearCrossEntropy
    | Op.LinearCrossEntropyGrad
    | Op.GroupedMatMul _
    | Op.GroupedWeightGrad
    | Op.RopeKv _
    | Op.SwiGluGrad
    | Op.SwiGluProbsGrad -> Want.CommonPair
    | Op.Parameter _
    | Op.Input _
    | Op.Cache _
    | Op.CacheWrite
    | Op.CacheAttention _
    | Op.Constant _
    | Op.Iota _
    | Op.Neg
    | Op.Silu
    | Op.Scale _
    | Op.Offset _
    | Op.Cast _
    | Op.Slice _
    | Op.Pad _
    | Op.Broadcast _
    | Op.Rename _
    | Op.Transpose _
    | Op.Fp8Quantize _
    | Op.Zigzag _
    | Op.Anchor _
    | Op.Detach
    | Op.Sum _
    | Op.RotaryTable _
    | Op.Rope _
    | Op.RopeQ _
    | Op.AttentionGrad _
    | Op.Route _
    | Op.Permute _
    | Op.Unpermute _
    | Op.RouteProbs
    | Op.UnrouteProbs
    | Op.PermuteWithProbs
    | Op.UnpermuteWithProbs
    | Op.SwiGlu
    | Op.SwiGluProbs
    | Op.Embedding
    | Op.EmbeddingGrad
    | Op.Collective _
    | Op.LocalSlice _ -> Want.AsIs

let private cast (rebuild: Rewrite.Rebuild) (node: Node) dtype (value: int) =
    let t = rebuild.Builder.Type value

    if t.DType.IsFloat && t.DType <> dtype then
        rebuild.Builder.Add(Op.Cast dtype, [ value ], node.Origin)[0]
    else
        value

let private step (compute: DType) (rebuild: Rewrite.Rebuild) (node: Node) =
    let inputs = [ for v in node.Inputs -> rebuild[v] ]
    let floats = inputs |> List.map rebuild.Builder.Type |> List.filter _.DType.IsFloat

    let common (ts: TensorType list) =
        if ts |> List.exists (fun t -> t.DType = DType.Float32) then DType.Float32 else compute

    match node.Op, want node.Op with
    | Op.Parameter(spec, t), _ when spec.Update.IsAdamW && not spec.KeepFloat32 ->
        rebuild.Put(node, Op.Parameter(spec, { t with DType = compute }), [])
    // what attention would read of an ordinary forward pass has this type too
    | Op.Cache(name, t), _ -> rebuild.Put(node, Op.Cache(name, { t with DType = compute }), [])
    | _, Want.Wide -> rebuild.Put(node, node.Op, inputs |> List.map (cast rebuild node DType.Float32))
    | _, Want.Common -> rebuild.Put(node, node.Op, inputs |> List.map (cast rebuild node (common floats)))
    | _, Want.CommonPair ->
        let pair = common (List.truncate 2 floats)
        let cast i v = if i < 2 then cast rebuild node pair v else v
        rebuild.Put(node, node.Op, List.mapi cast inputs)
    | _, Want.AsIs -> rebuild.Copy node

/// Rewrites a forward graph to compute in `compute`.
let run (compute: DType) (graph: Graph) : Graph =
    if compute = DType.Float32 then graph else graph |> Rewrite.fold (step compute)

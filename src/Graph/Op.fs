/// The closed union of ops: identity and attributes, nothing else.
namespace DeepSeekGraph

/// Rotary embedding with YaRN (arXiv 2309.00071); Factor 1 means plain RoPE.
type RotarySpec = {
    /// Rotated features (even).
    Dim: int
    Theta: float
    Factor: float
    /// Context length before scaling.
    Original: float
    BetaFast: float
    BetaSlow: float
    /// Multiplier of cos and sin: mscale(factor, mscale) / mscale(factor, mscale_all_dim).
    Mscale: float
}

/// What a router's logits become: each by itself (DeepSeek-V3), or shares of all experts (DeepSeek-V2).
[<RequireQualifiedAccess>]
type ScoreFunction =
    | Sigmoid
    | Softmax

/// What a group of experts scores.
[<RequireQualifiedAccess>]
type GroupScore =
    /// The sum of its two best (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    | BestTwo
    /// Its best (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
    | Best

/// Group-limited top-k: the best experts of the best groups.
type TopKSpec = {
    TopK: int
    Groups: int
    KeepGroups: int
    /// Unselected groups score zero (Hugging Face) instead of minus infinity.
    ZeroMasked: bool
    GroupScore: GroupScore
}

/// A router in one op: scores, biased choice, and the weights of the chosen.
type RouterSpec = {
    Score: ScoreFunction
    Choice: TopKSpec
    /// Weights of a token's experts are divided by their sum plus Eps.
    Normalize: bool
    Eps: float
    /// Multiplies the weights (routed scaling factor).
    Factor: float
}

/// A parameter as declared: how it starts and how it changes.
type ParameterSpec = {
    Name: string
    Init: Init
    Update: Update
    /// Used in fp32 whatever the compute type (router weights, biases).
    KeepFloat32: bool
}

/// What a node computes. Shapes and attributes of each: KernelId, case of the same name.
[<RequireQualifiedAccess>]
type Op =
    // sources
    | Parameter of Spec: ParameterSpec * Type: TensorType
    | Input of Name: string * Type: TensorType
    /// What is kept from one run of a plan to the next; the graph computes its next value by CacheWrite.
    | Cache of Name: string * Type: TensorType
    | Constant of Value: float * Type: TensorType
    /// 0, 1, 2, ... along one axis; a split gives each rank its global indices.
    | Iota of Axis: Axis
    // elementwise; the second operand's axes are a subset of the first's, matched by name
    | Add
    | Sub
    | Mul
    | Div
    | Neg
    | Exp
    | Log
    | Rsqrt
    | Sigmoid
    | Silu
    | Scale of Factor: float
    | Offset of Addend: float
    | Cast of DType: DType
    // movement
    | Slice of Axis: string * Start: int * Length: int
    | Pad of Axis: string * Before: int * Total: int
    | Concat of Axis: string
    /// A new axis in front of dim `Dim` of the operand.
    | Broadcast of Axis: Axis * Dim: int
    | Rename of From: string * To: string
    | Transpose of Permutation: int list
    /// Blocks 0, 2R-1, 1, 2R-2, ... of an axis cut into 2R: each of R ranks gets one early and one late block. Inverse: back.
    | Zigzag of Axis: string * Ranks: int * Inverse: bool
    /// Identity whose result must lie as the recipe says for this anchor ("residual", ...).
    | Anchor of Name: string
    /// Identity without gradient.
    | Detach
    // contraction
    /// Two operands, one result, in the axis language: "b s k+, n k+ -> b s n".
    | Contract of Spec: string
    /// rows, weight bank [experts, out, in], route; Transposed: contracts `out` instead of `in`.
    | GroupedMatMul of Transposed: bool
    | GroupedWeightGrad
    /// Rounded to E4M3 and back, each block with a scale of its own; block extents by dim, 1: an index for itself.
    | Fp8Quantize of Blocks: int list
    // reduction
    | Sum of Axes: string list
    | Max of Axes: string list
    // normalisation over the last axis
    | RmsNorm of Eps: float
    | RmsNormGradX of Eps: float
    | RmsNormGradW of Eps: float
    /// x + r, and its norm.
    | AddRmsNorm of Eps: float
    /// RmsNormGradX plus a cotangent that comes another way.
    | RmsNormGradXAdd of Eps: float
    // position
    | RotaryTable of Spec: RotarySpec
    | Rope of Inverse: bool
    | RopeQ of Inverse: bool
    | RopeKv of Nope: int
    | RopeKvGrad of Nope: int
    // attention
    | Attention of Scale: float
    | AttentionGrad of Scale: float
    /// cache, new rows, positions: the cache with the rows of the tokens at these positions.
    | CacheWrite
    /// Attention over cached rows [batch, cache, features], of which the first `Value` are summed.
    | CacheAttention of Scale: float * Value: int
    // experts
    | GroupTopK of Spec: TopKSpec
    /// Logits and bias to probabilities, mask and tokens per expert.
    | Router of Spec: RouterSpec
    | RouterGrad of Spec: RouterSpec
    /// Logits and weights of positions to how often experts are chosen (plain top-k) and their share of affinity, by sequence.
    | Balance of TopK: int * Eps: float
    | BalanceGrad of Eps: float
    /// The row set of a mask; TopK of Experts rows a token. The mask may cover a part of the experts.
    | Route of TopK: int * Experts: int
    | Permute of Fused: bool
    | Unpermute of Fused: bool
    | RouteProbs
    | UnrouteProbs
    | PermuteWithProbs
    | UnpermuteWithProbs
    // gated units
    | SwiGlu
    | SwiGluGrad
    | SwiGluProbs
    | SwiGluProbsGrad
    // vocabulary
    | Embedding
    | EmbeddingGrad
    | Pick
    | PickGrad
    /// Logits of a linear head as log-sum-exps of blocks of the vocabulary, and at the label: no logits leave the op.
    | LinearLogSumExp of Block: int
    | LinearLogSumExpGrad of Block: int
    /// Cross-entropy of a linear head whose vocabulary is whole: the loss of each token, and no logits.
    | LinearCrossEntropy
    /// Its gradient, and the loss once more: both come from the same logits.
    | LinearCrossEntropyGrad
    // after partition; Axes are mesh axes, Type is the local result
    | Collective of Collective: Collective * Axes: int list * Type: TensorType
    /// This rank's block of a dim.
    | LocalSlice of Dim: int * Axes: int list * Type: TensorType

/// The closed list of kernels a runtime must provide, with the shapes and attributes of each.
namespace DeepSeekGraph

open System.Collections.Generic

/// An attribute of a launch: numbers, or a word of a closed grammar; never a path, a program or free text.
[<RequireQualifiedAccess>]
type Attribute =
    | Int of Value: int64
    | Float of Value: float
    | Ints of Values: IReadOnlyList<int64>
    | Text of Value: string

/// What a launch computes. Shapes are local (one rank's shard), attributes in the order written here.
/// "rows": a data-dependent first dim that stands for (batch, seq, expert); a "route" is the row set itself.
/// "off": Ints of mesh axes that split the dim, slowest last; the kernel adds coordinate x local extent.
/// Dims in attributes are logical: of a routed value, 0, 1 and 2 are its one stored row dim. Results are new memory, never views.
/// "path": a word, library or exact, which code a GPU runs (KernelPath); of the kernels that have two, the last attribute.
type KernelId =
    // sources
    /// -> out; Float value. Every element is `value`.
    | Full = 0
    /// -> out[n] i64; Ints off. off, off + 1, ...
    | Iota = 1
    // elementwise; binary kernels take Ints dims: position in a's dims of each dim of b
    /// a1, ..., an -> out (same shapes)
    | Add = 10
    | Sub = 11
    | Mul = 12
    | Div = 13
    | Neg = 14
    | Exp = 15
    | Log = 16
    | Rsqrt = 17
    | Sigmoid = 18
    | Silu = 19
    /// a -> out; Float factor
    | Scale = 20
    /// a -> out; Float addend
    | Offset = 21
    /// a -> out; the output's element type decides
    | Cast = 22
    // movement
    /// a -> out; Int dim, Int start, Int length
    | Slice = 30
    /// a -> out; Int dim, Int before, Int total. Zeros around a.
    | Pad = 31
    /// a1, ..., an -> out; Int dim
    | Concat = 32
    /// a -> out; Int dim (of out), Int extent. A new dim, repeated.
    | Broadcast = 33
    /// a -> out; Int dim, Ints off: this rank's block of the dim. Rows (with their route as second input) and routes: by dim 2, the experts.
    | LocalSlice = 34
    /// a -> out; Ints permutation (out dim i is a's dim p[i])
    | Transpose = 35
    /// a -> out; Int dim, Int ranks, Int inverse: blocks 0, 2R-1, 1, 2R-2, ... of 2R; inverse: back
    | Zigzag = 36
    // contraction
    /// a, b -> out; Text spec such as "b s k+, n k+ -> b s n"
    | Contract = 40
    /// x[rows k], w[E n k], route -> out[rows n]; Int transposed (1: w[E k n]), Text path; rows may have several trailing dims
    | GroupedMatMul = 41
    /// dy[rows n], x[rows k], route -> dw[E n k]; Text path
    | GroupedWeightGrad = 42
    /// a -> out; Ints block extents by dim. E4M3 and back: per block scale = max|a| / 448 in fp32, out = e4m3(a / scale) * scale,
    /// to nearest even, saturating. A block of zeros stays; one that holds NaN or infinity becomes NaN.
    | Fp8Quantize = 43
    // reduction: Ints dims
    | Sum = 50
    | Max = 51
    // normalisation (last dim): Float eps; fp32 inside, output type of x
    /// x, w -> y
    | RmsNorm = 60
    /// dy, x, w -> dx
    | RmsNormGradX = 61
    /// dy, x -> dw
    | RmsNormGradW = 62
    /// fused: x, r, w -> sum = x + r (rounded as stored), norm of the sum
    | AddRmsNorm = 63
    /// fused: dy, x, w, c -> dx + c, rounded once
    | RmsNormGradXAdd = 64
    // position
    /// positions[s] or [b s] i64 -> table[s, rope] or [b s, rope] fp32 (cos of rope/2 frequencies, then sin); Ints: rope; then Float theta, Float factor, Float original, Float betaFast, Float betaSlow, Float mscale (cos/sin multiplier); factor 1: no YaRN
    | RotaryTable = 70
    /// x[b s ... rope], table[s rope] or [b s rope] -> y; Int inverse (1: rotate back). Pairs (x0, x1), (x2, x3), ... stay in place.
    | Rope = 71
    /// q[b s n d], table -> q with the last `rope` features of each head rotated; Int inverse
    | RopeQ = 72
    /// kv[b s n nope+v], kPe[b s rope], table -> k[b s n nope+rope], v[b s n v]; Int nope
    | RopeKv = 73
    /// dk[b s n nope+rope], dv[b s n v], table -> dkv[b s n nope+v], dkPe[b s rope] (summed over heads); Int nope
    | RopeKvGrad = 74
    // attention: Float scale; causal; fp32 softmax; of the first two, Text path. Optional last operand positions[s] i64: query i sees keys 0..positions[i]
    /// q[b s n d], k[b t n d], v[b t n e] (, positions) -> out[b s n e], lse[b n s] fp32
    | Attention = 80
    /// dout, q, k, v, out, lse (, positions) -> dq, dk, dv
    | AttentionGrad = 81
    // what generation keeps of the tokens seen
    /// cache[b c w], new[b s w], positions[b s] i64 -> cache, in place: row p of the cache is the token at position p; positions below
    /// zero and beyond the cache are not written
    | CacheWrite = 82
    /// q[b s n w], cache[b c w], positions[b s] i64 -> out[b s n v]; Float scale, Int v: softmax over rows 0..position of scale q cache^T,
    /// times the first v features of the rows; zero where the position is below zero
    | CacheAttention = 83
    // experts
    /// scores[b s e] fp32 (bias added) -> mask[b s e] bool; Int topK, Int groups, Int keepGroups, Int zeroMasked (1: unselected groups score 0 instead of -inf), Int best (1: a group scores its best instead of the sum of its two best). Ties: lowest index.
    | GroupTopK = 90
    /// fused: logits[b s e], bias[e] fp32 -> p[b s e] fp32, mask[b s e] bool, counts[e] i64; attributes of GroupTopK, then Int normalize, Float eps, Float factor, Int softmax. s = sigmoid(logits), or softmax over e; mask = GroupTopK(s + bias); p = factor s mask, if normalize over (its sum over e + eps)
    | Router = 100
    /// fused: dp[b s e], logits, mask -> dlogits; attributes of Router
    | RouterGrad = 101
    /// fused: logits[b s e], w[b s] fp32 -> counts[b e], shares[b e] fp32; Int topK, Float eps. counts = sum over s of w where e is among a token's topK; shares = sum over s of w sigmoid(logits) / (its sum over e + eps)
    | Balance = 102
    /// fused: dshares[b e], logits, w -> dlogits; Float eps
    | BalanceGrad = 103
    /// mask[b s e] -> route: rows ordered by expert, then by token; Int topK, Int experts (of all ranks): rows expected
    | Route = 91
    /// x[b s h], route -> rows[rows h]
    | Permute = 92
    /// rows[rows h], route -> y[b s h]: sum of a token's rows
    | Unpermute = 93
    /// p[b s e], route -> rows[rows]
    | RouteProbs = 94
    /// r[rows], route -> p[b s e], zero where nothing is routed
    | UnrouteProbs = 95
    /// fused: x[b s h], p[b s e], route -> rows[rows h], r[rows]; one pass
    | PermuteWithProbs = 96
    /// fused: rows[rows h], r[rows], route -> y[b s h], p[b s e]; one pass
    | UnpermuteWithProbs = 97
    /// fused: as Permute, one pass over memory
    | PermuteFused = 98
    /// fused: as Unpermute, one pass over memory: each token gathers its rows
    | UnpermuteFused = 99
    // gated units: x[... 2 f] holds gate then up
    /// x[... 2 f] -> y[... f] = silu(gate) * up
    | SwiGlu = 110
    /// dy[... f], x[... 2 f] -> dx[... 2 f]
    | SwiGluGrad = 111
    /// x[... 2 f], p[...] -> y[... f] = silu(gate) * up * p (fp32 inside)
    | SwiGluProbs = 112
    /// dy[... f], x[... 2 f], p[...] -> dx[... 2 f], dp[...]
    | SwiGluProbsGrad = 113
    // vocabulary: ids[v] are the global ids of the rank's slice, consecutive
    /// ids[b s] i64, w[v h], vocab[v] i64 -> y[b s h]; rows of absent ids are zero
    | Embedding = 120
    /// ids[b s], dy[b s h], vocab[v] -> dw[v h]
    | EmbeddingGrad = 121
    /// z[b s v], labels[b s] i64, vocab[v] -> y[b s]: z at the label, zero when absent
    | Pick = 122
    /// dy[b s], labels[b s], vocab[v] -> dz[b s v]
    | PickGrad = 123
    /// fused: h[b s k], w[v k], labels[b s] i64, vocab[v] i64 -> lse[b s c], at[b s] fp32; Int block: v = c block. lse: log-sum-exp of each block's logits h w^T; at: the label's logit, zero when absent
    | LinearLogSumExp = 124
    /// fused: h, w, labels, vocab, lse, dlse[b s c], dat[b s] -> dh[b s k], dw[v k]; Int block. Logits are computed again, a block at a time
    | LinearLogSumExpGrad = 125
    /// fused: h[b s k], w[v k], labels[b s] i64, vocab[v] i64 -> loss[b s] fp32: log-sum-exp of the logits h w^T less the label's, which counts as zero when absent; a chunk of tokens at a time
    | LinearCrossEntropy = 126
    /// fused: h, w, labels, vocab, dloss[b s] fp32 -> loss[b s] fp32, dh[b s k], dw[v k] fp32; a chunk of tokens at a time, dw summed over them
    | LinearCrossEntropyGrad = 127
    // step
    /// -> out: zeros
    | Zero = 130
    /// a -> out: out += a (out i64, or fp32 or bf16: added in fp32, rounded to nearest even)
    | Accumulate = 131
    /// g1, ..., gn -> out[] fp32: sum of squares, in operand order, fp64 inside
    | SumSquares = 132
    /// sumsq[], -> norm[], scale[]; Float maxNorm: scale = min(1, maxNorm / (norm + 1e-6))
    | ClipScale = 133
    /// grad, scale[], lr[], step[] -> master, m, v, param (in place; param may be a temporary shard); Float beta1, beta2, eps, decay
    /// grad, m, v, param fp32 or bf16, master fp32; fp32 inside, rounded to nearest even. Or with a remainder for the master:
    /// grad, scale[], lr[], step[], weight -> remainder, m, v, param: the fp32 master's bits are (weight << 16) + remainder, and so of
    /// the updated one. weight and param bf16 (the old and the new, or one slot), remainder i16: the low half, signed. So the weight is
    /// the master's nearest bf16, and of two equally near (a low half of 8000) the one away from zero. A NaN is kept as 7FC0, 0
    | AdamW = 134
    /// counts[e] i64 -> bias[e] fp32 in place; Float rate: bias += rate * sign(mean(counts) - counts)
    | RouterBias = 135

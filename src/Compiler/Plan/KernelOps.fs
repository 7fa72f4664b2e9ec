/// Ops to kernels and back: which launch computes an op, and which op a launch computes.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.KernelOps

open System.Collections.Generic
open DeepSeekGraph

let private int (n: int) = Attribute.Int(int64 n)
let private float (x: float) = Attribute.Float x
let private flag (b: bool) = Attribute.Int(if b then 1L else 0L)
let private ints (values: int seq) = Attribute.Ints(values |> Seq.map int64 |> Array.ofSeq)

/// Attribute `off` of a dim: the mesh axes that split it, slowest last.
let offsets (layout: IReadOnlyList<AxisState>) (dim: int) : Attribute =
    ints (
        seq {
            for axis in 0 .. layout.Count - 1 do
                if layout[axis] = AxisState.Split dim then
                    axis
        }
    )

/// Position in a's dims of each dim of b.
let private dims (a: TensorType) (b: TensorType) = b.Names |> Array.map a.IndexOf

let private binary kernel (inputs: TensorType[]) = Some(kernel, [ ints (dims inputs[0] inputs[1]) ])

let private addAttributes (inputs: TensorType[]) =
    let whole = [| 0 .. inputs[0].Rank - 1 |]

    match inputs |> Array.tryFind (fun t -> dims inputs[0] t <> whole) with
    | None -> []
    | Some other -> [ ints (dims inputs[0] other) ]

let private choice (s: TopKSpec) = [
    int s.TopK
    int s.Groups
    int s.KeepGroups
    flag s.ZeroMasked
    flag s.GroupScore.IsBest
]

let private routing (s: RouterSpec) =
    choice s.Choice @ [ flag s.Normalize; float s.Eps; float s.Factor; flag s.Score.IsSoftmax ]

/// The launch of an op: kernel and attributes; none for what needs no kernel (aliases, sources that are slots, collectives).
/// An iota is given as whole: for one that is split, its attribute is `offsets layout 0`. `attention`: which code a GPU runs for it.
let ofOp
    (attention: AttentionBackend)
    (op: Op)
    (inputs: TensorType[])
    (outputs: TensorType[])
    : (KernelId * Attribute list) option =
    let dim name = int (inputs[0].IndexOf name)
    let plain kernel = Some(kernel, [])

    let onPath kernel attributes =
        let path = KernelPaths.choose attention kernel inputs outputs
        Some(kernel, attributes @ [ Attribute.Text path.Name ])

    match op with
    | Op.Parameter _
    | Op.Input _
    | Op.Cache _
    | Op.Rename _
    | Op.Anchor _
    | Op.Detach
    | Op.Collective _ -> None
    | Op.Constant(value, _) -> Some(KernelId.Full, [ float value ])
    | Op.Iota _ -> Some(KernelId.Iota, [ ints [] ])
    | Op.Add -> Some(KernelId.Add, addAttributes inputs)
    | Op.Sub -> binary KernelId.Sub inputs
    | Op.Mul -> binary KernelId.Mul inputs
    | Op.Div -> binary KernelId.Div inputs
    | Op.Neg -> plain KernelId.Neg
    | Op.Exp -> plain KernelId.Exp
    | Op.Log -> plain KernelId.Log
    | Op.Rsqrt -> plain KernelId.Rsqrt
    | Op.Sigmoid -> plain KernelId.Sigmoid
    | Op.Silu -> plain KernelId.Silu
    | Op.Scale factor -> Some(KernelId.Scale, [ float factor ])
    | Op.Offset addend -> Some(KernelId.Offset, [ float addend ])
    | Op.Cast _ -> plain KernelId.Cast
    | Op.Slice(axis, start, length) -> Some(KernelId.Slice, [ dim axis; int start; int length ])
    | Op.Pad(axis, before, total) -> Some(KernelId.Pad, [ dim axis; int before; int total ])
    | Op.Concat axis -> Some(KernelId.Concat, [ dim axis ])
    | Op.Broadcast(axis, d) -> Some(KernelId.Broadcast, [ int d; int axis.Extent ])
    | Op.Transpose permutation -> Some(KernelId.Transpose, [ ints permutation ])
    | Op.Fp8Quantize blocks -> Some(KernelId.Fp8Quantize, [ ints blocks ])
    | Op.Zigzag(axis, ranks, inverse) -> Some(KernelId.Zigzag, [ dim axis; int ranks; flag inverse ])
    | Op.Contract spec -> Some(KernelId.Contract, [ Attribute.Text spec ])
    | Op.GroupedMatMul transposed -> onPath KernelId.GroupedMatMul [ flag transposed ]
    | Op.GroupedWeightGrad -> onPath KernelId.GroupedWeightGrad []
    | Op.Sum axes -> Some(KernelId.Sum, [ ints (List.map inputs[0].IndexOf axes) ])
    | Op.Max axes -> Some(KernelId.Max, [ ints (List.map inputs[0].IndexOf axes) ])
    | Op.RmsNorm eps -> Some(KernelId.RmsNorm, [ float eps ])
    | Op.RmsNormGradX eps -> Some(KernelId.RmsNormGradX, [ float eps ])
    | Op.RmsNormGradW eps -> Some(KernelId.RmsNormGradW, [ float eps ])
    | Op.AddRmsNorm eps -> Some(KernelId.AddRmsNorm, [ float eps ])
    | Op.RmsNormGradXAdd eps -> Some(KernelId.RmsNormGradXAdd, [ float eps ])
    | Op.RotaryTable s ->
        Some(
            KernelId.RotaryTable,
            int s.Dim :: List.map float [ s.Theta; s.Factor; s.Original; s.BetaFast; s.BetaSlow; s.Mscale ]
        )
    | Op.Rope inverse -> Some(KernelId.Rope, [ flag inverse ])
    | Op.RopeQ inverse -> Some(KernelId.RopeQ, [ flag inverse ])
    | Op.RopeKv nope -> Some(KernelId.RopeKv, [ int nope ])
    | Op.RopeKvGrad nope -> Some(KernelId.RopeKvGrad, [ int nope ])
    | Op.Attention scale -> onPath KernelId.Attention [ float scale ]
    | Op.AttentionGrad scale -> onPath KernelId.AttentionGrad [ float scale ]
    | Op.CacheWrite -> plain KernelId.CacheWrite
    | Op.CacheAttention(scale, value) -> Some(KernelId.CacheAttention, [ float scale; int value ])
    | Op.GroupTopK s -> Some(KernelId.GroupTopK, choice s)
    | Op.Router s -> Some(KernelId.Router, routing s)
    | Op.RouterGrad s -> Some(KernelId.RouterGrad, routing s)
    | Op.Balance(topK, eps) -> Some(KernelId.Balance, [ int topK; float eps ])
    | Op.BalanceGrad eps -> Some(KernelId.BalanceGrad, [ float eps ])
    | Op.Route(topK, experts) -> Some(KernelId.Route, [ int topK; int experts ])
    | Op.Permute fused -> plain (if fused then KernelId.PermuteFused else KernelId.Permute)
    | Op.Unpermute fused -> plain (if fused then KernelId.UnpermuteFused else KernelId.Unpermute)
    | Op.RouteProbs -> plain KernelId.RouteProbs
    | Op.UnrouteProbs -> plain KernelId.UnrouteProbs
    | Op.PermuteWithProbs -> plain KernelId.PermuteWithProbs
    | Op.UnpermuteWithProbs -> plain KernelId.UnpermuteWithProbs
    | Op.SwiGlu -> plain KernelId.SwiGlu
    | Op.SwiGluGrad -> plain KernelId.SwiGluGrad
    | Op.SwiGluProbs -> plain KernelId.SwiGluProbs
    | Op.SwiGluProbsGrad -> plain KernelId.SwiGluProbsGrad
    | Op.Embedding -> plain KernelId.Embedding
    | Op.EmbeddingGrad -> plain KernelId.EmbeddingGrad
    | Op.Pick -> plain KernelId.Pick
    | Op.PickGrad -> plain KernelId.PickGrad
    | Op.LinearLogSumExp block -> Some(KernelId.LinearLogSumExp, [ int block ])
    | Op.LinearLogSumExpGrad block -> Some(KernelId.LinearLogSumExpGrad, [ int block ])
    | Op.LinearCrossEntropy -> plain KernelId.LinearCrossEntropy
    | Op.LinearCrossEntropyGrad -> plain KernelId.LinearCrossEntropyGrad
    | Op.LocalSlice(d, axes, _) -> Some(KernelId.LocalSlice, [ int d; ints axes ])

/// The kernels that have no op: they work on the state of a step.
let isStepKernel (kernel: KernelId) = kernel >= KernelId.Zero && kernel <= KernelId.RouterBias

/// Operand types with axes named so that ops which match by name find each other: a slot keeps the name its value was born with.
let operands (kernel: KernelId) (attributes: IReadOnlyList<Attribute>) (inputs: TensorType[]) : TensorType[] =
    let rename (name: int -> int -> string) =
        inputs
        |> Array.mapi (fun i t -> {
            t with
                Axes = t.Axes |> Array.mapi (fun d a -> { a with Name = name i d })
        })

    let own i d = if i = 0 then $"d%i{d}" else $"d%i{i}.%i{d}"

    match kernel, List.ofSeq attributes with
    | (KernelId.Sub | KernelId.Mul | KernelId.Div | KernelId.Add), [ Attribute.Ints at ] ->
        rename (fun i d -> if i > 0 && d < at.Count then $"d%i{at[d]}" else own i d)
    | (KernelId.Add | KernelId.Concat), _ -> rename (fun _ d -> $"d%i{d}")
    | KernelId.Rope, _ when inputs.Length = 2 && inputs[1].Rank = 3 ->
        rename (fun i d -> if i = 1 && d < 2 then $"d%i{d}" else own i d)
    | KernelId.Rope, _ -> rename (fun i d -> if i = 1 && d = 0 then "d1" else own i d)
    | KernelId.Contract, [ Attribute.Text spec ] ->
        try
            let terms = (Axes.parse spec).Operands
            let letter i d = terms |> Array.tryItem i |> Option.bind (Array.tryItem d)

            rename (fun i d ->
                match letter i d with
                | Some l -> l.Name
                | None -> own i d)
        with :? System.ArgumentException ->
            inputs
    | _ -> rename own

/// The op that a launch computes, from its attributes and local types; or what is wrong with them.
let toOp
    (kernel: KernelId)
    (attributes: IReadOnlyList<Attribute>)
    (inputs: TensorType[])
    (outputs: TensorType[])
    : Result<Op, string> =
    let wrong () =
        let given = attributes |> Seq.map string |> String.concat ", "
        Error $"kernel %O{kernel} takes other attributes than (%s{given})"

    let small (n: int64) = n >= 0L && n < 2147483647L

    let axis (d: int64) k =
        if inputs.Length > 0 && d >= 0L && d < int64 inputs[0].Rank then
            Ok(k inputs[0].Names[int32 d])
        else
            Error $"kernel %O{kernel} names dim %i{d} of an operand that lacks it"

    let axes (ds: IReadOnlyList<int64>) k =
        if inputs.Length > 0 && ds |> Seq.forall (fun d -> d >= 0L && d < int64 inputs[0].Rank) then
            Ok(k [ for d in ds -> inputs[0].Names[int32 d] ])
        else
            Error $"kernel %O{kernel} names a dim of an operand that lacks it"

    let result k = if outputs.Length = 1 then Ok(k outputs[0]) else Error $"kernel %O{kernel} has one output"

    let numbers = [
        for a in attributes do
            match a with
            | Attribute.Int n -> double n
            | Attribute.Float x -> x
            | Attribute.Ints _
            | Attribute.Text _ -> nan
    ]

    let plain op = if attributes.Count = 0 then Ok op else wrong ()

    let readChoice given =
        match given with
        | Attribute.Int k :: Attribute.Int groups :: Attribute.Int keep :: Attribute.Int zero :: Attribute.Int best :: rest when
            small k && small groups && small keep
            ->
            let spec = {
                TopK = int32 k
                Groups = int32 groups
                KeepGroups = int32 keep
                ZeroMasked = zero <> 0L
                GroupScore = if best <> 0L then GroupScore.Best else GroupScore.BestTwo
            }

            Some(spec, rest)
        | _other -> None

    let router given op =
        match readChoice given with
        | Some(spec, [ Attribute.Int normalize; Attribute.Float eps; Attribute.Float factor; Attribute.Int softmax ]) ->
            Ok(
                op {
                    Score = if softmax <> 0L then ScoreFunction.Softmax else ScoreFunction.Sigmoid
                    Choice = spec
                    Normalize = normalize <> 0L
                    Eps = eps
                    Factor = factor
                }
            )
        | Some _
        | None -> wrong ()

    let isPath = (KernelPaths.ofLaunch kernel attributes).IsSome

    match kernel, List.ofSeq attributes with
    | KernelId.Full, [ Attribute.Float value ] -> result (fun t -> Op.Constant(value, t))
    | KernelId.Iota, [ Attribute.Ints _ ] when outputs.Length = 1 && outputs[0].Rank = 1 ->
        Ok(Op.Iota outputs[0].Axes[0])
    | KernelId.Add, ([] | [ Attribute.Ints _ ]) -> Ok Op.Add
    | KernelId.Sub, [ Attribute.Ints _ ] -> Ok Op.Sub
    | KernelId.Mul, [ Attribute.Ints _ ] -> Ok Op.Mul
    | KernelId.Div, [ Attribute.Ints _ ] -> Ok Op.Div
    | KernelId.Neg, _ -> plain Op.Neg
    | KernelId.Exp, _ -> plain Op.Exp
    | KernelId.Log, _ -> plain Op.Log
    | KernelId.Rsqrt, _ -> plain Op.Rsqrt
    | KernelId.Sigmoid, _ -> plain Op.Sigmoid
    | KernelId.Silu, _ -> plain Op.Silu
    | KernelId.Scale, [ Attribute.Float factor ] -> Ok(Op.Scale factor)
    | KernelId.Offset, [ Attribute.Float addend ] -> Ok(Op.Offset addend)
    | KernelId.Cast, [] -> result (fun t -> Op.Cast t.DType)
    | KernelId.Slice, [ Attribute.Int d; Attribute.Int start; Attribute.Int length ] when small start && small length ->
        axis d (fun name -> Op.Slice(name, int32 start, int32 length))
    | KernelId.Pad, [ Attribute.Int d; Attribute.Int before; Attribute.Int total ] when small before && small total ->
        axis d (fun name -> Op.Pad(name, int32 before, int32 total))
    | KernelId.Concat, [ Attribute.Int d ] -> axis d Op.Concat
    | KernelId.Broadcast, [ Attribute.Int d; Attribute.Int extent ] when outputs.Length = 1 && small d && small extent ->
        Ok(Op.Broadcast({ Name = "new"; Extent = int32 extent }, int32 d))
    | KernelId.LocalSlice, [ Attribute.Int d; Attribute.Ints axes ] when small d && axes |> Seq.forall small ->
        result (fun t -> Op.LocalSlice(int32 d, [ for a in axes -> int32 a ], t))
    | KernelId.Fp8Quantize, [ Attribute.Ints blocks ] when blocks |> Seq.forall small ->
        Ok(Op.Fp8Quantize [ for n in blocks -> int32 n ])
    | KernelId.Transpose, [ Attribute.Ints permutation ] when permutation |> Seq.forall small ->
        Ok(Op.Transpose [ for d in permutation -> int32 d ])
    | KernelId.Zigzag, [ Attribute.Int d; Attribute.Int ranks; Attribute.Int inverse ] when ranks > 0L && ranks < 65537L ->
        axis d (fun name -> Op.Zigzag(name, int32 ranks, inverse <> 0L))
    | KernelId.Contract, [ Attribute.Text spec ] -> Ok(Op.Contract spec)
    | KernelId.GroupedMatMul, [ Attribute.Int transposed; _ ] when isPath -> Ok(Op.GroupedMatMul(transposed <> 0L))
    | KernelId.GroupedWeightGrad, [ _ ] when isPath -> Ok Op.GroupedWeightGrad
    | KernelId.Sum, [ Attribute.Ints ds ] -> axes ds Op.Sum
    | KernelId.Max, [ Attribute.Ints ds ] -> axes ds Op.Max
    | KernelId.RmsNorm, [ Attribute.Float eps ] -> Ok(Op.RmsNorm eps)
    | KernelId.RmsNormGradX, [ Attribute.Float eps ] -> Ok(Op.RmsNormGradX eps)
    | KernelId.RmsNormGradW, [ Attribute.Float eps ] -> Ok(Op.RmsNormGradW eps)
    | KernelId.AddRmsNorm, [ Attribute.Float eps ] -> Ok(Op.AddRmsNorm eps)
    | KernelId.RmsNormGradXAdd, [ Attribute.Float eps ] -> Ok(Op.RmsNormGradXAdd eps)
    | KernelId.RotaryTable, Attribute.Int dim :: _ when small dim ->
        match numbers with
        | [ _; theta; factor; original; fast; slow; mscale ] ->
            Ok(
                Op.RotaryTable {
                    Dim = int32 dim
                    Theta = theta
                    Factor = factor
                    Original = original
                    BetaFast = fast
                    BetaSlow = slow
                    Mscale = mscale
                }
            )
        | _fewer -> wrong ()
    | KernelId.Rope, [ Attribute.Int inverse ] -> Ok(Op.Rope(inverse <> 0L))
    | KernelId.RopeQ, [ Attribute.Int inverse ] -> Ok(Op.RopeQ(inverse <> 0L))
    | KernelId.RopeKv, [ Attribute.Int nope ] when small nope -> Ok(Op.RopeKv(int32 nope))
    | KernelId.RopeKvGrad, [ Attribute.Int nope ] when small nope -> Ok(Op.RopeKvGrad(int32 nope))
    | KernelId.Attention, [ Attribute.Float scale; _ ] when isPath -> Ok(Op.Attention scale)
    | KernelId.AttentionGrad, [ Attribute.Float scale; _ ] when isPath -> Ok(Op.AttentionGrad scale)
    | KernelId.CacheWrite, _ -> plain Op.CacheWrite
    | KernelId.CacheAttention, [ Attribute.Float scale; Attribute.Int value ] when small value ->
        Ok(Op.CacheAttention(scale, int32 value))
    | KernelId.GroupTopK, given ->
        match readChoice given with
        | Some(spec, []) -> Ok(Op.GroupTopK spec)
        | Some _
        | None -> wrong ()
    | KernelId.Router, given -> router given Op.Router
    | KernelId.RouterGrad, given -> router given Op.RouterGrad
    | KernelId.Balance, [ Attribute.Int k; Attribute.Float eps ] when small k -> Ok(Op.Balance(int32 k, eps))
    | KernelId.BalanceGrad, [ Attribute.Float eps ] -> Ok(Op.BalanceGrad eps)
    | KernelId.Route, [ Attribute.Int topK; Attribute.Int experts ] when small topK && small experts ->
        Ok(Op.Route(int32 topK, int32 experts))
    | KernelId.Permute, _ -> plain (Op.Permute false)
    | KernelId.PermuteFused, _ -> plain (Op.Permute true)
    | KernelId.Unpermute, _ -> plain (Op.Unpermute false)
    | KernelId.UnpermuteFused, _ -> plain (Op.Unpermute true)
    | KernelId.RouteProbs, _ -> plain Op.RouteProbs
    | KernelId.UnrouteProbs, _ -> plain Op.UnrouteProbs
    | KernelId.PermuteWithProbs, _ -> plain Op.PermuteWithProbs
    | KernelId.UnpermuteWithProbs, _ -> plain Op.UnpermuteWithProbs
    | KernelId.SwiGlu, _ -> plain Op.SwiGlu
    | KernelId.SwiGluGrad, _ -> plain Op.SwiGluGrad
    | KernelId.SwiGluProbs, _ -> plain Op.SwiGluProbs
    | KernelId.SwiGluProbsGrad, _ -> plain Op.SwiGluProbsGrad
    | KernelId.Embedding, _ -> plain Op.Embedding
    | KernelId.EmbeddingGrad, _ -> plain Op.EmbeddingGrad
    | KernelId.Pick, _ -> plain Op.Pick
    | KernelId.PickGrad, _ -> plain Op.PickGrad
    | KernelId.LinearLogSumExp, [ Attribute.Int block ] when small block -> Ok(Op.LinearLogSumExp(int32 block))
    | KernelId.LinearLogSumExpGrad, [ Attribute.Int block ] when small block -> Ok(Op.LinearLogSumExpGrad(int32 block))
    | KernelId.LinearCrossEntropy, _ -> plain Op.LinearCrossEntropy
    | KernelId.LinearCrossEntropyGrad, _ -> plain Op.LinearCrossEntropyGrad
    | _ -> wrong ()

/// Ops as words: name and attributes of each op, and back.
namespace DeepSeekGraph

open System
open System.Globalization

/// An attribute as written: a bare word (numbers, true, false), a quoted text, or a list.
[<RequireQualifiedAccess>]
type internal Attr =
    | Word of string
    | Quoted of string
    | Items of Attr list

/// What is wrong with a text; caught where its line number is known.
exception internal BadText of string

/// Attributes of one op, as parsed.
[<Sealed>]
type internal Attrs(op: string, given: (string * Attr) list) =
    let bad (key: string) (kind: string) = raise (BadText $"attribute '%s{key}' of %s{op} must be %s{kind}")

    let find key =
        match given |> List.tryFind (fun (k, _) -> k = key) with
        | Some(_, value) -> value
        | None -> raise (BadText $"%s{op} lacks the attribute '%s{key}'")

    let toInt key (attr: Attr) =
        match attr with
        | Attr.Word w ->
            match Int32.TryParse(w, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture) with
            | true, n -> n
            | false, _ -> bad key "an integer"
        | Attr.Quoted _
        | Attr.Items _ -> bad key "an integer"

    let toText key (attr: Attr) =
        match attr with
        | Attr.Quoted text -> text
        | Attr.Word _
        | Attr.Items _ -> bad key "a quoted text"

    let items key =
        match find key with
        | Attr.Items list -> list
        | Attr.Word _
        | Attr.Quoted _ -> bad key "a list"

    member _.Keys = given |> List.map fst
    member _.Int key = toInt key (find key)
    member _.Text key = toText key (find key)
    member _.Ints key = items key |> List.map (toInt key)
    member _.Texts key = items key |> List.map (toText key)

    member _.Word key =
        match find key with
        | Attr.Word w -> w
        | Attr.Quoted _
        | Attr.Items _ -> bad key "a word"

    member this.Float key =
        match Double.TryParse(this.Word key, NumberStyles.Float, CultureInfo.InvariantCulture) with
        | true, x -> x
        | false, _ -> bad key "a number"

    member this.Flag key =
        match this.Word key with
        | "true" -> true
        | "false" -> false
        | _other -> bad key "true or false"

[<RequireQualifiedAccess>]
module internal OpText =
    let private int key (n: int) = key, Attr.Word(string n)

    let private flag key (b: bool) = key, Attr.Word(if b then "true" else "false")

    let private text key (s: string) = key, Attr.Quoted s
    let private word key (s: string) = key, Attr.Word s

    let private float key (x: float) = key, Attr.Word(x.ToString("R", CultureInfo.InvariantCulture))

    let private ints key (list: int list) = key, Attr.Items(list |> List.map (string >> Attr.Word))

    let private texts key (list: string list) = key, Attr.Items(List.map Attr.Quoted list)

    let private init (init: Init) =
        match init with
        | Init.Zeros -> [ word "init" "zeros" ]
        | Init.Ones -> [ word "init" "ones" ]
        | Init.Normal std -> [ word "init" "normal"; float "std" std ]

    let private update (update: Update) =
        match update with
        | Update.AdamW decay -> [ word "update" "adamw"; flag "decay" decay ]
        | Update.RouterBias rate -> [ word "update" "router_bias"; float "rate" rate ]
        | Update.Frozen -> [ word "update" "frozen" ]

    let private collective (kind: Collective) =
        match kind with
        | Collective.AllGather dim
        | Collective.ReduceScatter dim -> [ int "dim" dim ]
        | Collective.AllToAll(split, join) -> [ int "split" split; int "join" join ]
        | Collective.Send stage
        | Collective.Recv stage -> [ int "stage" stage ]
        | Collective.Dispatch ranks
        | Collective.Combine ranks -> [ int "ranks_per_node" ranks ]
        | Collective.AllReduceSum
        | Collective.AllReduceMax
        | Collective.RouteToExperts
        | Collective.RowsToExperts
        | Collective.RowsToTokens -> []

    let private choice (spec: TopKSpec) = [
        int "top_k" spec.TopK
        int "groups" spec.Groups
        int "keep_groups" spec.KeepGroups
        flag "zero_masked" spec.ZeroMasked
        word "group_score" (if spec.GroupScore.IsBest then "best" else "best_two")
    ]

    /// Attributes of an op; element type and axes of sources and collectives stand in the result type.
    let attributes (op: Op) : (string * Attr) list =
        match op with
        | Op.Parameter(spec, _) -> [
            text "name" spec.Name
            yield! init spec.Init
            yield! update spec.Update
            flag "keep_fp32" spec.KeepFloat32
          ]
        | Op.Input(name, _)
        | Op.Cache(name, _) -> [ text "name" name ]
        | Op.Constant(value, _) -> [ float "value" value ]
        | Op.Scale factor -> [ float "factor" factor ]
        | Op.Offset addend -> [ float "addend" addend ]
        | Op.Cast dtype -> [ word "dtype" dtype.Name ]
        | Op.Slice(axis, start, length) -> [ text "axis" axis; int "start" start; int "length" length ]
        | Op.Pad(axis, before, total) -> [ text "axis" axis; int "before" before; int "total" total ]
        | Op.Concat axis -> [ text "axis" axis ]
        | Op.Broadcast(axis, dim) -> [ text "axis" axis.Name; int "extent" axis.Extent; int "dim" dim ]
        | Op.Rename(from, into) -> [ text "from" from; text "to" into ]
        | Op.Transpose permutation -> [ ints "permutation" permutation ]
        | Op.Fp8Quantize blocks -> [ ints "blocks" blocks ]
        | Op.Zigzag(axis, ranks, inverse) -> [ text "axis" axis; int "ranks" ranks; flag "inverse" inverse ]
        | Op.Anchor name -> [ text "name" name ]
        | Op.Contract spec -> [ text "spec" spec ]
        | Op.GroupedMatMul transposed -> [ flag "transposed" transposed ]
        | Op.Sum axes
        | Op.Max axes -> [ texts "axes" axes ]
        | Op.RmsNorm eps
        | Op.RmsNormGradX eps
        | Op.RmsNormGradW eps
        | Op.AddRmsNorm eps
        | Op.RmsNormGradXAdd eps
        | Op.BalanceGrad eps -> [ float "eps" eps ]
        | Op.RotaryTable spec -> [
            int "dim" spec.Dim
            float "theta" spec.Theta
            float "factor" spec.Factor
            float "original" spec.Original
            float "beta_fast" spec.BetaFast
            float "beta_slow" spec.BetaSlow
            float "mscale" spec.Mscale
          ]
        | Op.Rope inverse
        | Op.RopeQ inverse -> [ flag "inverse" inverse ]
        | Op.RopeKv nope
        | Op.RopeKvGrad nope -> [ int "nope" nope ]
        | Op.Attention scale
        | Op.AttentionGrad scale -> [ float "scale" scale ]
        | Op.CacheAttention(scale, value) -> [ float "scale" scale; int "value" value ]
        | Op.GroupTopK spec -> choice spec
        | Op.Router spec
        | Op.RouterGrad spec ->
            choice spec.Choice
            @ [
                flag "normalize" spec.Normalize
                float "eps" spec.Eps
                float "factor" spec.Factor
                word "score" (if spec.Score.IsSoftmax then "softmax" else "sigmoid")
            ]
        | Op.Balance(topK, eps) -> [ int "top_k" topK; float "eps" eps ]
        | Op.LinearLogSumExp block
        | Op.LinearLogSumExpGrad block -> [ int "block" block ]
        | Op.Route(topK, experts) -> [ int "top_k" topK; int "experts" experts ]
        | Op.Permute fused
        | Op.Unpermute fused -> [ flag "fused" fused ]
        | Op.Collective(kind, axes, _) -> collective kind @ [ ints "axes" axes ]
        | Op.LocalSlice(dim, axes, _) -> [ int "dim" dim; ints "axes" axes ]
        // its axis is its result's
        | Op.Iota _
        | Op.Add
        | Op.Sub
        | Op.Mul
        | Op.Div
        | Op.Neg
        | Op.Exp
        | Op.Log
        | Op.Rsqrt
        | Op.Sigmoid
        | Op.Silu
        | Op.Detach
        | Op.GroupedWeightGrad
        | Op.CacheWrite
        | Op.RouteProbs
        | Op.UnrouteProbs
        | Op.PermuteWithProbs
        | Op.UnpermuteWithProbs
        | Op.SwiGlu
        | Op.SwiGluGrad
        | Op.SwiGluProbs
        | Op.SwiGluProbsGrad
        | Op.Embedding
        | Op.EmbeddingGrad
        | Op.Pick
        | Op.PickGrad
        | Op.LinearCrossEntropy
        | Op.LinearCrossEntropyGrad -> []

    /// Ops that are their name alone.
    let private plain =
        [
            Op.Add
            Op.Sub
            Op.Mul
            Op.Div
            Op.Neg
            Op.Exp
            Op.Log
            Op.Rsqrt
            Op.Sigmoid
            Op.Silu
            Op.Detach
            Op.GroupedWeightGrad
            Op.CacheWrite
            Op.RouteProbs
            Op.UnrouteProbs
            Op.PermuteWithProbs
            Op.UnpermuteWithProbs
            Op.SwiGlu
            Op.SwiGluGrad
            Op.SwiGluProbs
            Op.SwiGluProbsGrad
            Op.Embedding
            Op.EmbeddingGrad
            Op.Pick
            Op.PickGrad
            Op.LinearCrossEntropy
            Op.LinearCrossEntropyGrad
        ]
        |> List.map (fun op -> (Catalog.define op).Name, op)
        |> Map.ofList

    let private readInit (a: Attrs) =
        match a.Word "init" with
        | "zeros" -> Init.Zeros
        | "ones" -> Init.Ones
        | "normal" -> Init.Normal(a.Float "std")
        | other -> raise (BadText $"'%s{other}' is no initialisation: zeros, ones or normal")

    let private readUpdate (a: Attrs) =
        match a.Word "update" with
        | "adamw" -> Update.AdamW(a.Flag "decay")
        | "router_bias" -> Update.RouterBias(a.Float "rate")
        | "frozen" -> Update.Frozen
        | other -> raise (BadText $"'%s{other}' is no update: adamw, router_bias or frozen")

    let private readParameter (a: Attrs) = {
        Name = a.Text "name"
        Init = readInit a
        Update = readUpdate a
        KeepFloat32 = a.Flag "keep_fp32"
    }

    let private readRotary (a: Attrs) = {
        Dim = a.Int "dim"
        Theta = a.Float "theta"
        Factor = a.Float "factor"
        Original = a.Float "original"
        BetaFast = a.Float "beta_fast"
        BetaSlow = a.Float "beta_slow"
        Mscale = a.Float "mscale"
    }

    let private readTopK (a: Attrs) = {
        TopK = a.Int "top_k"
        Groups = a.Int "groups"
        KeepGroups = a.Int "keep_groups"
        ZeroMasked = a.Flag "zero_masked"
        GroupScore =
            match a.Word "group_score" with
            | "best_two" -> GroupScore.BestTwo
            | "best" -> GroupScore.Best
            | other -> raise (BadText $"'%s{other}' is no score of a group: best_two or best")
    }

    let private readRouter (a: Attrs) = {
        Score =
            match a.Word "score" with
            | "sigmoid" -> ScoreFunction.Sigmoid
            | "softmax" -> ScoreFunction.Softmax
            | other -> raise (BadText $"'%s{other}' is no score function: sigmoid or softmax")
        Choice = readTopK a
        Normalize = a.Flag "normalize"
        Eps = a.Float "eps"
        Factor = a.Float "factor"
    }

    let private readDType (a: Attrs) =
        let mutable dtype = DType.Float32

        if DType.TryParse(a.Word "dtype", &dtype) then
            dtype
        else
            let word = a.Word "dtype"
            raise (BadText $"'%s{word}' is no element type")

    /// The op of a name, from its attributes and result type. Raises BadText.
    let read (name: string) (a: Attrs) (t: TensorType) : Op =
        let collective kind = Op.Collective(kind, a.Ints "axes", t)

        match name with
        | "parameter" -> Op.Parameter(readParameter a, t)
        | "input" -> Op.Input(a.Text "name", t)
        | "cache" -> Op.Cache(a.Text "name", t)
        | "constant" -> Op.Constant(a.Float "value", t)
        | "iota" when t.Rank = 1 -> Op.Iota t.Axes[0]
        | "scale" -> Op.Scale(a.Float "factor")
        | "offset" -> Op.Offset(a.Float "addend")
        | "cast" -> Op.Cast(readDType a)
        | "slice" -> Op.Slice(a.Text "axis", a.Int "start", a.Int "length")
        | "pad" -> Op.Pad(a.Text "axis", a.Int "before", a.Int "total")
        | "concat" -> Op.Concat(a.Text "axis")
        | "broadcast" ->
            Op.Broadcast(
                {
                    Name = a.Text "axis"
                    Extent = a.Int "extent"
                },
                a.Int "dim"
            )
        | "rename" -> Op.Rename(a.Text "from", a.Text "to")
        | "transpose" -> Op.Transpose(a.Ints "permutation")
        | "fp8_quantize" -> Op.Fp8Quantize(a.Ints "blocks")
        | "zigzag" -> Op.Zigzag(a.Text "axis", a.Int "ranks", a.Flag "inverse")
        | "anchor" -> Op.Anchor(a.Text "name")
        | "contract" -> Op.Contract(a.Text "spec")
        | "grouped_matmul" -> Op.GroupedMatMul(a.Flag "transposed")
        | "sum" -> Op.Sum(a.Texts "axes")
        | "max" -> Op.Max(a.Texts "axes")
        | "rms_norm" -> Op.RmsNorm(a.Float "eps")
        | "rms_norm_grad_x" -> Op.RmsNormGradX(a.Float "eps")
        | "rms_norm_grad_w" -> Op.RmsNormGradW(a.Float "eps")
        | "add_rms_norm" -> Op.AddRmsNorm(a.Float "eps")
        | "rms_norm_grad_x_add" -> Op.RmsNormGradXAdd(a.Float "eps")
        | "rotary_table" -> Op.RotaryTable(readRotary a)
        | "rope" -> Op.Rope(a.Flag "inverse")
        | "rope_q" -> Op.RopeQ(a.Flag "inverse")
        | "rope_kv" -> Op.RopeKv(a.Int "nope")
        | "rope_kv_grad" -> Op.RopeKvGrad(a.Int "nope")
        | "attention" -> Op.Attention(a.Float "scale")
        | "attention_grad" -> Op.AttentionGrad(a.Float "scale")
        | "cache_attention" -> Op.CacheAttention(a.Float "scale", a.Int "value")
        | "group_top_k" -> Op.GroupTopK(readTopK a)
        | "router" -> Op.Router(readRouter a)
        | "router_grad" -> Op.RouterGrad(readRouter a)
        | "balance" -> Op.Balance(a.Int "top_k", a.Float "eps")
        | "balance_grad" -> Op.BalanceGrad(a.Float "eps")
        | "linear_log_sum_exp" -> Op.LinearLogSumExp(a.Int "block")
        | "linear_log_sum_exp_grad" -> Op.LinearLogSumExpGrad(a.Int "block")
        | "route" -> Op.Route(a.Int "top_k", a.Int "experts")
        | "permute" -> Op.Permute(a.Flag "fused")
        | "unpermute" -> Op.Unpermute(a.Flag "fused")
        | "all_reduce" -> collective Collective.AllReduceSum
        | "all_reduce_max" -> collective Collective.AllReduceMax
        | "all_gather" -> collective (Collective.AllGather(a.Int "dim"))
        | "reduce_scatter" -> collective (Collective.ReduceScatter(a.Int "dim"))
        | "all_to_all" -> collective (Collective.AllToAll(a.Int "split", a.Int "join"))
        | "route_to_experts" -> collective Collective.RouteToExperts
        | "rows_to_experts" -> collective Collective.RowsToExperts
        | "rows_to_tokens" -> collective Collective.RowsToTokens
        | "dispatch" -> collective (Collective.Dispatch(a.Int "ranks_per_node"))
        | "combine" -> collective (Collective.Combine(a.Int "ranks_per_node"))
        | "send" -> collective (Collective.Send(a.Int "stage"))
        | "recv" -> collective (Collective.Recv(a.Int "stage"))
        | "local_slice" -> Op.LocalSlice(a.Int "dim", a.Ints "axes", t)
        | other ->
            match plain.TryFind other with
            | Some op -> op
            | None -> raise (BadText $"'%s{other}' is no op")

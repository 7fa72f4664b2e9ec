/// The linear head under cross-entropy, without the logits: by chunks of tokens, or, of a split vocabulary, statistics by block.
module DeepSeekGraph.Ops.Head

open DeepSeekGraph

/// The axis that counts blocks of the vocabulary; a rank's slice of the vocabulary is whole blocks.
[<Literal>]
let blocks = "vocab_blocks"

let private factor letter mark extent operands results = {
    Letter = letter
    Mark = mark
    Extent = extent
    Operands = operands
    Results = results
}

/// Axes of hidden states [b s k], head [v k], labels [b s] and ids [v], when they fit each other and blocks divide v.
let private bound block (t: TensorType[]) (use4: Axis -> Axis -> Axis -> Axis -> Axis -> Rule) =
    let ranks = t |> Array.truncate 4 |> Array.map _.Rank

    if ranks <> [| 3; 2; 2; 1 |] then
        Error $"hidden states, head, labels and ids have ranks %A{ranks}, not 3, 2, 2 and 1"
    else
        let b, s, k, v = t[0].Axes[0], t[0].Axes[1], t[0].Axes[2], t[1].Axes[0]

        if t[1].Axes[1].Extent <> k.Extent then
            Error $"the head takes %i{t[1].Axes[1].Extent} features, hidden states have %i{k.Extent}"
        elif t[2].Extents <> [| b.Extent; s.Extent |] then
            Error $"labels are %O{t[2]} for %i{b.Extent} sequences of %i{s.Extent}"
        elif t[3].Axes[0].Extent <> v.Extent then
            Error $"%i{t[3].Axes[0].Extent} ids for a vocabulary of %i{v.Extent}"
        elif block < 1 || v.Extent % block <> 0 then
            Error $"blocks of %i{block} do not divide a vocabulary of %i{v.Extent}"
        else
            let c = {
                Name = blocks
                Extent = v.Extent / block
            }

            Ok(use4 b s k v c)

/// Labels and ids are integers, the first two operands one floating type.
let private typed (t: TensorType[]) (results: DType -> DType[]) =
    match [ 2; 3 ] |> List.tryFind (fun i -> t[i].DType.IsFloat || t[i].DType.IsBool) with
    | Some i -> Error $"input %i{i} is %O{t[i]}; ids are integers"
    | None -> OpDef.sameOf [ 0; 1 ] 1 t |> Result.map (fun d -> results d[0])

/// `k` products of every hidden state with the whole head.
let private products k (inputs: TensorType[]) (_outputs: TensorType[]) =
    k * 2.0 * float inputs[0].Elements * float inputs[1].Axes[0].Extent

let linearLogSumExp block = {
    OpDef.opaque
        "linear_log_sum_exp"
        ""
        (fun t -> typed t (fun _ -> [| DType.Float32; DType.Float32 |]))
        (Vjp.Rule(fun a ->
            let given r =
                match a.Cotangents[r] with
                | ValueSome d -> d
                | ValueNone -> a.One (Op.Constant(0.0, a.Type a.Outputs[r])) []

            let saved = List.ofArray a.Inputs @ [ a.Outputs[0]; given 0; given 1 ]
            let grads = a.Emit (Op.LinearLogSumExpGrad block) saved
            [| ValueSome grads[0]; ValueSome grads[1]; ValueNone; ValueNone |])) with
        // a block of the vocabulary becomes one element of the result
        Axes =
            OpDef.taking 4 (fun t ->
                bound block t (fun b s k _ c -> {
                    Factors = [|
                        factor "b" Mark.Plain b.Extent [| 0; -1; 0; -1 |] [| 0; 0 |]
                        factor "s" Mark.Plain s.Extent [| 1; -1; 1; -1 |] [| 1; 1 |]
                        factor "k" Mark.Whole k.Extent [| 2; 1; -1; -1 |] [| -1; -1 |]
                        factor "v" Mark.Sum c.Extent [| -1; 0; -1; 0 |] [| 2; -1 |]
                    |]
                    ResultAxes = [| [| b; s; c |]; [| b; s |] |]
                }))
        Rows = OpDef.dense 2
        Flops = products 1.0
}

let linearLogSumExpGrad block = {
    OpDef.opaque
        "linear_log_sum_exp_grad"
        ""
        (fun t ->
            match [ 4..6 ] |> List.tryFind (fun i -> t[i].DType <> DType.Float32) with
            | Some i -> Error $"input %i{i} is %O{t[i]}; statistics of logits are fp32"
            | None -> typed t (fun d -> [| d; d |]))
        (Vjp.Missing "second derivatives are not needed") with
        // as above
        Axes =
            OpDef.taking 7 (fun t ->
                bound block t (fun b s k v c -> {
                    Factors = [|
                        factor "b" Mark.Sum b.Extent [| 0; -1; 0; -1; 0; 0; 0 |] [| 0; -1 |]
                        factor "s" Mark.Sum s.Extent [| 1; -1; 1; -1; 1; 1; 1 |] [| 1; -1 |]
                        factor "k" Mark.Whole k.Extent [| 2; 1; -1; -1; -1; -1; -1 |] [| 2; 1 |]
                        factor "v" Mark.Sum c.Extent [| -1; 0; -1; 0; 2; 2; -1 |] [| -1; 0 |]
                    |]
                    ResultAxes = [| [| b; s; k |]; [| v; k |] |]
                })
                |> Result.bind (fun rule ->
                    let c = rule.Factors[3].Extent
                    let stats = [| t[2].Extents[0]; t[2].Extents[1]; c |]

                    if t[4].Extents <> stats || t[5].Extents <> stats || t[6].Extents <> t[2].Extents then
                        Error $"statistics are %O{t[4]}, %O{t[5]} and %O{t[6]} for %O{t[2]} and %i{c} blocks"
                    else
                        Ok rule))
        Rows = OpDef.dense 2
        // the logits again, and two products with their gradient
        Flops = products 3.0
}

// a softmax needs all logits of its token: the vocabulary stays whole
let linearCrossEntropy = {
    OpDef.opaque
        "linear_cross_entropy"
        "b s k^, v^ k^, b s, v^ -> b s"
        (fun t -> typed t (fun _ -> [| DType.Float32 |]))
        (Vjp.Rule(fun a ->
            let grads = a.Emit Op.LinearCrossEntropyGrad (List.ofArray a.Inputs @ [ a.Dy ])
            let head = (a.Type a.Inputs[1]).DType

            let dw = if head = DType.Float32 then grads[2] else a.One (Op.Cast head) [ grads[2] ]
            [| ValueSome grads[1]; ValueSome dw; ValueNone; ValueNone |])) with
        Flops = products 1.0
}

/// h, w, labels, vocab, dloss -> loss, dh, dw. The head's gradient is summed over chunks of tokens, in fp32 whatever the
/// head's type: so that sum is a value of the graph, whose bytes are known, and not hidden in the kernel.
let linearCrossEntropyGrad = {
    OpDef.opaque
        "linear_cross_entropy_grad"
        "b+ s+ k^, v^ k^, b+ s+, v^, b+ s+ -> b s, b s k, v k"
        (fun t ->
            if t[4].DType <> DType.Float32 then
                Error $"input 4 is %O{t[4]}; the cotangent of a loss is fp32"
            else
                typed t (fun d -> [| DType.Float32; d; DType.Float32 |]))
        (Vjp.Missing "second derivatives are not needed") with
        Rows = OpDef.dense 3
        Flops = products 3.0
}

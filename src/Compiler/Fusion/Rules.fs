/// Every fusion: name, before -> after, kernel; one record each.
module DeepSeekGraph.Compiler.Fusion.Rules

open DeepSeekGraph
open DeepSeekGraph.Ops

/// What a match replaces: operands and results are values of the old graph.
type Replacement = {
    Operands: int list
    Results: int list
    /// Adds the ops that make the results, from the operands in the new graph.
    Emit: (Op -> int list -> int list) -> int list -> int list
}

/// A pattern ends in a node; `Match` finds it from there.
type Rule = {
    Name: string
    Before: string
    After: string
    Kernel: KernelId
    Match: Graph -> int[][] -> Node -> Replacement option
}

/// One op in place of the pattern.
let private one (op: Op) (operands: int list) (results: int list) =
    Some {
        Operands = operands
        Results = results
        Emit = fun emit inputs -> emit op inputs
    }

/// Renames change nothing but names: look through them.
let rec private peel (graph: Graph) value =
    let node = graph.NodeOf value

    match node.Op with
    | Op.Rename _ -> peel graph node.Inputs[0]
    | _other -> value

let private peeled (graph: Graph) value =
    let v = peel graph value
    v, graph.NodeOf v

/// The fused kernels take positions along the second axis.
let private alongSequence (graph: Graph) (x: int) (table: int) =
    let axes, position = graph.Types[x].Axes, graph.Types[table].Axes[0]
    axes.Length > 2 && axes[1].Name = position.Name

/// concat(slice(q), rope(slice(q))) on the head axis: the last features of each head are rotated.
let ropeQ = {
    Name = "mla_rope_q"
    Before = "slice, slice, rope, concat"
    After = "rope_q"
    Kernel = KernelId.RopeQ
    Match =
        fun graph _ node ->
            match node.Op with
            | Op.Concat axis when axis = Position.qkDim && node.Inputs.Length = 2 ->
                let _, nope = peeled graph node.Inputs[0]
                let _, rope = peeled graph node.Inputs[1]

                match nope.Op, rope.Op with
                | Op.Slice(a, 0, n), Op.Rope false when a = Position.qkDim ->
                    let _, pe = peeled graph rope.Inputs[0]

                    match pe.Op with
                    | Op.Slice(b, start, r) when
                        b = Position.qkDim
                        && start = n
                        && pe.Inputs[0] = nope.Inputs[0]
                        && graph.Types[pe.Inputs[0]].IndexOf Position.qkDim = 3
                        && graph.Types[pe.Inputs[0]].Rank = 4
                        && alongSequence graph rope.Inputs[0] rope.Inputs[1]
                        && n + r = graph.Types[pe.Inputs[0]].Axes[3].Extent
                        ->
                        one (Op.RopeQ false) [ nope.Inputs[0]; rope.Inputs[1] ] [ node.Outputs[0] ]
                    | _other -> None
                | _other -> None
            | _other -> None
}

/// k = concat(slice(kv), heads x rope(k_pe)), v = slice(kv): keys and values in attention layout from one read.
let ropeKv = {
    Name = "mla_rope_kv"
    Before = "slice, rope, broadcast, concat; slice"
    After = "rope_kv"
    Kernel = KernelId.RopeKv
    Match =
        fun graph consumers node ->
            match node.Op with
            | Op.Concat axis when axis = Position.qkDim && node.Inputs.Length = 2 ->
                let _, nope = peeled graph node.Inputs[0]
                let _, wide = peeled graph node.Inputs[1]

                match nope.Op, wide.Op with
                | Op.Slice(a, 0, n), Op.Broadcast(heads, 2) when a = Position.kvDim && heads.Name = "heads" ->
                    let kv = nope.Inputs[0]
                    let _, rope = peeled graph wide.Inputs[0]

                    // the value slice reads the same kv, from n to its end; its renamed form is what attention reads
                    let values =
                        consumers[kv]
                        |> Array.tryPick (fun c ->
                            let slice = graph.Nodes[c]

                            match slice.Op with
                            | Op.Slice(b, start, _) when b = Position.kvDim && start = n ->
                                consumers[slice.Outputs[0]]
                                |> Array.tryPick (fun r ->
                                    match graph.Nodes[r].Op with
                                    | Op.Rename(_, into) when into = Position.vDim -> Some graph.Nodes[r].Outputs[0]
                                    | _other -> None)
                            | _other -> None)

                    match rope.Op, values with
                    | Op.Rope false, Some v when
                        graph.Types[rope.Inputs[0]].Rank = 3
                        && alongSequence graph rope.Inputs[0] rope.Inputs[1]
                        && heads.Extent = graph.Types[kv].Axes[2].Extent
                        && graph.Types[kv].Axes[3].Extent - n = graph.Types[v].Axes[3].Extent
                        ->
                        one (Op.RopeKv n) [ kv; rope.Inputs[0]; rope.Inputs[1] ] [ node.Outputs[0]; v ]
                    | _other -> None
                | _other -> None
            | _other -> None
}

/// permute(x) and route_probs(p) by one row set: rows and their probabilities in one pass.
let permuteWithProbs = {
    Name = "permute_with_probs"
    Before = "permute; route_probs"
    After = "permute_with_probs"
    Kernel = KernelId.PermuteWithProbs
    Match =
        fun graph consumers node ->
            match node.Op with
            | Op.Permute false ->
                let route = node.Inputs[1]

                consumers[route]
                |> Array.tryPick (fun c ->
                    let probs = graph.Nodes[c]

                    match probs.Op with
                    | Op.RouteProbs ->
                        one Op.PermuteWithProbs [ node.Inputs[0]; probs.Inputs[0]; route ] [
                            node.Outputs[0]
                            probs.Outputs[0]
                        ]
                    | _other -> None)
            | _other -> None
}

/// A permute left alone: one pass instead of index lists.
let permute = {
    Name = "permute"
    Before = "permute"
    After = "permute, one pass"
    Kernel = KernelId.PermuteFused
    Match =
        fun _ _ node ->
            match node.Op with
            | Op.Permute false -> one (Op.Permute true) (List.ofArray node.Inputs) [ node.Outputs[0] ]
            | _other -> None
}

/// Each token gathers its rows: no zero fill, no read-modify-write.
let unpermute = {
    Name = "unpermute"
    Before = "unpermute (scatter-add)"
    After = "unpermute, one pass"
    Kernel = KernelId.UnpermuteFused
    Match =
        fun _ _ node ->
            match node.Op with
            | Op.Unpermute false -> one (Op.Unpermute true) (List.ofArray node.Inputs) [ node.Outputs[0] ]
            | _other -> None
}

/// Made of what joined the residual stream: no partial sum comes in, so that fusing changes no collective.
let rec private resolved (graph: Graph) value =
    let node = graph.NodeOf value

    match node.Op with
    | Op.Anchor _ -> true
    | Op.Add -> node.Inputs |> Array.forall (resolved graph)
    | _other -> false

/// norm(x + r): the sum is written and normalised in one pass; backward adds the cotangent of the sum in the norm's.
/// Only within a unit of the model: stages are cut between units.
let addRmsNorm = {
    Name = "add_rms_norm"
    Before = "add, rms_norm"
    After = "add_rms_norm"
    Kernel = KernelId.AddRmsNorm
    Match =
        fun graph _ node ->
            match node.Op with
            | Op.RmsNorm eps ->
                let sum = graph.NodeOf node.Inputs[0]
                let t = graph.Types[node.Inputs[0]]

                if
                    sum.Op.IsAdd
                    && sum.Inputs.Length = 2
                    && not t.Routed
                    && sum.Origin.Unit = node.Origin.Unit
                    && sum.Inputs |> Array.forall (fun v -> graph.Types[v] = t)
                    && resolved graph sum.Outputs[0]
                then
                    one (Op.AddRmsNorm eps) [ sum.Inputs[0]; sum.Inputs[1]; node.Inputs[1] ] [
                        sum.Outputs[0]
                        node.Outputs[0]
                    ]
                else
                    None
            | _other -> None
}

/// The node that reads `value` and is of this kind, if any.
let private reader (graph: Graph) (consumers: int[][]) (isKind: Node -> bool) value =
    consumers[value] |> Array.map (fun c -> graph.Nodes[c]) |> Array.tryFind isKind

let private castTo dtype (node: Node) = node.Op = Op.Cast dtype

/// x / (sum of x over the experts + eps): the quotient and eps.
let private normalized (graph: Graph) consumers experts value =
    value
    |> reader graph consumers (fun n -> n.Op.IsDiv && n.Inputs[0] = value)
    |> Option.bind (fun div ->
        let floor = graph.NodeOf div.Inputs[1]

        match floor.Op with
        | Op.Offset eps ->
            let total = graph.NodeOf floor.Inputs[0]

            if total.Op = Op.Sum [ experts ] && total.Inputs[0] = value then
                Some(div.Outputs[0], eps)
            else
                None
        | _other -> None)

/// The logits that scores are made of, and how: sigmoid, or softmax over the last axis.
let private logitsOf (graph: Graph) (scores: Node) : (ScoreFunction * int) option =
    let made v = graph.NodeOf v

    match scores.Op with
    | Op.Sigmoid -> Some(ScoreFunction.Sigmoid, scores.Inputs[0])
    | Op.Div ->
        let exp, total = made scores.Inputs[0], made scores.Inputs[1]
        let last = [ Array.last graph.Types[scores.Inputs[0]].Names ]

        if exp.Op.IsExp && total.Op = Op.Sum last && total.Inputs[0] = scores.Inputs[0] then
            let shift = made exp.Inputs[0]

            let isLargest (n: Node) logits =
                n.Op = Op.Max last && (let d = made n.Inputs[0] in d.Op.IsDetach && d.Inputs[0] = logits)

            if shift.Op.IsSub && isLargest (made shift.Inputs[1]) shift.Inputs[0] then
                Some(ScoreFunction.Softmax, shift.Inputs[0])
            else
                None
        else
            None
    | _other -> None

/// scores, add, group_top_k, count, weights of the chosen: one pass over the tokens' logits. Counts only where they are wanted.
let router = {
    Name = "router"
    Before = "sigmoid or softmax, add, group_top_k, cast, sum; cast, mul, sum, offset, div, scale"
    After = "router"
    Kernel = KernelId.Router
    Match =
        fun graph consumers node ->
            match node.Op, node.Inputs |> Array.map graph.NodeOf with
            | Op.GroupTopK choice, [| biased |] when biased.Op.IsAdd && biased.Inputs.Length = 2 ->
                let scores, bias = graph.NodeOf biased.Inputs[0], biased.Inputs[1]
                let mask, t = node.Outputs[0], graph.Types[node.Inputs[0]]

                let counts =
                    mask
                    |> reader graph consumers (castTo DType.Int64)
                    |> Option.bind (fun cast ->
                        let sums (n: Node) = n.Op = Op.Sum [ t.Names[0]; t.Names[1] ]
                        reader graph consumers sums cast.Outputs[0])

                let weights =
                    mask
                    |> reader graph consumers (castTo DType.Float32)
                    |> Option.bind (fun cast ->
                        let ofScores (n: Node) = n.Op.IsMul && n.Inputs = [| scores.Outputs[0]; cast.Outputs[0] |]
                        reader graph consumers ofScores cast.Outputs[0])

                match weights, logitsOf graph scores with
                | Some weights, Some(score, logits) when t.Rank = 3 && graph.Types[bias].Names = [| t.Names[2] |] ->
                    let raw = weights.Outputs[0]
                    let shares = normalized graph consumers t.Names[2] raw
                    let value = shares |> Option.map fst |> Option.defaultValue raw

                    // a factor of the weights is theirs when nobody reads them without it
                    let probs, factor =
                        consumers[value]
                        |> Array.tryExactlyOne
                        |> Option.bind (fun one ->
                            match graph.Nodes[one].Op with
                            | Op.Scale k -> Some(graph.Nodes[one].Outputs[0], k)
                            | _other -> None)
                        |> Option.defaultValue (value, 1.0)

                    let spec = {
                        Score = score
                        Choice = choice
                        Normalize = shares.IsSome
                        Eps = shares |> Option.map snd |> Option.defaultValue 0.0
                        Factor = factor
                    }

                    let results = probs :: mask :: [ for c in Option.toList counts -> c.Outputs[0] ]

                    Some {
                        Operands = [ logits; bias ]
                        Results = results
                        Emit = fun emit inputs -> emit (Op.Router spec) inputs |> List.truncate results.Length
                    }
                | _other -> None
            | _other -> None
}

/// How often experts are chosen and their share of affinity, a sequence at a time: what the balance loss multiplies.
let balance = {
    Name = "balance"
    Before = "sigmoid; group_top_k, cast, mul, sum; sum, offset, div, mul, sum"
    After = "balance"
    Kernel = KernelId.Balance
    Match =
        fun graph consumers node ->
            match node.Op with
            | Op.GroupTopK {
                               TopK = topK
                               Groups = 1
                               KeepGroups = 1
                           } when (graph.NodeOf node.Inputs[0]).Op.IsSigmoid && graph.Types[node.Inputs[0]].Rank = 3 ->
                let t = graph.Types[node.Inputs[0]]

                /// The sum over the sequence of `value` weighed by position.
                let summed weight value =
                    let weighs (n: Node) =
                        n.Op.IsMul && n.Inputs[0] = value && graph.Types[n.Inputs[1]].Names = t.Names[..1]

                    value
                    |> reader graph consumers (fun n -> weighs n && (weight < 0 || n.Inputs[1] = weight))
                    |> Option.bind (fun product ->
                        product.Outputs[0]
                        |> reader graph consumers (fun n -> n.Op = Op.Sum [ t.Names[1] ])
                        |> Option.map (fun sum -> product.Inputs[1], sum.Outputs[0]))

                let counts =
                    node.Outputs[0]
                    |> reader graph consumers (castTo DType.Float32)
                    |> Option.bind (fun cast -> summed -1 cast.Outputs[0])

                match counts, normalized graph consumers t.Names[2] node.Inputs[0] with
                | Some(weight, counts), Some(share, eps) ->
                    summed weight share
                    |> Option.bind (fun (_, shares) ->
                        let logits = (graph.NodeOf node.Inputs[0]).Inputs[0]
                        one (Op.Balance(topK, eps)) [ logits; weight ] [ counts; shares ])
                | _other -> None
            | _other -> None
}

/// Blocks that a vocabulary falls into: enough for any usual split, few enough that their statistics cost nothing.
let private blockOf (vocab: int) =
    let rec gcd a b = if b = 0 then a else gcd b (a % b)
    vocab / gcd vocab 192

/// Statistics of the logits by block of the vocabulary, in forward and again in backward. Log-sum-exps of blocks combine by
/// ordinary ops, so that a split vocabulary needs what it needed before: a maximum and two sums.
let private byBlocks vocab emit inputs =
    match emit (Op.LinearLogSumExp(blockOf vocab)) inputs with
    | [ lse; at ] ->
        let first op inputs = emit op inputs |> List.head
        let largest = first (Op.Max [ Head.blocks ]) [ first Op.Detach [ lse ] ]
        let parts = first Op.Exp [ first Op.Sub [ lse; largest ] ]
        let total = first (Op.Sum [ Head.blocks ]) [ parts ]
        emit Op.Sub [ first Op.Add [ first Op.Log [ total ]; largest ]; at ]
    | _other -> []

/// log-sum-exp(h w^T) - (h w^T at the label): all logits never exist. One op where the vocabulary is whole; where `isSplit` says
/// that mesh axes split it, collectives lie between its statistics and the loss. Logits that anything else reads, or that are
/// an output, are left alone.
let linearCrossEntropy (isSplit: string -> bool) = {
    Name = "linear_cross_entropy"
    Before = "contract, cast, max, sub, exp, sum, log; pick; sub"
    After = "linear_cross_entropy; of a split vocabulary linear_log_sum_exp, max, sub, exp, sum, log, add, sub"
    Kernel = KernelId.LinearCrossEntropy
    Match =
        fun graph consumers node ->
            let made v = graph.NodeOf v
            let observed v = graph.Outputs |> Array.exists (fun (_, o) -> o = v)

            /// Read by `readers` nodes and by nobody else.
            let only readers v = consumers[v].Length = readers && not (observed v)

            match node.Op, node.Inputs |> Array.map made with
            | Op.Sub, [| log; pick |] when log.Op.IsLog && pick.Op.IsPick ->
                let sum = made log.Inputs[0]
                let exp = made sum.Inputs[0]
                let shifted = pick.Inputs[0]
                let shift = made shifted

                if exp.Op.IsExp && exp.Inputs[0] = shifted && shift.Op.IsSub && only 2 shifted then
                    let z = shift.Inputs[0]
                    let max = made shift.Inputs[1]
                    let t = graph.Types[z]
                    let vocab = Array.last t.Names

                    let ofLogits =
                        max.Op = Op.Max [ vocab ] && (let d = made max.Inputs[0] in d.Op.IsDetach && d.Inputs[0] = z)

                    // casts and anchors between the product and the loss
                    let rec product v readers =
                        let n = made v

                        match n.Op with
                        | _ when not (only readers v) -> None
                        | Op.Cast _
                        | Op.Anchor _ -> product n.Inputs[0] 1
                        | Op.Contract _ -> Some n
                        | _other -> None

                    match product z 2 with
                    | Some contract when ofLogits && sum.Op = Op.Sum [ vocab ] && t.Rank = 3 ->
                        let h, w = contract.Inputs[0], contract.Inputs[1]
                        let names v = graph.Types[v].Names

                        if
                            names h = [| t.Names[0]; t.Names[1]; (names w)[(names w).Length - 1] |]
                            && (names w)[0] = vocab
                            && (names w).Length = 2
                        then
                            Some {
                                Operands = [ h; w; pick.Inputs[1]; pick.Inputs[2] ]
                                Results = [ node.Outputs[0] ]
                                Emit =
                                    if isSplit vocab then
                                        byBlocks t.Axes[2].Extent
                                    else
                                        fun emit inputs -> emit Op.LinearCrossEntropy inputs
                            }
                        else
                            None
                    | _other -> None
                else
                    None
            | _other -> None
}

/// In the order they are tried on a node; `isSplit`: do mesh axes split the axis of that name?
let under (isSplit: string -> bool) = [
    ropeQ
    ropeKv
    permuteWithProbs
    permute
    unpermute
    addRmsNorm
    router
    balance
    linearCrossEntropy isSplit
]

/// For one rank.
let all = under (fun _ -> false)

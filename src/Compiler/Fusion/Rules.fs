/// Every fusion: name, before -> after, kernel; one record each.
module DeepSeekGraph.Compiler.Fusion.Rules

open DeepSeekGraph
open DeepSeekGraph.Ops

/// A pattern ends in a node; `Match` gives the fused op, its operands (values of the old graph), and the old values its results replace.
type Rule = {
    Name: string
    Before: string
    After: string
    Kernel: KernelId
    Match: Graph -> int[][] -> Node -> (Op * int list * int list) option
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
                        Some(Op.RopeQ false, [ nope.Inputs[0]; rope.Inputs[1] ], [ node.Outputs[0] ])
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
                        Some(Op.RopeKv n, [ kv; rope.Inputs[0]; rope.Inputs[1] ], [ node.Outputs[0]; v ])
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
                        Some(
                            Op.PermuteWithProbs,
                            [ node.Inputs[0]; probs.Inputs[0]; route ],
                            [ node.Outputs[0]; probs.Outputs[0] ]
                        )
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
            | Op.Permute false -> Some(Op.Permute true, List.ofArray node.Inputs, [ node.Outputs[0] ])
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
            | Op.Unpermute false -> Some(Op.Unpermute true, List.ofArray node.Inputs, [ node.Outputs[0] ])
            | _other -> None
}

/// In the order they are tried on a node.
let all = [ ropeQ; ropeKv; permuteWithProbs; permute; unpermute ]

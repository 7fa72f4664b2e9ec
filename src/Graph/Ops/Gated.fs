/// SwiGLU (arXiv 2002.05202), plain and with the router probability inside, as Megatron applies it.
module DeepSeekGraph.Ops.Gated

open DeepSeekGraph

let private missing = Vjp.Missing "second derivatives are not needed"

/// Axis names of the halves: x is [..., gate_up 2, f].
let private halves (types: TensorType[]) (x: int) result =
    let g = types[x].Axes[types[x].Rank - 2]

    match types |> Array.tryFindIndex (fun t -> t.Routed <> types[0].Routed) with
    | _ when g.Extent <> 2 -> Error $"axis '%s{g.Name}' is %i{g.Extent}; gate and up make 2"
    | Some i -> Error $"input 0 is %O{types[0]} but input %i{i} is %O{types[i]}: rows and dense values do not mix"
    | None -> result

let swiGlu = {
    OpDef.opaque
        "swiglu"
        "... g^ f -> ... f"
        (fun t -> halves t 0 (OpDef.sameOf [ 0 ] 1 t))
        (Vjp.Rule(fun a -> [| ValueSome(a.One Op.SwiGluGrad [ a.Dy; a.Inputs[0] ]) |])) with
        Rows = OpDef.follows 1
}

let swiGluGrad = {
    OpDef.opaque "swiglu_grad" "... f, ... g^ f -> ... g f" (fun t -> halves t 1 (OpDef.sameOf [ 0; 1 ] 1 t)) missing with
        Rows = OpDef.follows 1
        Linear = Linearity.InEach [ 0 ]
}

let swiGluProbs = {
    OpDef.opaque
        "swiglu_probs"
        "... g^ f, ... -> ... f"
        (fun t -> halves t 0 (OpDef.sameOf [ 0 ] 1 t))
        (Vjp.Rule(fun a -> a.Emit Op.SwiGluProbsGrad [ a.Dy; a.Inputs[0]; a.Inputs[1] ] |> Array.map ValueSome)) with
        Rows = OpDef.follows 1
        Linear = Linearity.InEach [ 1 ]
}

let swiGluProbsGrad = {
    OpDef.opaque
        "swiglu_probs_grad"
        "... f+, ... g^ f+, ... -> ... g f, ..."
        (fun t -> halves t 1 (OpDef.sameOf [ 0; 1 ] 1 t) |> Result.map (fun dx -> [| dx[0]; t[2].DType |]))
        missing with
        Rows = OpDef.follows 2
}

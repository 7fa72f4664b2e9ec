/// Causal scaled dot-product attention with unequal head sizes for keys and values; keeps the log-sum-exp.
module DeepSeekGraph.Ops.Attention

open DeepSeekGraph

let private flops k (inputs: TensorType[]) (outputs: TensorType[]) =
    // causal: half of the score matrix; both products
    let q, v = inputs[0], Array.last inputs
    ignore outputs
    let s = float q.Axes[1].Extent

    k * float q.Elements / float q.Axes[3].Extent
    * s
    * float (q.Axes[3].Extent + v.Axes[v.Rank - 1].Extent)

let attention scale = {
    OpDef.opaque
        "attention"
        "b s^ n d^, b t^ n d^, b t^ n e^ -> b s n e, b n s"
        (fun types ->
            let queries, keys = types[0].Axes[1].Extent, types[1].Axes[1].Extent

            if queries <> keys then
                Error $"%i{queries} queries but %i{keys} keys; the causal mask pairs them"
            else
                OpDef.sameOf [ 0; 1; 2 ] 1 types |> Result.map (fun t -> [| t[0]; DType.Float32 |]))
        (Vjp.Rule(fun a ->
            match a.Cotangents with
            | [| ValueSome dout; ValueNone |] ->
                let saved = List.ofArray a.Inputs @ List.ofArray a.Outputs
                a.Emit (Op.AttentionGrad scale) (dout :: saved) |> Array.map ValueSome
            | _other -> invalidOp "attention: only the output carries a cotangent, never the log-sum-exp")) with
        Rows = OpDef.dense 2
        Flops = flops 1.0
}

let attentionGrad = {
    OpDef.opaque
        "attention_grad"
        "b s^ n e^, b s^ n d^, b t^ n d^, b t^ n e^, b s^ n e^, b n s^ -> b s n d, b t n d, b t n e"
        (fun types ->
            OpDef.sameOf [ 0; 1; 2; 3; 4 ] 3 types
            |> Result.bind (fun t ->
                if types[5].DType = DType.Float32 then Ok t else Error "the log-sum-exp must be fp32"))
        (Vjp.Missing "second derivatives are not needed") with
        Rows = OpDef.dense 3
        Flops = fun inputs outputs -> flops 2.5 inputs[1..3] outputs
}

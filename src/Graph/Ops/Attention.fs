/// Causal scaled dot-product attention with unequal head sizes for keys and values; keeps the log-sum-exp.
/// An optional last operand lists the positions of the queries among the keys; without it query i stands at key i.
module DeepSeekGraph.Ops.Attention

open DeepSeekGraph

/// Causal: half of the score matrix, both products; queries of all ranks together see each half.
let private flops k (q: TensorType) (keys: TensorType) (v: TensorType) =
    k * float q.Elements / float q.Axes[3].Extent
    * float keys.Axes[1].Extent
    * float (q.Axes[3].Extent + v.Axes[v.Rank - 1].Extent)

/// Queries split by position when their positions are told; else the mask needs all of them.
let private withPositions (count: int) (plain: string) (positioned: string) =
    AxisRule.Custom(fun types ->
        let text = if types.Length = count + 1 then positioned else plain
        Axes.bind false (Axes.parse text) types)

let private checkPositions (count: int) (types: TensorType[]) =
    if types.Length > count && types[count].DType <> DType.Int64 then
        Error $"positions are %O{types[count]}; i64 is needed"
    else
        Ok()

let attention scale = {
    OpDef.opaque
        "attention"
        ""
        (fun types ->
            let queries, keys = types[0].Axes[1].Extent, types[1].Axes[1].Extent

            if types.Length = 3 && queries <> keys then
                Error $"%i{queries} queries but %i{keys} keys; the causal mask pairs them"
            else
                checkPositions 3 types
                |> Result.bind (fun () -> OpDef.sameOf [ 0; 1; 2 ] 1 types)
                |> Result.map (fun t -> [| t[0]; DType.Float32 |]))
        (Vjp.Rule(fun a ->
            match a.Cotangents with
            | [| ValueSome dout; ValueNone |] ->
                let saved = List.ofArray a.Inputs[..2] @ List.ofArray a.Outputs @ List.ofArray a.Inputs[3..]

                Array.append
                    (a.Emit (Op.AttentionGrad scale) (dout :: saved) |> Array.map ValueSome)
                    (Array.create (a.Inputs.Length - 3) ValueNone)
            | _other -> invalidOp "attention: only the output carries a cotangent, never the log-sum-exp")) with
        Axes =
            withPositions
                3
                "b s^ n d^, b t^ n d^, b t^ n e^ -> b s n e, b n s"
                "b s n d^, b t^ n d^, b t^ n e^, s -> b s n e, b n s"
        Rows = OpDef.dense 2
        Flops = fun inputs _ -> flops 1.0 inputs[0] inputs[1] inputs[2]
}

let attentionGrad = {
    OpDef.opaque
        "attention_grad"
        ""
        (fun types ->
            checkPositions 6 types
            |> Result.bind (fun () -> OpDef.sameOf [ 0; 1; 2; 3; 4 ] 3 types)
            |> Result.bind (fun t ->
                if types[5].DType = DType.Float32 then Ok t else Error "the log-sum-exp must be fp32"))
        (Vjp.Missing "second derivatives are not needed") with
        Axes =
            withPositions
                6
                "b s^ n e^, b s^ n d^, b t^ n d^, b t^ n e^, b s^ n e^, b n s^ -> b s n d, b t n d, b t n e"
                "b s+ n e^, b s n d^, b t^ n d^, b t^ n e^, b s n e^, b n s, s -> b s n d, b t n d, b t n e"
        Rows = OpDef.dense 3
        Flops = fun inputs _ -> flops 2.5 inputs[1] inputs[2] inputs[3]
}

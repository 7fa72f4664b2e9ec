/// Rotary position embedding: the table, the rotation, and the fused forms for MLA's queries and keys.
module DeepSeekGraph.Ops.Position

open DeepSeekGraph

/// Axis names of MLA's heads; the fused ops produce them.
let qkDim = "qk_dim"
let vDim = "v_dim"
let kvDim = "kv_dim"
let ropeDim = "rope"

let rotaryTable (spec: RotarySpec) = {
    OpDef.opaque "rotary_table" "s -> s" (fun _ -> Ok [| DType.Float32 |]) Vjp.Stop with
        // the table's last axis is not an operand's; positions are one list for all sequences, or a list for each
        Axes =
            OpDef.taking 1 (fun types ->
                if types[0].Rank <> 1 && types[0].Rank <> 2 then
                    Error $"positions are %O{types[0]}, not a list or one for each sequence"
                elif spec.Dim < 2 || spec.Dim % 2 <> 0 then
                    Error $"rotates %i{spec.Dim} features; an even number is needed"
                else
                    let carried = Axes.carry types[0] (fun _ -> Mark.Plain) id

                    Ok {
                        carried with
                            ResultAxes = [|
                                [|
                                    yield! types[0].Axes
                                    {
                                        Name = "rope_table"
                                        Extent = spec.Dim
                                    }
                                |]
                            |]
                    })
}

/// The table's leading axes (positions; or sequences, positions) are found in x by name; the rotated axis is x's last.
let private inferRope (types: TensorType[]) : Result<Rule, string> =
    let x, table = types[0], types[1]
    let last, leading = x.Rank - 1, table.Rank - 1
    let places = table.Axes |> Array.truncate leading |> Array.map (fun a -> x.IndexOf a.Name)

    let clash =
        Seq.zip (Seq.append places [ last ]) table.Axes
        |> Seq.tryFind (fun (d, a) -> d >= 0 && x.Axes[d].Extent <> a.Extent)

    if leading <> 1 && places <> [| 0; 1 |] || places |> Array.exists (fun d -> d < 0 || d = last) then
        Error $"table %O{table} has no leading axis of %O{x}"
    elif clash.IsSome then
        let d, a = clash.Value
        Error $"axis '%s{x.Axes[d].Name}' is %i{x.Axes[d].Extent} but the table has %i{a.Extent}"
    else
        let dims (d: int) (_: Axis) = if d = last then leading else System.Array.IndexOf(places, d)

        Ok {
            Factors =
                x.Axes
                |> Array.mapi (fun d a -> {
                    Letter = a.Name
                    Mark = if d = last then Mark.Whole else Mark.Plain
                    Extent = a.Extent
                    Operands = [| d; dims d a |]
                    Results = [| d |]
                })
            ResultAxes = [| x.Axes |]
        }

let private firstType (n: int) (types: TensorType[]) : Result<DType[], string> = Ok(Array.create n types[0].DType)

let rope inverse = {
    OpDef.opaque
        "rope"
        ""
        (firstType 1)
        (Vjp.Rule(fun a -> [| ValueSome(a.One (Op.Rope(not inverse)) [ a.Dy; a.Inputs[1] ]); ValueNone |])) with
        Axes = OpDef.taking 2 inferRope
        Linear = Linearity.InEach [ 0 ]
}

let ropeQ inverse = {
    OpDef.opaque
        "rope_q"
        "b s n d^, s r^ -> b s n d"
        (fun types ->
            if types[1].Axes[1].Extent > types[0].Axes[3].Extent then
                Error $"head of %i{types[0].Axes[3].Extent} features; the table rotates %i{types[1].Axes[1].Extent}"
            else
                firstType 1 types)
        (Vjp.Rule(fun a -> [| ValueSome(a.One (Op.RopeQ(not inverse)) [ a.Dy; a.Inputs[1] ]); ValueNone |])) with
        Linear = Linearity.InEach [ 0 ]
}

/// Binds letters, then gives the results the axes that letters cannot say (sums and differences of extents).
let private resized text nope (results: TensorType[] -> Axis[][]) =
    AxisRule.Custom(fun types ->
        Axes.bind false (Axes.parse text) types
        |> Result.bind (fun rule ->
            let axes = results types

            if nope < 1 || axes |> Array.exists (Array.exists (fun a -> a.Extent < 1)) then
                Error $"head sizes do not add up: %O{types[0]}, %O{types[1]}"
            else
                Ok { rule with ResultAxes = axes }))

let private withLast (axes: Axis[]) name extent =
    Array.append axes[.. axes.Length - 2] [| { Name = name; Extent = extent } |]

let private last (t: TensorType) = t.Axes[t.Rank - 1].Extent

let ropeKv nope = {
    OpDef.opaque
        "rope_kv"
        ""
        (OpDef.sameOf [ 0; 1 ] 2)
        (Vjp.Rule(fun a ->
            let zeros i =
                match a.Cotangents[i] with
                | ValueSome dy -> dy
                | ValueNone -> a.One (Op.Constant(0.0, a.Type a.Outputs[i])) []

            let grads = a.Emit (Op.RopeKvGrad nope) [ zeros 0; zeros 1; a.Inputs[2] ]
            [| ValueSome grads[0]; ValueSome grads[1]; ValueNone |])) with
        Axes =
            resized "b s n w^, b s r^, s r^ -> b s n w, b s n w" nope (fun t -> [|
                withLast t[0].Axes qkDim (nope + last t[1])
                withLast t[0].Axes vDim (last t[0] - nope)
            |])
        Rows = OpDef.dense 2
}

let ropeKvGrad nope = {
    OpDef.opaque
        "rope_kv_grad"
        ""
        (fun types ->
            if last types[0] - nope <> last types[2] then
                Error $"%i{last types[0]} key features, %i{nope} of them plain; the table rotates %i{last types[2]}"
            else
                OpDef.sameOf [ 0; 1 ] 2 types)
        (Vjp.Missing "second derivatives are not needed") with
        Axes =
            resized "b s n+ w^, b s n+ v^, s t^ -> b s n w, b s w" nope (fun t -> [|
                withLast t[0].Axes kvDim (nope + last t[1])
                [|
                    t[0].Axes[0]
                    t[0].Axes[1]
                    {
                        Name = ropeDim
                        Extent = last t[0] - nope
                    }
                |]
            |])
        Rows = OpDef.dense 2
        Linear = Linearity.JointlyInFirst 2
}

/// Matrix products: one contraction in the axis language, and its grouped forms over rows of routed tokens.
module DeepSeekGraph.Ops.Contraction

open DeepSeekGraph

/// The signature of a product of two terms; letters that the result lacks are summed.
let private spec (a: string[]) (b: string[]) (result: string[]) =
    let mark (l: string) = if Array.contains l result then l else l + "+"
    let join (letters: string[]) = String.concat " " letters
    $"%s{join (Array.map mark a)}, %s{join (Array.map mark b)} -> %s{join result}"

let private letters (terms: Letter[]) = terms |> Array.map _.Name

/// A letter of one operand alone would be a sum, not a product; say Sum for that.
let private check (text: string) (types: TensorType[]) : Result<Rule, string> =
    try
        let signature = Axes.parse text
        let term i = letters signature.Operands[i]

        if signature.Operands.Length <> 2 || signature.Results.Length <> 1 then
            Error $"'%s{text}' must have two operands and one result"
        else
            let result = letters signature.Results[0]

            let made = Array.except (Array.append (term 0) (term 1)) result

            let twice =
                [ term 0; term 1; result ]
                |> List.tryPick (fun t ->
                    t |> Array.countBy id |> Array.tryPick (fun (l, n) -> if n > 1 then Some l else None))

            let lonely =
                Array.append (Array.except (term 1) (term 0)) (Array.except (term 0) (term 1))
                |> Array.filter (fun l -> not (Array.contains l result))

            let unmarked =
                Array.concat signature.Operands
                |> Array.filter (fun l -> (l.Mark = Mark.Sum) = Array.contains l.Name result)

            if made.Length > 0 then
                Error $"letter '%s{made[0]}' of '%s{text}' is in the result only"
            elif twice.IsSome then
                Error $"letter '%s{twice.Value}' of '%s{text}' is twice in one term"
            elif lonely.Length > 0 then
                Error $"letter '%s{lonely[0]}' of '%s{text}' is in one operand only and not in the result"
            elif unmarked.Length > 0 then
                Error $"letter '%s{unmarked[0].Name}' of '%s{text}': exactly the summed letters carry '+'"
            else
                // rows go through the grouped products
                OpDef.wantRows [] types |> Result.bind (fun () -> Axes.bind true signature types)
    with :? System.ArgumentException as e ->
        Error e.Message

let contract (text: string) = {
    Name = "contract"
    Axes = AxisRule.Custom(check text)
    Result = OpDef.sameOf [ 0; 1 ] 1
    Rows = OpDef.dense 1
    Linear = Linearity.InEach [ 0; 1 ]
    Vjp =
        Vjp.Rule(fun adjoint ->
            let signature = Axes.parse text
            let a, b = letters signature.Operands[0], letters signature.Operands[1]
            let c = letters signature.Results[0]

            [|
                ValueSome(adjoint.One (Op.Contract(spec c b a)) [ adjoint.Dy; adjoint.Inputs[1] ])
                ValueSome(adjoint.One (Op.Contract(spec c a b)) [ adjoint.Dy; adjoint.Inputs[0] ])
            |])
    Flops = OpDef.contraction text
    Fusion = Fusion.Contraction
}

let private grouped name axes rows routed vjp = {
    Name = name
    Axes = AxisRule.Axes axes
    Result = fun types -> OpDef.wantRows rows types |> Result.bind (fun () -> OpDef.sameOf [ 0; 1 ] 1 types)
    Rows = fun types -> if routed then OpDef.follows 1 types else OpDef.dense 1 types
    Linear = Linearity.InEach [ 0; 1 ]
    Vjp = vjp
    Flops = OpDef.contraction axes
    Fusion = Fusion.Contraction
}

let groupedMatMul transposed =
    let axes =
        if transposed then
            "b s e ...+, e ...+ k, b s e -> b s e k"
        else
            "b s e k+, e ... k+, b s e -> b s e ..."

    grouped
        "grouped_matmul"
        axes
        [ 0; 2 ]
        true
        (Vjp.Rule(fun a ->
            let x, w, route = a.Inputs[0], a.Inputs[1], a.Inputs[2]
            let dx = a.One (Op.GroupedMatMul(not transposed)) [ a.Dy; w; route ]
            // the bank is [experts, out, in] whichever side was contracted
            let outer, inner = if transposed then x, a.Dy else a.Dy, x

            [|
                ValueSome dx
                ValueSome(a.One Op.GroupedWeightGrad [ outer; inner; route ])
                ValueNone
            |]))

let groupedWeightGrad =
    grouped
        "grouped_weight_grad"
        "b+ s+ e ..., b+ s+ e k, b+ s+ e -> e ... k"
        [ 0; 1; 2 ]
        false
        (Vjp.Missing "second derivatives of grouped products are not needed")

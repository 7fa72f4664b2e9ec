/// Reductions over named axes: sum and max.
module DeepSeekGraph.Ops.Reduction

open DeepSeekGraph

let private reduction name mark (axes: string list) vjp = {
    Name = name
    // by axis name: which dims go depends on the operand's names
    Axes =
        OpDef.taking 1 (fun types ->
            let t = types[0]

            match axes |> List.tryFind (fun n -> t.IndexOf n < 0 || (t.Routed && t.IndexOf n < 3)) with
            | Some name when t.IndexOf name < 0 -> Error $"%O{t} has no axis '%s{name}'"
            | Some name -> Error $"axis '%s{name}' of %O{t} is sparse: unpermute its rows instead"
            | None ->
                let kept = t.Axes |> Array.filter (fun a -> not (List.contains a.Name axes))

                Ok {
                    Factors =
                        t.Axes
                        |> Array.mapi (fun d a ->
                            let at = kept |> Array.tryFindIndex (fun k -> k.Name = a.Name)

                            {
                                Letter = a.Name
                                Mark = if at.IsNone then mark else Mark.Plain
                                Extent = a.Extent
                                Operands = [| d |]
                                Results = [| Option.defaultValue -1 at |]
                            })
                    ResultAxes = [| kept |]
                })
    Result = OpDef.same 1
    Rows = OpDef.follows 1
    Linear = if mark = Mark.Sum then Linearity.InEach [ 0 ] else Linearity.No
    Vjp = vjp
    Flops = OpDef.perElement 1.0
    Fusion = Fusion.Reduction
}

let sum (axes: string list) =
    reduction
        "sum"
        Mark.Sum
        axes
        (Vjp.Rule(fun a ->
            let t = a.Type a.Inputs[0]

            let widened =
                t.Axes
                |> Array.indexed
                |> Array.filter (fun (_, axis) -> List.contains axis.Name axes)
                |> Array.fold (fun dy (d, axis) -> a.One (Op.Broadcast(axis, d)) [ dy ]) a.Dy

            [| ValueSome widened |]))

let max (axes: string list) =
    reduction "max" Mark.Max axes (Vjp.Missing "the maximum is used behind Detach only (log-sum-exp shift)")

/// Collectives and local slices: what the partitioner inserts where two layouts disagree.
module DeepSeekGraph.Ops.Collective

open DeepSeekGraph

/// The partitioner knows the mesh, so it says the local result type; the op only carries it.
let private moved name (t: TensorType) = {
    Name = name
    Axes =
        AxisRule.Custom(fun types ->
            Ok {
                Factors =
                    types
                    |> Array.mapi (fun i input ->
                        input.Axes
                        |> Array.mapi (fun d a -> {
                            Letter = $"%i{i}.%s{a.Name}"
                            Mark = Mark.Whole
                            Extent = a.Extent
                            Operands = Array.init types.Length (fun k -> if k = i then d else -1)
                            Results = [| -1 |]
                        }))
                    |> Array.concat
                ResultAxes = [| t.Axes |]
            })
    Result = fun _ -> Ok [| t.DType |]
    Rows = fun _ -> [| OpDef.density t |]
    Linear = Linearity.No
    Vjp = Vjp.Missing "gradients are taken before partition"
    Flops = OpDef.free
    Fusion = Fusion.Opaque
}

let name (collective: Collective) =
    match collective with
    | Collective.AllReduceSum -> "all_reduce"
    | Collective.AllReduceMax -> "all_reduce_max"
    | Collective.AllGather _ -> "all_gather"
    | Collective.ReduceScatter _ -> "reduce_scatter"
    | Collective.AllToAll _ -> "all_to_all"
    | Collective.RouteToExperts -> "route_to_experts"
    | Collective.RowsToExperts -> "rows_to_experts"
    | Collective.RowsToTokens -> "rows_to_tokens"
    | Collective.Dispatch _ -> "dispatch"
    | Collective.Combine _ -> "combine"
    | Collective.Send _ -> "send"
    | Collective.Recv _ -> "recv"

/// With four operands a fused dispatch or combine moves probabilities too; their type follows from the others.
let private withProbs name (t: TensorType) (second: TensorType[] -> TensorType) =
    let single = moved name t

    {
        single with
            Axes =
                AxisRule.Custom(fun types ->
                    match single.Axes with
                    | AxisRule.Custom infer when types.Length = 4 ->
                        infer types
                        |> Result.map (fun rule -> {
                            Factors = rule.Factors |> Array.map (fun f -> { f with Results = [| -1; -1 |] })
                            ResultAxes = [| t.Axes; (second types).Axes |]
                        })
                    | AxisRule.Custom infer -> infer types
                    | AxisRule.Axes _
                    | AxisRule.Named _ -> Error "no rule")
            Result =
                fun types ->
                    Ok [|
                        t.DType
                        if types.Length = 4 then
                            (second types).DType
                    |]
            Rows =
                fun types -> [|
                    OpDef.density t
                    if types.Length = 4 then
                        OpDef.density (second types)
                |]
    }

let collective (kind: Collective) (t: TensorType) =
    match kind with
    | Collective.Dispatch _ ->
        withProbs (name kind) t (fun types -> {
            t with
                DType = types[1].DType
                Axes = Array.truncate 3 t.Axes
        })
    | Collective.Combine _ ->
        withProbs (name kind) t (fun types -> {
            TensorType.create types[1].DType [] with
                Axes = Array.append (Array.truncate 2 t.Axes) (Array.skip 2 (Array.truncate 3 types[3].Axes))
        })
    | _other -> moved (name kind) t

let localSlice (t: TensorType) = moved "local_slice" t

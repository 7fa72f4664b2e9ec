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
    | Collective.Send _ -> "send"
    | Collective.Recv _ -> "recv"

let collective (kind: Collective) (t: TensorType) = moved (name kind) t
let localSlice (t: TensorType) = moved "local_slice" t

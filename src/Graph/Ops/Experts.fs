/// Routing: group-limited top-k, the router and its balance in one op each, row sets, permute and unpermute, and the fused forms.
module DeepSeekGraph.Ops.Experts

open DeepSeekGraph

/// Can this many experts be chosen from so? Scores are fp32.
let private choosable (spec: TopKSpec) (scores: TensorType) (result: DType[]) =
    let experts = scores.Axes[scores.Rank - 1].Extent

    if scores.DType <> DType.Float32 then
        Error $"scores are %s{scores.DType.Name}; selection is done in fp32"
    elif spec.Groups < 1 || experts % spec.Groups <> 0 then
        Error $"%i{experts} experts do not fall into %i{spec.Groups} groups"
    elif spec.KeepGroups < 1 || spec.KeepGroups > spec.Groups then
        Error $"keeps %i{spec.KeepGroups} of %i{spec.Groups} groups"
    elif spec.TopK < 1 || spec.TopK > experts / spec.Groups * spec.KeepGroups then
        Error $"top-%i{spec.TopK} of the %i{experts / spec.Groups * spec.KeepGroups} experts in kept groups"
    else
        Ok result

let groupTopK (spec: TopKSpec) =
    OpDef.opaque "group_top_k" "b s e^ -> b s e" (fun types -> choosable spec types[0] [| DType.Bool |]) Vjp.Stop

let private missing = Vjp.Missing "second derivatives are not needed"

/// Operands `which` must be fp32.
let private wide (which: int list) (types: TensorType[]) result =
    match which |> List.tryFind (fun i -> types[i].DType <> DType.Float32) with
    | Some i -> Error $"input %i{i} is %s{types[i].DType.Name}; routers compute in fp32"
    | None -> result

let router (spec: RouterSpec) = {
    OpDef.opaque
        "router"
        "b+ s+ e^, e^ -> b s e, b s e, e"
        (fun types -> choosable spec.Choice types[0] [| DType.Float32; DType.Bool; DType.Int64 |] |> wide [ 1 ] types)
        // the choice is piecewise constant, so the bias gets nothing
        (Vjp.Rule(fun a ->
            match a.Cotangents[0] with
            | ValueSome dp -> [|
                ValueSome(a.One (Op.RouterGrad spec) [ dp; a.Inputs[0]; a.Outputs[1] ])
                ValueNone
              |]
            | ValueNone -> [| ValueNone; ValueNone |])) with
        Rows = OpDef.dense 3
}

let routerGrad = {
    OpDef.opaque
        "router_grad"
        "b s e^, b s e^, b s e^ -> b s e"
        (fun types ->
            if types[2].DType = DType.Bool then
                wide [ 0; 1 ] types (Ok [| DType.Float32 |])
            else
                Error $"the mask is %O{types[2]}; a bool one is needed")
        missing with
        Linear = Linearity.InEach [ 0 ]
}

/// Every expert is a candidate.
let private plain topK = {
    TopK = topK
    Groups = 1
    KeepGroups = 1
    ZeroMasked = false
    GroupScore = GroupScore.BestTwo
}

let balance (topK: int) (eps: float) = {
    OpDef.opaque
        "balance"
        "b s+ e^, b s+ -> b e, b e"
        (fun types -> choosable (plain topK) types[0] [| DType.Float32; DType.Float32 |] |> wide [ 1 ] types)
        (Vjp.Rule(fun a ->
            // counts are piecewise constant
            match a.Cotangents[1] with
            | ValueSome share -> [|
                ValueSome(a.One (Op.BalanceGrad eps) [ share; a.Inputs[0]; a.Inputs[1] ])
                ValueNone
              |]
            | ValueNone -> [| ValueNone; ValueNone |])) with
        Rows = OpDef.dense 2
}

let balanceGrad = {
    OpDef.opaque
        "balance_grad"
        "b e^, b s e^, b s -> b s e"
        (fun types -> wide [ 0; 1; 2 ] types (Ok [| DType.Float32 |]))
        missing with
        Linear = Linearity.InEach [ 0; 2 ]
}

let route (topK: int) (experts: int) = {
    OpDef.opaque
        "route"
        "b s e -> b s e"
        (fun types ->
            let here = types[0].Axes[2].Extent

            if types[0].DType <> DType.Bool || types[0].Routed then
                Error $"the mask is %O{types[0]}; a dense bool one is needed"
            elif topK < 1 || topK > experts then
                Error $"%i{topK} rows a token, but there are %i{experts} experts"
            elif experts % here <> 0 then
                Error $"the mask is of %i{here} experts, no part of %i{experts}"
            else
                Ok [| DType.Bool |])
        Vjp.Stop with
        Rows = fun _ -> [| float topK / float experts |]
}

/// Operands `rows` are rows; the last one is the row set.
let private typed (rows: int list) (result: TensorType[] -> Result<DType[], string>) (types: TensorType[]) =
    let route = Array.last types

    OpDef.wantRows rows types
    |> Result.bind (fun () ->
        if route.DType = DType.Bool then
            result types
        else
            Error $"the row set is %O{route}; it comes from route")

let private rows name axes (which: int list) (density: TensorType[] -> float[]) vjp = {
    OpDef.opaque name axes (typed which (OpDef.sameOf [ 0 ] 1)) vjp with
        Rows = density
        Linear = Linearity.InEach [ 0 ]
        Flops = OpDef.free
}

/// The adjoint of moving rows in is moving them out, by the same row set.
let private inverse (op: Op) = Vjp.Rule(fun a -> [| ValueSome(a.One op [ a.Dy; a.Inputs[1] ]); ValueNone |])

let permute fused = rows "permute" "b s h, b s e -> b s e h" [ 1 ] (OpDef.followsOf 1 1) (inverse (Op.Unpermute fused))
let unpermute fused = rows "unpermute" "b s e+ h, b s e+ -> b s h" [ 0; 1 ] (OpDef.dense 1) (inverse (Op.Permute fused))
let routeProbs = rows "route_probs" "b s e, b s e -> b s e" [ 1 ] (OpDef.followsOf 1 1) (inverse Op.UnrouteProbs)
let unrouteProbs = rows "unroute_probs" "b s e, b s e -> b s e" [ 0; 1 ] (OpDef.dense 1) (inverse Op.RouteProbs)

/// Both cotangents through the fused inverse, one alone through its own.
let private pair (both: Op) (first: Op) (second: Op) =
    Vjp.Rule(fun a ->
        let route = a.Inputs[2]

        match a.Cotangents[0], a.Cotangents[1] with
        | ValueSome x, ValueSome p ->
            let grads = a.Emit both [ x; p; route ]
            [| ValueSome grads[0]; ValueSome grads[1]; ValueNone |]
        | x, p -> [|
            ValueOption.map (fun dy -> a.One first [ dy; route ]) x
            ValueOption.map (fun dy -> a.One second [ dy; route ]) p
            ValueNone
          |])

let private both types =
    match OpDef.sameOf [ 0 ] 1 types, OpDef.sameOf [ 1 ] 1 types with
    | Ok x, Ok p -> Ok [| x[0]; p[0] |]
    | Error e, _
    | _, Error e -> Error e

let permuteWithProbs = {
    OpDef.opaque
        "permute_with_probs"
        "b s h, b s e, b s e -> b s e h, b s e"
        (typed [ 2 ] both)
        (pair Op.UnpermuteWithProbs (Op.Unpermute true) Op.UnrouteProbs) with
        Rows = OpDef.followsOf 2 2
        Flops = OpDef.free
}

let unpermuteWithProbs = {
    OpDef.opaque
        "unpermute_with_probs"
        "b s e+ h, b s e+, b s e+ -> b s h, b s e"
        (typed [ 0; 1; 2 ] both)
        (pair Op.PermuteWithProbs (Op.Permute true) Op.RouteProbs) with
        Rows = OpDef.dense 2
        Flops = OpDef.free
}

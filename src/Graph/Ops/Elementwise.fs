/// Element by element: add, mul, scale, silu, sigmoid, cast, ...
module DeepSeekGraph.Ops.Elementwise

open DeepSeekGraph

/// Sums a cotangent over the axes that the operand lacks, and puts the others in the operand's order.
let private reduceTo (a: Adjoint) (operand: int) (dy: int) =
    let want, have = a.Type operand, a.Type dy

    let summed =
        match have.Names |> Array.filter (fun n -> want.IndexOf n < 0) |> List.ofArray with
        | [] -> dy
        | missing -> a.One (Op.Sum missing) [ dy ]

    let names = (a.Type summed).Names

    if names = want.Names then
        summed
    else
        a.One (Op.Transpose [ for n in want.Names -> System.Array.IndexOf(names, n) ]) [ summed ]

/// Rows meet rows, dense values dense ones.
let private byName (types: TensorType[]) : Result<Rule, string> =
    match types |> Array.tryFindIndex (fun t -> t.Routed <> types[0].Routed) with
    | Some i -> Error $"input 0 is %O{types[0]} but input %i{i} is %O{types[i]}: rows and dense values do not mix"
    | None -> Axes.byName types

/// `axes` says how many operands the op takes.
let private named name axes linear vjp = {
    Name = name
    // by axis name: the second operand may lack axes of the first
    Axes = axes byName
    Result = OpDef.same 1
    Rows = OpDef.follows 1
    Linear = linear
    Vjp = vjp
    Flops = OpDef.perElement 1.0
    Fusion = Fusion.Pointwise
}

let add =
    named
        "add"
        OpDef.takingSome
        Linearity.Jointly
        (Vjp.Rule(fun a -> a.Inputs |> Array.map (fun x -> ValueSome(reduceTo a x a.Dy))))

let sub =
    named
        "sub"
        (OpDef.taking 2)
        Linearity.Jointly
        (Vjp.Rule(fun a -> [| ValueSome a.Dy; ValueSome(a.One Op.Neg [ reduceTo a a.Inputs[1] a.Dy ]) |]))

let mul =
    named
        "mul"
        (OpDef.taking 2)
        (Linearity.InEach [ 0; 1 ])
        (Vjp.Rule(fun a -> [|
            ValueSome(a.One Op.Mul [ a.Dy; a.Inputs[1] ])
            ValueSome(reduceTo a a.Inputs[1] (a.One Op.Mul [ a.Dy; a.Inputs[0] ]))
        |]))

let div =
    named
        "div"
        (OpDef.taking 2)
        (Linearity.InEach [ 0 ])
        (Vjp.Rule(fun a ->
            let y = a.Outputs[0]

            [|
                ValueSome(a.One Op.Div [ a.Dy; a.Inputs[1] ])
                // d(x/z)/dz = -y/z
                ValueSome(
                    a.One Op.Neg [
                        reduceTo a a.Inputs[1] (a.One Op.Mul [ a.Dy; a.One Op.Div [ y; a.Inputs[1] ] ])
                    ]
                )
            |]))

let private linear name vjp = {
    OpDef.pointwise name vjp with
        Linear = Linearity.InEach [ 0 ]
}

let private one (f: Adjoint -> int) = Vjp.Rule(fun a -> [| ValueSome(f a) |])

let neg = linear "neg" (one (fun a -> a.One Op.Neg [ a.Dy ]))
let scale k = linear "scale" (one (fun a -> a.One (Op.Scale k) [ a.Dy ]))
let offset = OpDef.pointwise "offset" (one (fun a -> a.Dy))
let exp = OpDef.pointwise "exp" (one (fun a -> a.One Op.Mul [ a.Dy; a.Outputs[0] ]))
let log = OpDef.pointwise "log" (one (fun a -> a.One Op.Div [ a.Dy; a.Inputs[0] ]))

let rsqrt =
    OpDef.pointwise
        "rsqrt"
        (one (fun a ->
            // -1/2 y^3
            let y = a.Outputs[0]
            let cube = a.One Op.Mul [ a.One Op.Mul [ y; y ]; y ]
            a.One (Op.Scale -0.5) [ a.One Op.Mul [ a.Dy; cube ] ]))

let sigmoid =
    OpDef.pointwise
        "sigmoid"
        (one (fun a ->
            let y = a.Outputs[0]
            let slope = a.One Op.Sub [ y; a.One Op.Mul [ y; y ] ]
            a.One Op.Mul [ a.Dy; slope ]))

let silu =
    OpDef.pointwise
        "silu"
        (one (fun a ->
            // s + y (1 - s) with s = sigmoid(x)
            let s = a.One Op.Sigmoid [ a.Inputs[0] ]
            let rest = a.One Op.Sub [ a.Outputs[0]; a.One Op.Mul [ a.Outputs[0]; s ] ]
            a.One Op.Mul [ a.Dy; a.One Op.Add [ s; rest ] ]))

let cast (dtype: DType) = {
    linear "cast" (one (fun a -> a.One (Op.Cast (a.Type a.Inputs[0]).DType) [ a.Dy ])) with
        Result = fun _ -> Ok [| dtype |]
        Vjp =
            Vjp.Rule(fun a ->
                let source = (a.Type a.Inputs[0]).DType

                [|
                    if source.IsFloat then ValueSome(a.One (Op.Cast source) [ a.Dy ]) else ValueNone
                |])
}

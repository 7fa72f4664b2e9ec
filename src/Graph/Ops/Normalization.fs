/// RMSNorm over the last axis (arXiv 1910.07467), fp32 inside.
module DeepSeekGraph.Ops.Normalization

open DeepSeekGraph

let rmsNorm eps =
    OpDef.opaque
        "rms_norm"
        "... h^, h^ -> ... h"
        (OpDef.sameOf [ 0; 1 ] 1)
        (Vjp.Rule(fun a ->
            let x, w = a.Inputs[0], a.Inputs[1]

            [|
                ValueSome(a.One (Op.RmsNormGradX eps) [ a.Dy; x; w ])
                ValueSome(a.One (Op.RmsNormGradW eps) [ a.Dy; x ])
            |]))

let rmsNormGradX = {
    OpDef.opaque
        "rms_norm_grad_x"
        "... h^, ... h^, h^ -> ... h"
        (OpDef.sameOf [ 0; 1; 2 ] 1)
        (Vjp.Missing "second derivatives are not needed") with
        Linear = Linearity.InEach [ 0 ]
        Flops = OpDef.perElement 8.0
}

let rmsNormGradW = {
    OpDef.opaque
        "rms_norm_grad_w"
        "...+ h^, ...+ h^ -> h"
        (OpDef.sameOf [ 0; 1 ] 1)
        (Vjp.Missing "second derivatives are not needed") with
        Linear = Linearity.InEach [ 0 ]
}

let addRmsNorm eps = {
    OpDef.opaque
        "add_rms_norm"
        "... h^, ... h^, h^ -> ... h, ... h"
        (OpDef.sameOf [ 0; 1; 2 ] 2)
        (Vjp.Rule(fun a ->
            // what is saved is the sum, which the residual stream keeps anyway
            let sum, w = a.Outputs[0], a.Inputs[2]

            match a.Cotangents[0], a.Cotangents[1] with
            | carried, ValueNone -> [| carried; carried; ValueNone |]
            | carried, ValueSome dy ->
                let dx =
                    match carried with
                    | ValueSome c -> a.One (Op.RmsNormGradXAdd eps) [ dy; sum; w; c ]
                    | ValueNone -> a.One (Op.RmsNormGradX eps) [ dy; sum; w ]

                [|
                    ValueSome dx
                    ValueSome dx
                    ValueSome(a.One (Op.RmsNormGradW eps) [ dy; sum ])
                |])) with
        Rows = OpDef.dense 2
        Flops = OpDef.perElement 5.0
}

let rmsNormGradXAdd = {
    OpDef.opaque
        "rms_norm_grad_x_add"
        "... h^, ... h^, h^, ... h^ -> ... h"
        (OpDef.sameOf [ 0; 1; 2; 3 ] 1)
        (Vjp.Missing "second derivatives are not needed") with
        Flops = OpDef.perElement 9.0
}

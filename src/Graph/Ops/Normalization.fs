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

/// Embedding and the label pick of cross-entropy; `vocab` lists the ids of the rank's slice, so a split needs no offset.
module DeepSeekGraph.Ops.Vocabulary

open DeepSeekGraph

/// Operand `float` decides the type; the others are ids.
let private op name axes float linear vjp = {
    OpDef.opaque
        name
        axes
        (fun types ->
            match
                types
                |> Array.indexed
                |> Array.tryFind (fun (i, t) -> i <> float && (t.DType.IsFloat || t.DType.IsBool))
            with
            | Some(i, t) -> Error $"input %i{i} is %O{t}; ids are integers"
            | None -> OpDef.sameOf [ float ] 1 types)
        vjp with
        Linear = Linearity.InEach [ linear ]
        Flops = OpDef.free
}

let embedding =
    op
        "embedding"
        "b s, v+ h, v+ -> b s h"
        1
        1
        (Vjp.Rule(fun a -> [|
            ValueNone
            ValueSome(a.One Op.EmbeddingGrad [ a.Inputs[0]; a.Dy; a.Inputs[2] ])
            ValueNone
        |]))

let embeddingGrad =
    op "embedding_grad" "b+ s+, b+ s+ h, v -> v h" 1 1 (Vjp.Missing "second derivatives are not needed")

let pick =
    op
        "pick"
        "b s v+, b s, v+ -> b s"
        0
        0
        (Vjp.Rule(fun a -> [|
            ValueSome(a.One Op.PickGrad [ a.Dy; a.Inputs[1]; a.Inputs[2] ])
            ValueNone
            ValueNone
        |]))

let pickGrad =
    op
        "pick_grad"
        "b s, b s, v -> b s v"
        0
        0
        (Vjp.Rule(fun a -> [|
            ValueSome(a.One Op.Pick [ a.Dy; a.Inputs[1]; a.Inputs[2] ])
            ValueNone
            ValueNone
        |]))

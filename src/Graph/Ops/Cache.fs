/// What generation keeps of the tokens it has seen: rows written in place by position, and attention over them.
module DeepSeekGraph.Ops.Cache

open DeepSeekGraph

let private whole (positions: TensorType) =
    if positions.DType = DType.Int64 then
        Ok()
    else
        Error $"positions are %O{positions}; i64 is needed"

/// cache[b c w], rows[b s w], positions[b s]: the cache with the rows.
let write = {
    OpDef.opaque
        "cache_write"
        "b c^ w, b s^ w, b s^ -> b c w"
        (fun types -> whole types[2] |> Result.map (fun () -> [| types[0].DType |]))
        (Vjp.Missing "caches are for generation") with
        Flops = OpDef.free
}

/// MLA with absorbed up-projections (arXiv 2405.04434, section 2.1.2): q[b s n w] holds each head's query in the space of the
/// latent, then its rope part; a cached row holds the latent, then the rope key; the result is in the space of the latent.
let attention value = {
    OpDef.opaque
        "cache_attention"
        ""
        (fun types -> whole types[2] |> Result.map (fun () -> [| types[0].DType |]))
        (Vjp.Missing "caches are for generation") with
        Axes =
            AxisRule.Custom(fun types ->
                Axes.bind false (Axes.parse "b s n w^, b c^ w^, b s -> b s n w") types
                |> Result.bind (fun rule ->
                    let axes = types[0].Axes

                    if value < 1 || value > axes[3].Extent then
                        Error $"%i{value} features to sum of rows of %i{axes[3].Extent}"
                    else
                        Ok {
                            rule with
                                ResultAxes = [| [| yield! axes[..2]; { Name = "kv_lora"; Extent = value } |] |]
                        }))
        Flops =
            fun inputs _ ->
                2.0 * float inputs[0].Elements * float inputs[1].Axes[1].Extent
                + 2.0 * float inputs[0].Elements / float inputs[0].Axes[3].Extent
                  * float value
                  * float inputs[1].Axes[1].Extent
}

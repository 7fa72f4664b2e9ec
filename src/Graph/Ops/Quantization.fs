/// Block quantisation to E4M3 (arXiv 2209.05433, scales as in arXiv 2412.19437, section 3.3.2) and back: what fp8 products read.
module DeepSeekGraph.Ops.Quantization

open DeepSeekGraph

/// A block has one scale, so that a split must leave whole blocks: a dim whose extent is no multiple of its block stays whole.
let private infer (blocks: int list) (types: TensorType[]) : Result<Rule, string> =
    let t = types[0]
    let shown = blocks |> List.map string |> String.concat ", "

    if blocks.Length <> t.Rank || blocks |> List.exists (fun n -> n < 1) then
        Error $"blocks [%s{shown}] do not fit %O{t}"
    elif t.Routed && blocks |> List.truncate 3 |> List.exists (fun n -> n > 1) then
        // which rows meet on a rank depends on the routing: a block of several would change with the layout
        Error $"blocks [%s{shown}] hold several rows of %O{t}"
    else
        let mark (a: Axis) = if a.Extent % blocks[t.IndexOf a.Name] = 0 then Mark.Plain else Mark.Whole

        Ok(Axes.carry t mark id)

let fp8 (blocks: int list) = {
    Name = "fp8_quantize"
    Axes = OpDef.taking 1 (infer blocks)
    Result = OpDef.sameOf [ 0 ] 1
    Rows = OpDef.follows 1
    Linear = Linearity.No
    Vjp = Vjp.Missing "the products of the backward pass are quantised by themselves, behind differentiation"
    Flops = OpDef.perElement 4.0
    Fusion = Fusion.Opaque
}

/// Which products run in fp8 (arXiv 2412.19437, section 3.3): all three of every linear layer but the output head and the MoE gate.
/// before: joint graph; after: their operands are rounded to E4M3 in blocks. Law: one rank or many, the same blocks. Cost: a pass over each operand.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Fp8

open DeepSeekGraph
open DeepSeekGraph.Compiler.Partition

/// Weights with these axes stay: embedding and output head, MoE gate. Norms and attention are no products with weights.
let private kept = set [ "vocab"; "router" ]

let private isQuantized (spec: ParameterSpec) (t: TensorType) =
    spec.Update.IsAdamW
    && not spec.KeepFloat32
    && t.Rank >= 2
    && t.Names |> Array.forall (fun name -> not (kept.Contains name))

/// Is this the weight of a product in fp8, under whatever names its axes have here?
let rec private isWeight (graph: Graph) (value: int) =
    let node = graph.NodeOf value

    match node.Op with
    | Op.Parameter(spec, t) -> isQuantized spec t
    | Op.Rename _ -> isWeight graph node.Inputs[0]
    | _other -> false

/// The last dim of an operand whose letter is, or is not, summed.
let private lastDim (signature: Signature) operand summed =
    signature.Operands[operand] |> Array.tryFindIndexBack (fun l -> (l.Mark = Mark.Sum) = summed)

/// Blocks of `n` along these dims; every other index for itself.
let private blocks (t: TensorType) n (dims: int list) =
    List.init t.Rank (fun d -> if List.contains d dims then n else 1)

/// A value rounded in blocks. What the backward pass reads of the forward pass is rounded again: keeping it would take memory
/// that fp8 is to save.
let private quantize (rebuild: Rewrite.Rebuild) (node: Node) (sizes: int list) (value: int) =
    let origin =
        if node.Origin.Pass.IsForward then
            node.Origin
        else
            {
                node.Origin with
                    Pass = Pass.Recompute
            }

    rebuild.Builder.Add(Op.Fp8Quantize sizes, [ value ], origin)[0]

/// Tiles of 1 x n along the features of rows or tokens, n x n of weights.
let private tile (rebuild: Rewrite.Rebuild) (node: Node) n (dims: int option list) (value: int) =
    quantize rebuild node (blocks (rebuild.Builder.Type value) n (List.choose id dims)) value

let private step (n: int) (graph: Graph) (forced: int[]) (rebuild: Rewrite.Rebuild) (node: Node) =
    let inputs = [ for v in node.Inputs -> rebuild[v] ]
    let rank v = (rebuild.Builder.Type v).Rank
    let last v = Some(rank v - 1)
    let gradientOf v = forced[v] >= 0 && isWeight graph forced[v]

    /// The product's operands, rounded; none for what is no product.
    let operands =
        match node.Op with
        | Op.Contract spec ->
            let signature = Axes.parse spec
            let weights = [ for i in 0..1 -> isWeight graph node.Inputs[i] ]

            match weights with
            // y = x W, dx = dy W: tiles of the activation along the features that are summed, blocks of the weight
            | [ true; false ]
            | [ false; true ] ->
                let operand i v =
                    if weights[i] then
                        tile rebuild node n [ lastDim signature i true; lastDim signature i false ] v
                    else
                        tile rebuild node n [ lastDim signature i true ] v

                Some(List.mapi operand inputs)
            // dW = dy x: tokens are summed. x was rounded along its features for the forward pass; its tiles are made 128 x 1 from those.
            | [ false; false ] when gradientOf node.Outputs[0] ->
                let operand i v =
                    let along = lastDim signature i true
                    let isActivation = (graph.NodeOf node.Inputs[i]).Origin.Pass.IsForward

                    let rounded = if isActivation then tile rebuild node n [ lastDim signature i false ] v else v

                    tile rebuild node n [ along ] rounded

                Some(List.mapi operand inputs)
            | _both -> None
        | Op.GroupedMatMul _ when isWeight graph node.Inputs[1] ->
            let x, w, route = inputs[0], inputs[1], inputs[2]

            Some [
                tile rebuild node n [ last x ] x
                tile rebuild node n [ last w; Some(rank w - 2) ] w
                route
            ]
        // rows that meet in a tile of 128 x 1 would depend on where tokens were sent: their tiles stay 1 x 128
        | Op.GroupedWeightGrad when gradientOf node.Outputs[0] ->
            Some [
                for i, v in List.indexed inputs do
                    // dispatched rows stay saved: those of the forward pass are rounded already, and are not sent again
                    let reader =
                        if (graph.NodeOf node.Inputs[i]).Origin.Pass.IsForward then
                            {
                                node with
                                    Origin = { node.Origin with Pass = Pass.Forward }
                            }
                        else
                            node

                    if i < 2 then tile rebuild reader n [ last v ] v else v
            ]
        | _other -> None

    match operands with
    | Some rounded -> rebuild.Put(node, node.Op, rounded)
    | None -> rebuild.Copy node

/// Rounds the operands of the products; blocks of `n` (DeepSeek: 128). 0: the graph as it is.
let run (n: int) (graph: Graph) : Graph =
    if n = 0 then
        graph
    else
        let forced = Propagate.weightGradients graph
        graph |> Rewrite.fold (step n graph forced)

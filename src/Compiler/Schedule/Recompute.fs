/// Which forward values the backward pass computes again instead of keeping.
/// before: joint graph; after: backward readers use copies made in the backward pass. Law: same values. Cost: the copied ops' FLOPs.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Recompute

open System.Collections.Generic
open DeepSeekGraph

/// Names a recipe may give, in Megatron's words.
let names = [ "core_attn" ]

let private chosen (wanted: string list) (node: Node) =
    match node.Op with
    | Op.Attention _ -> node.Origin.Pass.IsForward && List.contains "core_attn" wanted
    | _other -> false

/// Unknown names, as diagnostics.
let check (wanted: string list) : Diagnostic list = [
    for name in wanted do
        if not (List.contains name names) then
            {
                Code = Codes.UnknownRecompute
                At = "recipe.recompute"
                Message = $"recompute '%s{name}' is not known"
                Help = $"""choose from %s{String.concat ", " names}"""
            }
]

let run (wanted: string list) (graph: Graph) : Graph =
    if wanted.IsEmpty then
        graph
    else
        let again = Dictionary<int, int>()

        let step (rebuild: Rewrite.Rebuild) (node: Node) =
            if node.Origin.Pass.IsForward then
                rebuild.Copy node
            else
                let read v =
                    let maker = graph.NodeOf v

                    if chosen wanted maker then
                        if not (again.ContainsKey v) then
                            let origin = {
                                maker.Origin with
                                    Pass = Pass.Recompute
                            }

                            let made = rebuild.Builder.Add(maker.Op, [ for x in maker.Inputs -> rebuild[x] ], origin)

                            Array.iter2 (fun o m -> again[o] <- m) maker.Outputs made

                        again[v]
                    else
                        rebuild[v]

                rebuild.Put(node, node.Op, [ for v in node.Inputs -> read v ])

        graph |> Rewrite.fold step |> Rewrite.prune

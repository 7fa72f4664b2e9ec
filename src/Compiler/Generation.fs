/// A model's forward pass for generation: what is observed and the caches stay, objectives and counts go, parameters are frozen.
/// before: a forward graph with all it names; after: the same values, fewer outputs. Law: observed outputs are unchanged.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Generation

open DeepSeekGraph

/// Outputs that training needs.
let private isObjective (name: string) =
    name = "loss" || name.StartsWith "metric:" || name.StartsWith "count:"

let run (graph: Graph) : Graph =
    let kept = graph.Outputs |> Array.filter (fun (name, _) -> not (isObjective name))

    Graph(graph.Nodes, graph.Types, kept, graph.Primals)
    |> Rewrite.prune
    |> Rewrite.fold (fun rebuild node ->
        match node.Op with
        | Op.Parameter(spec, t) -> rebuild.Put(node, Op.Parameter({ spec with Update = Update.Frozen }, t), [])
        | _other -> rebuild.Copy node)

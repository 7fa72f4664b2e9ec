/// A model's forward pass for generation: what is observed and the caches stay, objectives and counts go, parameters are frozen.
/// before: a forward graph with all it names; after: the same values, fewer outputs. Law: observed outputs are unchanged.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Generation

open DeepSeekGraph

/// Outputs that training needs.
let private isObjective (name: string) = name = "loss" || name.StartsWith "metric:" || name.StartsWith "count:"

/// A parameter that no update changes; None for any other op.
let private frozen (op: Op) : Op option =
    match op with
    | Op.Parameter(spec, t) -> Some(Op.Parameter({ spec with Update = Update.Frozen }, t))
    | _other -> None

let run (graph: Graph) : Result<Graph, Diagnostic list> =
    match graph.Outputs |> Array.filter (fun (name, _) -> not (isObjective name)) with
    | [||] ->
        Error [
            {
                Code = Codes.PlanMode
                At = "recipe.mode"
                Message =
                    "nothing is left of the model: a plan that generates keeps what is observed, and it names losses only"
                Help = "choose mode train, or declare the model's pass of generation (DeepSeekV3.DeclareGeneration)"
            }
        ]
    | kept ->
        Graph(graph.Nodes, graph.Types, kept, graph.Primals)
        |> Rewrite.prune
        |> Rewrite.fold (fun rebuild node ->
            match frozen node.Op with
            | Some op -> rebuild.Put(node, op, [])
            | None -> rebuild.Copy node)
        |> Ok

/// Applies fusion rules to a forward graph.
/// before: primitive ops; after: fused ops where a rule matches. Law: every output keeps its value. Cost: one pass over nodes.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Fusion.Fuse

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler

/// A match, and the node before which the fused op stands.
type private Found = {
    Rule: Rules.Rule
    Op: Op
    Operands: int list
    Results: int list
    Origin: Origin
    At: int
}

/// Where the fused op stands: at the first of the nodes it replaces, or as soon as its operands are there.
let private place (graph: Graph) (operands: int list) (results: int list) =
    let first = results |> List.map (fun v -> graph.Producer[v]) |> List.min
    let ready = operands |> List.map (fun v -> graph.Producer[v] + 1) |> List.max
    max first ready

/// Matches that do not claim the same value twice and whose results nobody reads before the fused op stands.
let private find (rules: Rules.Rule list) (graph: Graph) =
    let consumers = Rewrite.consumers graph
    let claimed = HashSet<int>()

    [
        for rule in rules do
            for node in graph.Nodes do
                match rule.Match graph consumers node with
                | Some(op, operands, results) when results |> List.forall (fun v -> not (claimed.Contains v)) ->
                    let at = place graph operands results
                    let early = results |> List.exists (fun v -> consumers[v] |> Array.exists (fun c -> c < at))
                    let def = Catalog.define op
                    let made = OpDef.infer def (operands |> List.map (fun v -> graph.Types[v]) |> Array.ofList)

                    let same =
                        match made with
                        | Ok(_, types) -> types = (results |> List.map (fun v -> graph.Types[v]) |> Array.ofList)
                        | Error _ -> false

                    if same && not early then
                        for v in results do
                            claimed.Add v |> ignore

                        {
                            Rule = rule
                            Op = op
                            Operands = operands
                            Results = results
                            Origin = node.Origin
                            At = at
                        }
                | Some _
                | None -> ()
    ]

/// Names that no rule has, as diagnostics.
let check (choice: FusionChoice) : Diagnostic list = [
    for name in choice.Named do
        if not (Rules.all |> List.exists (fun r -> r.Name = name)) then
            {
                Code = Codes.UnknownFusion
                At = "recipe.fusions"
                Message = $"there is no fusion rule '%s{name}'"
                Help = $"""choose from %s{Rules.all |> List.map _.Name |> String.concat " "}"""
            }
]

/// The graph fused by these rules, and how often each of them was applied.
let by (rules: Rules.Rule list) (graph: Graph) : Graph * (string * int) list =
    let found = find rules graph
    let byNode = found |> List.groupBy _.At |> dict
    let claimed = HashSet(found |> Seq.collect _.Results)
    let mutable n = -1

    let step (rebuild: Rewrite.Rebuild) (node: Node) =
        n <- n + 1

        match byNode.TryGetValue n with
        | true, here ->
            for f in here do
                let made = rebuild.Builder.Add(f.Op, [ for v in f.Operands -> rebuild[v] ], f.Origin)
                List.iter2 (fun v m -> rebuild[v] <- m) f.Results (List.ofArray made)
        | false, _ -> ()

        if not (claimed.Contains node.Outputs[0]) then
            rebuild.Copy node

    let fused = graph |> Rewrite.fold step |> Rewrite.prune
    let count (rule: Rules.Rule) = found |> List.filter (fun f -> f.Rule.Name = rule.Name) |> List.length
    fused, [ for r in Rules.all -> r.Name, count r ]

/// The graph fused by all rules, and how often each was applied.
let run (graph: Graph) = by Rules.all graph

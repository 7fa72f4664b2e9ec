/// Applies fusion rules to a forward graph.
/// before: primitive ops; after: fused ops where a rule matches. Law: every output keeps its value. Cost: one pass over nodes.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Fusion.Fuse

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler

/// A match, and the node before which the fused ops stand.
type private Found = {
    Rule: Rules.Rule
    With: Rules.Replacement
    Origin: Origin
    At: int
}

/// Where the fused ops stand: at the first of the nodes they replace, or as soon as their operands are there.
let private place (graph: Graph) (r: Rules.Replacement) =
    let first = r.Results |> List.map (fun v -> graph.Producer[v]) |> List.min
    let ready = r.Operands |> List.map (fun v -> graph.Producer[v] + 1) |> List.max
    max first ready

/// An op refused its operands.
exception private Misfit

/// Do the ops, on operands of these types, make results of the types that they replace?
let private fits (graph: Graph) (origin: Origin) (r: Rules.Replacement) =
    let builder = Builder()

    let emit op inputs =
        match builder.TryAdd(op, inputs, origin) with
        | Ok values -> List.ofArray values
        | Error _ -> raise Misfit

    try
        let operands = [
            for i, v in List.indexed r.Operands -> emit (Op.Input($"operand.%i{i}", graph.Types[v])) [] |> List.head
        ]

        let made = r.Emit emit operands |> List.map builder.Type
        made = (r.Results |> List.map (fun v -> graph.Types[v]))
    with Misfit ->
        false

/// Matches that do not claim the same value twice and whose results nobody reads before the fused ops stand.
let private find (rules: Rules.Rule list) (graph: Graph) =
    let consumers = Rewrite.consumers graph
    let claimed = HashSet<int>()

    [
        for rule in rules do
            for node in graph.Nodes do
                match rule.Match graph consumers node with
                | Some r when r.Results |> List.forall (fun v -> not (claimed.Contains v)) ->
                    let at = place graph r
                    let early = r.Results |> List.exists (fun v -> consumers[v] |> Array.exists (fun c -> c < at))

                    if not early && fits graph node.Origin r then
                        for v in r.Results do
                            claimed.Add v |> ignore

                        {
                            Rule = rule
                            With = r
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
    let claimed = HashSet(found |> Seq.collect _.With.Results)
    let mutable n = -1

    let step (rebuild: Rewrite.Rebuild) (node: Node) =
        n <- n + 1

        match byNode.TryGetValue n with
        | true, here ->
            for f in here do
                let emit op inputs = List.ofArray (rebuild.Builder.Add(op, inputs, f.Origin))
                let made = f.With.Emit emit [ for v in f.With.Operands -> rebuild[v] ]
                List.iter2 (fun v m -> rebuild[v] <- m) f.With.Results made
        | false, _ -> ()

        if not (claimed.Contains node.Outputs[0]) then
            rebuild.Copy node

    let fused = graph |> Rewrite.fold step |> Rewrite.prune
    let count (rule: Rules.Rule) = found |> List.filter (fun f -> f.Rule.Name = rule.Name) |> List.length
    fused, [ for r in Rules.all -> r.Name, count r ]

/// The graph fused by all rules, and how often each was applied.
let run (graph: Graph) = by Rules.all graph

/// Which forward values the backward pass computes again instead of keeping.
/// before: joint graph; after: backward readers use copies made in the backward pass. Law: same values, bit for bit. Cost: the copied ops.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Recompute

open System
open System.Collections.Generic
open DeepSeekGraph

/// Names a recipe may give, in Megatron's words; what each selects is said at `picks`.
let names = [
    "core_attn"
    "mla_up_proj"
    "layernorm"
    "moe_act"
    "shared_experts"
    "mlp"
    "moe"
    "full"
]

/// The names that hold in a unit of the model.
type Policy = ModelUnit -> string list

/// One choice for every unit.
let everywhere (wanted: string list) : Policy = fun _ -> wanted

/// Unknown names, as diagnostics.
let check (wanted: string list) : Diagnostic list = [
    for name in wanted do
        if not (List.contains name names) then
            {
                Code = Codes.UnknownRecompute
                At = "recipe.recompute"
                Message = $"recompute '%s{name}' is not known"
                Help = $"""choose from none, %s{String.concat ", " names}, budget=BYTES"""
            }
]

let private segments (path: string) = path.Split '.'

/// The innermost scope that holds both paths.
let private common (a: string) (b: string) =
    Seq.zip (segments a) (segments b)
    |> Seq.takeWhile (fun (x, y) -> x = y)
    |> Seq.map fst
    |> String.concat "."

let private under (scope: string) (path: string) =
    scope <> "" && (path = scope || path.StartsWith(scope + ".", StringComparison.Ordinal))

/// What nodes belong to is read off module paths, units, axes and row sets, never off a list of ops.
[<Sealed>]
type private Provenance(graph: Graph) =
    let routed v = graph.Types[v].Routed

    /// A choice of experts is made once: another one would be another model. Row sets follow it.
    let decides (node: Node) = node.Outputs |> Array.exists (fun v -> graph.Types[v].DType = DType.Bool)

    let source (node: Node) = node.Inputs.Length = 0

    /// The scope of each unit's routed block: rows and the choice of experts.
    let blocks =
        let found = Dictionary<ModelUnit, string>()

        for node in graph.Nodes do
            if node.Origin.Pass.IsForward && (decides node || node.Outputs |> Array.exists routed) then
                found[node.Origin.Unit] <-
                    match found.TryGetValue node.Origin.Unit with
                    | true, scope -> common scope node.Origin.Path
                    | false, _ -> node.Origin.Path

        found

    /// Extents and names of the residual stream.
    let residual =
        graph.Nodes
        |> Array.tryPick (fun node ->
            match node.Op with
            | Op.Anchor "residual" -> Some graph.Types[node.Outputs[0]].Names
            | _other -> None)

    /// Between latents and attention: what has heads, and rotations, up to the first value of neither kind.
    let upProjections =
        let found = HashSet<int>()

        let rec walk (path: string) (heads: string) v =
            let n = graph.Producer[v]
            let node = graph.Nodes[n]
            let t = graph.Types[node.Outputs[0]]

            let mine =
                node.Origin.Path = path
                && not (source node)
                && (t.IndexOf heads >= 0 || (Catalog.define node.Op).Name.StartsWith "rope")

            if mine && found.Add n then
                for x in node.Inputs do
                    walk path heads x

        for node in graph.Nodes do
            if node.Op.IsAttention then
                let heads = graph.Types[node.Inputs[0]].Names[2]

                for v in node.Inputs do
                    walk node.Origin.Path heads v

        found

    let block (node: Node) =
        match blocks.TryGetValue node.Origin.Unit with
        | true, scope -> scope
        | false, _ -> ""

    /// Does a name select the node?
    member _.Picks(name: string, n: int) : bool =
        let node = graph.Nodes[n]
        let path = node.Origin.Path

        match name with
        // scaled dot-product attention, from rotated queries and keys
        | "core_attn" -> node.Op.IsAttention
        // from the latents to rotated queries and keys, and to values
        | "mla_up_proj" -> upProjections.Contains n
        // norms of the residual stream
        | "layernorm" ->
            (Catalog.define node.Op).Name.Contains "rms_norm"
            && Some graph.Types[node.Outputs[0]].Names = residual
        // what happens to rows between the products of the routed experts
        | "moe_act" ->
            routed node.Inputs[0]
            && Array.forall routed node.Outputs
            && not (Catalog.define node.Op).Fusion.IsContraction
            && not node.Op.IsCollective
        | "shared_experts" -> Array.contains "shared_experts" (segments path)
        // dense feed-forward layers
        | "mlp" -> Array.contains "mlp" (segments path) && not (under (block node) path)
        // the whole routed block: router, rows, experts, shared experts
        | "moe" -> under (block node) path
        // every layer from its input
        | "full" -> node.Origin.Unit.IsLayer || node.Origin.Unit.IsMtp
        | other -> invalidOp $"no recomputation is called '%s{other}' (a bug in dsg: names were checked)"

    /// May the node be made again at all?
    member _.Allows(node: Node) =
        node.Origin.Pass.IsForward
        && not node.Origin.Unit.IsShared
        && not (source node)
        && not (decides node)

/// Names for a value, which cost nothing.
let private renames (op: Op) =
    match op with
    | Op.Rename _
    | Op.Anchor _
    | Op.Detach -> true
    | _other -> false

/// Says, for one unit after the other, which forward nodes its backward readers make again.
[<Sealed>]
type Selector(graph: Graph) =
    let provenance = Provenance graph

    let members =
        graph.Nodes
        |> Array.indexed
        |> Array.filter (fun (_, node) -> provenance.Allows node)
        |> Array.groupBy (fun (_, node) -> node.Origin.Unit)
        |> Array.map (fun (part, nodes) -> part, Array.map fst nodes)
        |> dict

    /// Units with anything to select.
    member _.Units = members.Keys |> Seq.sort |> List.ofSeq

    /// Nodes of the unit that the names select, as a set. With them go names of recomputed values,
    /// and casts to wider types, whose operand is the smaller thing to keep.
    member _.Select(part: ModelUnit, names: string list) : HashSet<int> =
        let again = HashSet<int>()

        match members.TryGetValue part with
        | true, nodes ->
            for n in nodes do
                let node = graph.Nodes[n]

                let widens =
                    match node.Op with
                    | Op.Cast wide -> wide.Bytes > graph.Types[node.Inputs[0]].DType.Bytes
                    | _other -> false

                if
                    widens
                    || names |> List.exists (fun name -> provenance.Picks(name, n))
                    || (renames node.Op && again.Contains graph.Producer[node.Inputs[0]])
                then
                    again.Add n |> ignore
        | false, _ -> ()

        again

/// Backward nodes read copies of the selected nodes' results, made in the backward pass right before the first reader;
/// operands of a copy are kept or, when they are selected too, copies themselves.
let run (policy: Policy) (graph: Graph) : Graph =
    let selector = Selector graph
    let selected = HashSet<int>()

    for part in selector.Units do
        selected.UnionWith(selector.Select(part, policy part))

    if selected.Count = 0 then
        graph
    else
        let again = Dictionary<int, int>()

        let step (rebuild: Rewrite.Rebuild) (node: Node) =
            // another unit may be another stage: it keeps what it was sent
            let rec read (part: ModelUnit) v =
                let n = graph.Producer[v]
                let maker = graph.Nodes[n]

                if not (selected.Contains n) || maker.Origin.Unit <> part then
                    rebuild[v]
                else
                    match again.TryGetValue v with
                    | true, made -> made
                    | false, _ ->
                        let inputs = [ for x in maker.Inputs -> read part x ]

                        let origin = {
                            maker.Origin with
                                Pass = Pass.Recompute
                        }

                        let made = rebuild.Builder.Add(maker.Op, inputs, origin)
                        Array.iter2 (fun o m -> again[o] <- m) maker.Outputs made
                        again[v]

            if node.Origin.Pass.IsForward then
                rebuild.Copy node
            else
                rebuild.Put(node, node.Op, [ for v in node.Inputs -> read node.Origin.Unit v ])

        graph |> Rewrite.fold step |> Rewrite.prune

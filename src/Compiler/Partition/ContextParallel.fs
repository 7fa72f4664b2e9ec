/// Context parallelism of causal attention: the sequence in zigzag order, so that every rank sees as many scores as the others.
/// before: forward graph in natural order; after: values along "seq" in zigzag order, keys and values in natural order where
/// attention reads them, queries with their positions. Law: the same loss, summed in another order. Cost: what is gathered for keys.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.ContextParallel

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler

let private axis = "seq"

/// Decisive costs are integers, so that plans are equal on every machine. Picoseconds on an H100's NVLink and tensor cores,
/// at the rates that training reaches (bytes and FLOPs a microsecond).
let private bytesPerMicrosecond, private flopsPerMicrosecond = 160_000.0, 400_000_000.0

let private picoseconds (amount: float) (rate: float) = int64 (ceil (amount / rate * 1e6))

let private along (t: TensorType) = t.IndexOf axis >= 0

/// Values that begin to have a sequence: every rank has them whole.
let private enters (graph: Graph) (node: Node) =
    match node.Op with
    | Op.Input _
    | Op.Iota _ -> along graph.Types[node.Outputs[0]]
    | Op.Rename(_, into) -> into = axis
    | _other -> false

/// How the op treats the sequence: the factors of its operands' sequence axes.
let private factors (graph: Graph) (node: Node) : Factor list =
    let types = node.Inputs |> Array.map (fun v -> graph.Types[v])

    match OpDef.infer (Catalog.define node.Op) types with
    | Error _ -> []
    | Ok(rule, _) -> [
        for f in rule.Factors do
            if Array.exists2 (fun (t: TensorType) d -> d >= 0 && t.Axes[d].Name = axis) types f.Operands then
                f
      ]

/// Can the op be computed again in natural order, position by position?
let private pointwise (graph: Graph) (node: Node) =
    match node.Op with
    | Op.Anchor _
    | Op.Attention _ -> false
    | _other ->
        let all = Seq.append node.Inputs node.Outputs |> Seq.map (fun v -> graph.Types[v])

        Seq.forall (fun (t: TensorType) -> not t.Routed) all
        && node.Outputs |> Array.forall (fun v -> along graph.Types[v])
        && factors graph node |> List.forall _.Mark.IsPlain

/// The cheapest way to a value in natural order: gather it, or gather what it is made from and compute it whole on each rank.
type private Costs(mesh: MeshInfo, graph: Graph) =
    let memo = Dictionary<int, struct (int64 * bool)>()

    /// Heads are split over tp, so each rank moves and computes its share.
    let share (t: TensorType) = if t.IndexOf "heads" >= 0 then float mesh.Tensor else 1.0

    /// What the other ranks' part of the sequence adds.
    let others = float (mesh.Context - 1) / float mesh.Context

    member private this.Find(v: int) : struct (int64 * bool) =
        match memo.TryGetValue v with
        | true, known -> known
        | false, _ ->
            let node, t = graph.NodeOf v, graph.Types[v]

            let found =
                if enters graph node then
                    struct (0L, true)
                else
                    let gather = picoseconds (float t.Bytes / share t * others) bytesPerMicrosecond

                    if pointwise graph node then
                        let types = Array.map (fun v -> graph.Types[v])
                        let flops = (Catalog.define node.Op).Flops (types node.Inputs) (types node.Outputs)
                        let again = picoseconds (flops / share t * others) flopsPerMicrosecond

                        let inputs =
                            node.Inputs
                            |> Array.distinct
                            |> Array.sumBy (fun x -> if along graph.Types[x] then this.Cost x else 0L)

                        struct (min gather (again + inputs), again + inputs < gather)
                    else
                        struct (gather, false)

            memo[v] <- found
            found

    member private this.Cost(v: int) =
        let struct (cost, _) = this.Find v
        cost

    /// Is it cheaper to compute a value again than to gather it?
    member this.Again(v: int) =
        let struct (_, again) = this.Find v
        again

let private diagnose (mesh: MeshInfo) (graph: Graph) : Diagnostic list =
    [
        for node in graph.Nodes do
            if enters graph node then
                let t = graph.Types[node.Outputs[0]]
                let extent, blocks = t.Axes[t.IndexOf axis].Extent, 2 * mesh.Context

                if extent % blocks <> 0 then
                    {
                        Code = Codes.NotDivisible
                        At = "recipe.context"
                        Message =
                            $"a sequence of %i{extent} tokens does not fall into 2 x %i{mesh.Context} blocks, an early and a late one a rank"
                        Help = $"choose a sequence length that is a multiple of %i{blocks}, or a smaller context degree"
                    }
            elif node.Inputs |> Array.exists (fun v -> along graph.Types[v]) then
                let ordered = factors graph node |> List.exists _.Mark.IsWhole

                let leaves =
                    match node.Op with
                    | Op.Rename(from, _) -> from = axis
                    | _other -> false

                if leaves || ordered && not node.Op.IsAttention then
                    {
                        Code = Codes.SequenceOrder
                        At = node.Origin.Path
                        Message =
                            $"%s{(Catalog.define node.Op).Name} needs the sequence whole and in order, but context parallelism of %i{mesh.Context} splits it"
                        Help = "cut token ids before they become a sequence, or choose a context degree of 1"
                    }
    ]
    |> List.distinct

let private rewrite (mesh: MeshInfo) (graph: Graph) : Graph =
    let costs = Costs(mesh, graph)
    // per old value: itself in natural order
    let natural = Dictionary<int, int>()
    let zigzag isInverse = Op.Zigzag(axis, mesh.Context, isInverse)

    let rec inOrder (rebuild: Rewrite.Rebuild) (v: int) : int =
        match natural.TryGetValue v with
        | true, known -> known
        | false, _ ->
            let node = graph.NodeOf v
            let builder = rebuild.Builder

            if costs.Again v then
                let inputs = [
                    for x in node.Inputs -> if along graph.Types[x] then inOrder rebuild x else rebuild[x]
                ]

                Array.iter2 (fun o made -> natural[o] <- made) node.Outputs (builder.Add(node.Op, inputs, node.Origin))
            else
                natural[v] <- builder.Add(zigzag true, [ rebuild[v] ], node.Origin)[0]

            natural[v]

    /// Anchored, so that what follows runs on the rank's own part.
    let turned (builder: Builder) (origin: Origin) v =
        builder.Add(Op.Anchor "sequence", [ builder.Add(zigzag false, [ v ], origin)[0] ], origin)[0]

    let step (rebuild: Rewrite.Rebuild) (node: Node) =
        let builder = rebuild.Builder

        match node.Op with
        | Op.Attention _ when node.Inputs.Length = 3 ->
            let q = rebuild[node.Inputs[0]]
            let t = builder.Type q

            let origin = {
                node.Origin with
                    Unit = ModelUnit.Shared
            }

            let positions = builder.Add(Op.Iota t.Axes[t.IndexOf axis], [], origin)[0]

            rebuild.Put(
                node,
                node.Op,
                [
                    q
                    inOrder rebuild node.Inputs[1]
                    inOrder rebuild node.Inputs[2]
                    turned builder origin positions
                ]
            )
        | _other ->
            rebuild.Copy node

            if enters graph node then
                let v = node.Outputs[0]
                natural[v] <- rebuild[v]
                rebuild[v] <- turned builder node.Origin rebuild[v]

    graph |> Rewrite.fold step |> Rewrite.prune

/// Rewrites a forward graph for the mesh's cp degree.
let run (mesh: MeshInfo) (graph: Graph) : Result<Graph, Diagnostic list> =
    if mesh.Context = 1 then
        Ok graph
    else
        match diagnose mesh graph with
        | [] -> Ok(rewrite mesh graph)
        | wrong -> Error wrong

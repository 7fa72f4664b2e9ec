/// The flex dispatcher: permute and exchange in one dispatch, exchange and unpermute in one combine, for each block and direction.
/// before: one rank's graph; after: rows by token, which each token would hold once per expert, are never made where all of them
/// travel. Law: same values. Cost: a token crosses to a node once, however many of its experts are there.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.FusedDispatch

open System.Collections.Generic
open DeepSeekGraph

/// Nodes that one fused collective replaces. It stands where `At` stood.
type private Found = {
    At: int
    Op: Op
    Inputs: int list
    Results: int list
    Gone: int list
}

let private exchangeOf (graph: Graph) (kind: Collective) (n: int) =
    match graph.Nodes[n].Op with
    | Op.Collective(k, axes, t) when k = kind -> Some(axes, t, graph.Nodes[n])
    | _other -> None

/// Permute whose rows are read by exchanges to experts only.
let private dispatch ranks (graph: Graph) (consumers: int[][]) (n: int) : Found option =
    let node = graph.Nodes[n]

    /// The one reader of a result, an exchange.
    let sent v =
        match consumers[v] with
        | [| reader |] -> exchangeOf graph Collective.RowsToExperts reader |> Option.map (fun found -> reader, found)
        | _none_or_more -> None

    let make values results (readers: int list) axes t (exchange: Node) = {
        At = List.min readers
        Op = Op.Collective(Collective.Dispatch ranks, axes, t)
        Inputs = values @ List.ofArray exchange.Inputs[1..2]
        Results = results
        Gone = n :: readers
    }

    match node.Op with
    | Op.Permute _ ->
        sent node.Outputs[0]
        |> Option.map (fun (reader, (axes, t, exchange)) ->
            make [ node.Inputs[0] ] [ exchange.Outputs[0] ] [ reader ] axes t exchange)
    | Op.PermuteWithProbs ->
        match sent node.Outputs[0], sent node.Outputs[1] with
        | Some(x, (axes, t, rows)), Some(p, (others, _, probs)) when
            axes = others && rows.Inputs[1..] = probs.Inputs[1..]
            ->
            Some(make [ node.Inputs[0]; node.Inputs[1] ] [ rows.Outputs[0]; probs.Outputs[0] ] [ x; p ] axes t rows)
        | _ -> None
    | _other -> None

/// Unpermute of rows that came back from their experts for it alone.
let private combine ranks (graph: Graph) (consumers: int[][]) (n: int) : Found option =
    let node = graph.Nodes[n]

    let came v =
        match consumers[v] with
        | [| _ |] -> exchangeOf graph Collective.RowsToTokens graph.Producer[v]
        | _more -> None

    let make values (exchanges: Node list) axes = {
        At = n
        Op = Op.Collective(Collective.Combine ranks, axes, graph.Types[node.Outputs[0]])
        Inputs = values @ List.ofArray exchanges.Head.Inputs[1..2]
        Results = List.ofArray node.Outputs
        Gone = n :: [ for e in exchanges -> graph.Producer[e.Outputs[0]] ]
    }

    match node.Op with
    | Op.Unpermute _ ->
        came node.Inputs[0]
        |> Option.map (fun (axes, _, exchange) -> make [ exchange.Inputs[0] ] [ exchange ] axes)
    | Op.UnpermuteWithProbs ->
        match came node.Inputs[0], came node.Inputs[1] with
        | Some(axes, _, rows), Some(others, _, probs) when axes = others && rows.Inputs[1..] = probs.Inputs[1..] ->
            Some(make [ rows.Inputs[0]; probs.Inputs[0] ] [ rows; probs ] axes)
        | _ -> None
    | _other -> None

/// Do the rows that a combine takes come of a dispatch of the same row set? With the first one ranks learn which rows are a token's, without
/// which nobody can sum them.
let private follows (graph: Graph) (dispatched: Dictionary<int, int>) (c: Found) =
    let seen = HashSet<int>()
    let set = c.Inputs[c.Inputs.Length - 2]

    let rec comes value =
        seen.Add value
        && match dispatched.TryGetValue value with
           | true, other when other = set -> true
           | true, _
           | false, _ -> (graph.NodeOf value).Inputs |> Array.exists (fun v -> graph.Types[v].Routed && comes v)

    comes c.Inputs.Head

/// Fuses what can be; where rows are gathered before they are exchanged (expert tensor parallelism along one token dim), they stay.
let run (ranksPerNode: int) (p: Partitioned) : Partitioned =
    let graph = p.Graph
    let consumers = Rewrite.consumers graph

    let all fuse = List.choose (fuse ranksPerNode graph consumers) [ 0 .. graph.Nodes.Length - 1 ]
    let dispatches = all dispatch
    // the row set by expert of what each makes
    let dispatched = Dictionary<int, int>()

    for d in dispatches do
        for v in d.Results do
            dispatched[v] <- List.last d.Inputs

    let found = dispatches @ List.filter (follows graph dispatched) (all combine)

    let at = found |> List.map (fun f -> f.At, f) |> dict
    let gone = HashSet(found |> Seq.collect _.Gone)
    let where = Dictionary<int, int>()
    let mutable n = -1

    let step (rebuild: Rewrite.Rebuild) (node: Node) =
        n <- n + 1

        match at.TryGetValue n with
        | true, f ->
            let made = rebuild.Builder.Add(f.Op, [ for v in f.Inputs -> rebuild[v] ], node.Origin)
            List.iter2 (fun v m -> rebuild[v] <- m) f.Results (List.ofArray made)
        | false, _ when gone.Contains n -> ()
        | false, _ -> rebuild.Copy node

        for v in node.Outputs do
            if rebuild[v] >= 0 then
                where[rebuild[v]] <- v

        match at.TryGetValue n with
        | true, f ->
            for v in f.Results do
                where[rebuild[v]] <- v
        | false, _ -> ()

    let fused = graph |> Rewrite.fold step

    {
        Graph = fused
        Layouts = Array.init fused.Types.Length (fun v -> p.Layouts[where[v]])
    }

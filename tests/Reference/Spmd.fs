/// Evaluates one rank's graph for all ranks of a mesh in lockstep; collectives move dense values between them.
namespace DeepSeekGraph.Reference

open DeepSeekGraph

/// Every value of every rank.
[<Sealed>]
type SpmdRun(graph: Graph, layouts: AxisState[][], sizes: int[], values: DenseTensor[][]) =
    member _.Graph = graph
    /// What a rank holds of a value.
    member _.Item(value: int, rank: int) = values[value][rank]

    /// The global tensor that all ranks' shards make.
    member _.Assemble(value: int) = Shard.assemble layouts[value] sizes values[value]

    /// A named result, assembled; several of one name are summed.
    member this.Output(name: string) =
        match graph.Outputs |> Array.filter (fun (n, _) -> n = name) with
        | [||] -> invalidArg "name" $"no output %s{name}"
        | found -> found |> Array.map (fun (_, v) -> this.Assemble v) |> Array.reduce Dense.add

    member _.OutputNames = graph.Outputs |> Array.map fst |> Array.distinct

[<RequireQualifiedAccess>]
module Spmd =
    /// One collective: what each member of a group holds afterwards.
    let private exchange (kind: Collective) (members: DenseTensor[]) : DenseTensor[] =
        let n = members.Length
        let all x = Array.create n x
        let sum () = Array.reduce Dense.add members

        match kind with
        | Collective.AllReduceSum -> all (sum ())
        | Collective.AllReduceMax -> all (Array.reduce (Dense.map2 max) members)
        | Collective.AllGather d -> all (Dense.concat d members)
        | Collective.ReduceScatter d ->
            let total = sum ()
            Array.init n (fun i -> Dense.block d i n total)
        | Collective.AllToAll(split, join) ->
            Array.init n (fun i -> members |> Array.map (Dense.block split i n) |> Dense.concat join)
        | Collective.RouteToExperts
        | Collective.RowsToExperts
        | Collective.RowsToTokens
        | Collective.Send _
        | Collective.Recv _ -> invalidOp $"%A{kind} is no exchange of dense blocks"

    /// Rows change hands: the op does not say which axis split which dim, the layouts do.
    let private reshard (from: AxisState[]) (into: AxisState[]) (sizes: int[]) (shards: DenseTensor[]) =
        let whole = Shard.assemble from sizes shards
        Array.init shards.Length (fun r -> Shard.shard into sizes (Shard.coordinates sizes r) whole)

    let private collective kind axes (layouts: AxisState[][]) sizes (node: Node) (values: DenseTensor[][]) =
        let operand = values[node.Inputs[0]]

        match kind with
        | Collective.RouteToExperts
        | Collective.RowsToExperts
        | Collective.RowsToTokens -> reshard layouts[node.Inputs[0]] layouts[node.Outputs[0]] sizes operand
        | Collective.Send _
        | Collective.Recv _ -> operand
        | Collective.AllReduceSum
        | Collective.AllReduceMax
        | Collective.AllGather _
        | Collective.ReduceScatter _
        | Collective.AllToAll _ ->
            let results = Array.create operand.Length operand[0]

            for group in Shard.groups sizes axes do
                exchange kind (group |> Array.map (fun r -> operand[r]))
                |> Array.iteri (fun i x -> results[group[i]] <- x)

            results

    /// Evaluates `graph`, whose values lie as `layouts` says over mesh axes of `sizes` (axis 0 fastest), on every rank.
    /// Inputs and parameters are looked up by coordinate and name.
    let run
        (sizes: int[])
        (layouts: AxisState[][])
        (graph: Graph)
        (inputs: int[] -> string -> DenseTensor)
        (parameters: int[] -> string -> DenseTensor)
        : SpmdRun =
        let ranks = Shard.ranks sizes
        let values = Array.zeroCreate<DenseTensor[]> graph.Types.Length
        let routes = Evaluator.routes graph

        let each f = Array.init ranks (fun r -> f (Shard.coordinates sizes r))

        for node in graph.Nodes do
            let v = node.Outputs

            match node.Op with
            | Op.Parameter(spec, _) -> values[v[0]] <- each (fun c -> parameters c spec.Name)
            | Op.Input(name, _) -> values[v[0]] <- each (fun c -> inputs c name)
            | Op.Collective(kind, axes, _) -> values[v[0]] <- collective kind axes layouts sizes node values
            | Op.LocalSlice(dim, axes, _) ->
                let count = axes |> List.fold (fun n m -> n * sizes[m]) 1
                let operand = values[node.Inputs[0]]

                values[v[0]] <-
                    Array.init ranks (fun r ->
                        Dense.block dim (Shard.index sizes axes (Shard.coordinates sizes r)) count operand[r])
            | _computed ->
                let results = Array.init ranks (fun r -> Evaluator.step graph routes node (fun x -> values[x][r]))

                v |> Array.iteri (fun i x -> values[x] <- results |> Array.map (fun r -> r[i]))

            for x in v do
                for shard in values[x] do
                    if shard.Extents <> graph.Types[x].Extents then
                        invalidOp $"%s{node.Origin.Path}: %A{node.Op} gives %A{shard.Extents} for %O{graph.Types[x]}"

        SpmdRun(graph, layouts, sizes, values)

    /// As `run`, with global inputs and parameters, each cut as the layout of its source says.
    let runGlobal (sizes: int[]) (layouts: AxisState[][]) (graph: Graph) (whole: string -> DenseTensor) : SpmdRun =
        let layoutOf =
            graph.Nodes
            |> Array.choose (fun n ->
                match n.Op with
                | Op.Parameter(spec, _) -> Some(spec.Name, layouts[n.Outputs[0]])
                | Op.Input(name, _) -> Some(name, layouts[n.Outputs[0]])
                | _computed -> None)
            |> Map.ofArray

        let cut coordinate name = Shard.shard layoutOf[name] sizes coordinate (whole name)

        run sizes layouts graph cut cut

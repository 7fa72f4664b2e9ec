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
        | Collective.Dispatch _
        | Collective.Combine _
        | Collective.Send _
        | Collective.Recv _ -> invalidOp $"%A{kind} is no exchange of dense blocks"

    /// Rows change hands: the op does not say which axis split which dim, the layouts do.
    let private reshard (from: AxisState[]) (into: AxisState[]) (sizes: int[]) (shards: DenseTensor[]) =
        let whole = Shard.assemble from sizes shards
        Array.init shards.Length (fun r -> Shard.shard into sizes (Shard.coordinates sizes r) whole)

    /// A layout of [b s x ...] as one of [b s e x ...].
    let private wider (layout: AxisState[]) =
        layout
        |> Array.map (fun s ->
            match s with
            | AxisState.Split d when d >= 2 -> AxisState.Split(d + 1)
            | AxisState.Split _
            | AxisState.Replicated
            | AxisState.PartialSum
            | AxisState.PartialMax -> s)

    /// Permute, then rows to experts: the definition of a fused dispatch, value by value.
    let private dispatch (layouts: AxisState[][]) sizes (node: Node) (values: DenseTensor[][]) =
        let here = values[node.Inputs[node.Inputs.Length - 2]]

        node.Outputs
        |> Array.mapi (fun i out ->
            let x = node.Inputs[i]

            let rows, layout =
                if i = 1 then
                    Array.map2 Evaluator.mask here values[x], layouts[x]
                else
                    Array.map2
                        (fun (route: DenseTensor) (x: DenseTensor) ->
                            Dense.init (Array.insertAt 2 route.Extents[2] x.Extents) (fun j ->
                                Dense.at route j[..2] * Dense.at x (Array.removeAt 2 j)))
                        here
                        values[x],
                    wider layouts[x]

            reshard layout layouts[out] sizes rows)

    /// Rows to tokens, then unpermute.
    let private combine (layouts: AxisState[][]) sizes (node: Node) (values: DenseTensor[][]) =
        node.Outputs
        |> Array.mapi (fun i out ->
            let rows = node.Inputs[i]

            if i = 1 then
                reshard layouts[rows] layouts[out] sizes values[rows]
            else
                reshard layouts[rows] (wider layouts[out]) sizes values[rows]
                |> Array.map (fun x ->
                    let y = Dense.zeros (Array.removeAt 2 x.Extents)
                    Dense.each x.Extents (fun j -> Dense.accumulate y (Array.removeAt 2 j) (Dense.at x j))
                    y))

    let private collective kind axes (layouts: AxisState[][]) sizes (node: Node) (values: DenseTensor[][]) =
        let operand = values[node.Inputs[0]]

        match kind with
        | Collective.RouteToExperts
        | Collective.RowsToExperts
        | Collective.RowsToTokens -> reshard layouts[node.Inputs[0]] layouts[node.Outputs[0]] sizes operand
        | Collective.Dispatch _
        | Collective.Combine _
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
            | Op.Input(name, _)
            | Op.Cache(name, _) -> values[v[0]] <- each (fun c -> inputs c name)
            | Op.Collective(Collective.Dispatch _, _, _) ->
                dispatch layouts sizes node values |> Array.iteri (fun i x -> values[v[i]] <- x)
            | Op.Collective(Collective.Combine _, _, _) ->
                combine layouts sizes node values |> Array.iteri (fun i x -> values[v[i]] <- x)
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
                | Op.Input(name, _)
                | Op.Cache(name, _) -> Some(name, layouts[n.Outputs[0]])
                | _computed -> None)
            |> Map.ofArray

        let cut coordinate name = Shard.shard layoutOf[name] sizes coordinate (whole name)

        run sizes layouts graph cut cut

/// Spreads layouts through axis letters and moves values where two disagree; reads op records, names ops only where a rule is theirs.
/// before: logical joint graph; after: one rank's graph. Law: every output assembles to the same value. Cost: one pass, in node order.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.Propagate

open DeepSeekGraph

/// Where an op runs along one mesh axis.
[<RequireQualifiedAccess>]
type private Place =
    /// Each coordinate does its block of a factor.
    | Block of Factor: int
    /// Each coordinate works on its own addend of a linear op's partial operand.
    | Through
    /// Every coordinate does all of it.
    | Whole

/// A parameter, or one rounded to fp8: it lies as the parameter does.
let private parameterOf (graph: Graph) value =
    let node = graph.NodeOf value

    match node.Op with
    | Op.Parameter _ -> true
    | Op.Fp8Quantize _ -> (graph.NodeOf node.Inputs[0]).Op.IsParameter
    | _other -> false

/// The parameter that a value is a gradient of, addends included: they stay in the parameter's split.
let weightGradients (graph: Graph) =
    let forced = Array.create graph.Types.Length -1

    for n in graph.Nodes.Length - 1 .. -1 .. 0 do
        let node = graph.Nodes[n]

        for v in node.Outputs do
            let primal = graph.Primals[v]

            if primal >= 0 && parameterOf graph primal then
                forced[v] <- primal

        if node.Op.IsAdd && forced[node.Outputs[0]] >= 0 then
            for v in node.Inputs do
                if graph.Primals[v] < 0 then
                    forced[v] <- forced[node.Outputs[0]]

    forced

/// The operand whose lie decides for ops that leave or enter rows by a row set.
let private routeOperand (op: Op) =
    match op with
    | Op.Permute _
    | Op.Unpermute _
    | Op.RouteProbs
    | Op.UnrouteProbs -> Some 1
    | Op.PermuteWithProbs
    | Op.UnpermuteWithProbs -> Some 2
    | _other -> None

let private splitDim (state: AxisState) =
    match state with
    | AxisState.Split d -> Some d
    | AxisState.Replicated
    | AxisState.PartialSum
    | AxisState.PartialMax -> None

/// The one partial operand of a product that stays so; the others are resolved. The largest costs most to resolve, and of
/// equal ones the last stays.
let private carried (shards: Shards) (node: Node) (able: int list) (m: int) : int option =
    let partial = able |> List.filter (fun i -> (shards.Home node.Inputs[i]).Layout[m].IsPartialSum)

    match partial with
    | [] -> None
    | _ -> partial |> List.maxBy (fun i -> shards.Source.Types[node.Inputs[i]].Bytes, i) |> Some

/// Chooses where a node runs on mesh axis `m` (DESIGN section 4, rule 2).
let private choose
    (shards: Shards)
    (forced: int[])
    (node: Node)
    (def: OpDef)
    (rule: Rule)
    (taken: int[])
    (m: int)
    : Place =
    let graph = shards.Source
    let size = shards.Mesh.Axes[m].Size
    let state i = (shards.Home node.Inputs[i]).Layout[m]

    // blocks of one scale are not cut
    let unit f =
        match node.Op with
        | Op.Fp8Quantize blocks -> blocks[rule.Factors[f].Operands[0]]
        | _other -> 1

    let fits f =
        rule.Factors[f].Mark <> Mark.Whole
        && rule.Factors[f].Extent / (taken[f] * size) % unit f = 0
        && rule.Factors[f].Extent / taken[f] % size = 0
        && rule.Factors[f].Extent % (taken[f] * size) = 0

    let factorOfOperand i d = rule.Factors |> Array.tryFindIndex (fun f -> f.Operands[i] = d)

    let factorOfResult d = rule.Factors |> Array.tryFindIndex (fun f -> f.Results[0] = d)

    let operands = [ 0 .. node.Inputs.Length - 1 ]
    let splitOf i = splitDim (state i) |> Option.bind (factorOfOperand i)

    let place factor =
        match factor with
        | Some f when fits f -> Place.Block f
        | Some _
        | None -> Place.Whole

    /// Does mesh axis m split parameters along this axis?
    let splitsWeights name =
        match Map.tryFind name shards.Map.Parameters with
        | Some axes -> List.contains m axes
        | None -> false

    let isExperts = splitsWeights "experts" || splitsWeights "expert_ffn"

    /// Where rows are made: tokens of these ranks exchange them, or (all-gather) each makes those of its own experts.
    let routePlace () =
        let tokens = [ factorOfOperand 0 1; factorOfOperand 0 0 ] |> List.choose id

        // mesh axes that are yet to come keep the split that the mask has
        let later f =
            [ m + 1 .. shards.Mesh.Axes.Count - 1 ]
            |> List.filter (fun other ->
                (shards.Home node.Inputs[0]).Layout[other] |> splitDim |> Option.bind (factorOfOperand 0) = Some f)
            |> Layout.size shards.Mesh

        let fits f = fits f && rule.Factors[f].Extent / (taken[f] * size) % later f = 0

        if shards.Map.Dispatcher.IsAllGather then
            if splitsWeights "experts" then place (factorOfOperand 0 2) else Place.Whole
        else
            match splitOf 0 |> Option.filter (fun f -> List.contains f tokens && fits f) with
            | Some f -> Place.Block f
            | None -> place (tokens |> List.tryFind fits)

    let weight = operands |> List.tryFind (fun i -> parameterOf graph node.Inputs[i] && (splitOf i).IsSome)
    let gradientOf = forced[node.Outputs[0]]

    let anchor =
        match node.Op with
        | Op.Anchor name ->
            Map.tryFind name shards.Map.Anchors
            |> Option.map (fun names -> Layout.ofNames shards.Mesh names graph.Types[node.Outputs[0]])
        | _other -> None

    // rows are never summed between ranks: a partial operand is resolved before it becomes rows
    let intoRows =
        node.Outputs |> Array.exists (fun v -> graph.Types[v].Routed)
        && not (node.Inputs |> Array.exists (fun v -> graph.Types[v].Routed && shards.RouteOf v <> v))

    let primalState =
        let primal = graph.Primals[node.Outputs[0]]
        if primal >= 0 then Some (shards.Home primal).Layout[m] else None

    match weight, anchor, routeOperand node.Op with
    | Some i, _, _ -> place (splitOf i)
    | None, Some layout, _ -> place (splitDim layout[m] |> Option.bind factorOfResult)
    | None, None, _ when node.Op.IsRoute && isExperts -> routePlace ()
    | None, None, Some i when (splitOf i).IsSome || intoRows -> place (splitOf i)
    | None, None, _ when gradientOf >= 0 && ((shards.Home gradientOf).Layout[m] |> splitDim).IsSome ->
        place (splitDim (shards.Home gradientOf).Layout[m] |> Option.bind factorOfResult)
    | None, None, _ ->
        let bytes i = graph.Types[node.Inputs[i]].Bytes
        let votes = operands |> List.choose (fun i -> splitOf i |> Option.filter fits |> Option.map (fun f -> i, f))
        let partial = operands |> List.filter (fun i -> (state i).IsPartialSum)

        match votes, partial with
        | _ :: _, _ -> votes |> List.maxBy (fun (i, _) -> bytes i, -i) |> snd |> Place.Block
        | [], [] -> Place.Whole
        | [], _ :: _ ->
            let through =
                match def.Linear with
                | Linearity.No -> false
                | Linearity.InEach able ->
                    (carried shards node able m).IsSome && operands |> List.forall (fun i -> not (state i).IsPartialMax)
                | Linearity.Jointly -> partial.Length = operands.Length
                | Linearity.JointlyInFirst n -> partial = [ 0 .. n - 1 ]

            if through && not intoRows then
                Place.Through
            else
                place (primalState |> Option.bind splitDim |> Option.bind factorOfResult)

/// What an operand must look like on one mesh axis.
let private required (shards: Shards) (node: Node) (def: OpDef) (rule: Rule) (place: Place) i m : AxisState =
    match place with
    | Place.Block f ->
        match rule.Factors[f].Operands[i] with
        | -1 -> AxisState.Replicated
        | d -> AxisState.Split d
    | Place.Whole -> AxisState.Replicated
    | Place.Through ->
        match def.Linear with
        | Linearity.Jointly -> AxisState.PartialSum
        | Linearity.JointlyInFirst n -> if i < n then AxisState.PartialSum else AxisState.Replicated
        | Linearity.InEach able when carried shards node able m = Some i -> AxisState.PartialSum
        | Linearity.InEach _
        | Linearity.No -> AxisState.Replicated

let private resulting (rule: Rule) (place: Place) result : AxisState =
    match place with
    | Place.Whole -> AxisState.Replicated
    | Place.Through -> AxisState.PartialSum
    | Place.Block f ->
        let factor = rule.Factors[f]

        match factor.Results[result], factor.Mark with
        | -1, Mark.Max -> AxisState.PartialMax
        | -1, Mark.Sum -> AxisState.PartialSum
        | -1, (Mark.Plain | Mark.Whole) -> AxisState.Replicated
        | d, _ -> AxisState.Split d

/// A source lies as its names say; a parameter's op carries the local type.
let private source (shards: Shards) (node: Node) (layout: Layout) (op: TensorType -> Op) =
    let v = node.Outputs[0]
    let local = Layout.local shards.Mesh layout shards.Source.Types[v]

    shards.Remember(
        v,
        {
            Layout = layout
            Value = shards.Emit(op local, [], node.Origin, [| layout |])[0]
            Pass = node.Origin.Pass
            Unit = node.Origin.Unit
        }
    )

/// A complete cotangent takes its primal's layout, whole where the primal is partial (rule 3).
let private settle (shards: Shards) (node: Node) v =
    let primal = shards.Source.Primals[v]

    if primal >= 0 && not (parameterOf shards.Source primal) then
        let target =
            Array.mapi2
                (fun m (s: AxisState) (mine: AxisState) ->
                    match s with
                    | AxisState.Split _ -> s
                    // what was gathered goes on as a partial sum, to be reduced where the gathered value came from
                    | AxisState.Replicated when mine.IsPartialSum && shards.IsGathered(primal, m) -> mine
                    | AxisState.Replicated
                    | AxisState.PartialSum
                    | AxisState.PartialMax -> AxisState.Replicated)
                (shards.Home primal).Layout
                (shards.Home v).Layout

        if (shards.Home v).Layout <> target then
            let local = Reshard.toLayout shards v target node.Origin

            match shards.Copies v |> Seq.tryFind (fun c -> c.Layout = target) with
            | Some copy -> shards.Rehome(v, copy)
            | None ->
                // a constant made again in place
                shards.Rehome(
                    v,
                    {
                        shards.Home v with
                            Layout = target
                            Value = local
                    }
                )

let private compute (shards: Shards) (forced: int[]) (node: Node) =
    let graph = shards.Source
    let def = Catalog.define node.Op
    let types = node.Inputs |> Array.map (fun v -> graph.Types[v])

    let rule =
        match OpDef.infer def types with
        | Ok(rule, _) -> rule
        | Error text -> invalidOp $"%s{node.Origin.Path}: %s{text} (a bug in dsg: the graph was verified)"

    let mesh = shards.Mesh
    let taken = Array.create rule.Factors.Length 1

    let places =
        Array.init mesh.Axes.Count (fun m ->
            let place = choose shards forced node def rule taken m

            match place with
            | Place.Block f -> taken[f] <- taken[f] * mesh.Axes[m].Size
            | Place.Through
            | Place.Whole -> ()

            place)

    let inputs = [
        for i in 0 .. node.Inputs.Length - 1 do
            let want = places |> Array.mapi (fun m place -> required shards node def rule place i m)
            Reshard.toLayout shards node.Inputs[i] want node.Origin
    ]

    // whole only because an operand was gathered: every rank computes what one could have
    if node.Origin.Pass.IsForward then
        for m in 0 .. places.Length - 1 do
            if
                places[m].IsWhole
                && node.Inputs |> Array.exists (fun v -> (shards.Home v).Layout[m].IsSplit || shards.IsGathered(v, m))
            then
                for v in node.Outputs do
                    shards.SetGathered(v, m)

    let layouts = node.Outputs |> Array.mapi (fun r _ -> places |> Array.map (fun place -> resulting rule place r))
    let outputs = shards.Emit(node.Op, inputs, node.Origin, layouts)

    node.Outputs
    |> Array.iteri (fun r v ->
        let expected = Layout.local mesh layouts[r] graph.Types[v]
        let made = shards.Builder.Type outputs[r]

        if made <> expected then
            invalidOp
                $"%s{node.Origin.Path}: %s{def.Name} makes %O{made} on a rank, its layout says %O{expected} (a bug in dsg)"

        if graph.Types[v].Routed then
            shards.RouteOf v <-
                match node.Op, routeOperand node.Op with
                | Op.Route _, _ -> v
                | (Op.GroupedMatMul _ | Op.GroupedWeightGrad), _ -> node.Inputs[2]
                | _, Some i -> node.Inputs[i]
                | _, None ->
                    // elementwise: the rows of its first rows operand
                    node.Inputs |> Array.pick (fun x -> if shards.RouteOf x >= 0 then Some(shards.RouteOf x) else None)

        shards.Remember(
            v,
            {
                Layout = layouts[r]
                Value = outputs[r]
                Pass = node.Origin.Pass
                Unit = node.Origin.Unit
            }
        ))

    for v in node.Outputs do
        settle shards node v

/// One rank's graph of a logical graph.
let run (map: AxisMap) (graph: Graph) : Partitioned =
    let shards = Shards(map, graph)
    let forced = weightGradients graph

    for node in graph.Nodes do
        match node.Op with
        | Op.Parameter(spec, t) ->
            source shards node (Layout.ofNames map.Mesh map.Parameters t) (fun local -> Op.Parameter(spec, local))
        | Op.Input(name, t) ->
            source shards node (Layout.ofNames map.Mesh map.Inputs t) (fun local -> Op.Input(name, local))
        | Op.Cache(name, t) ->
            source shards node (Layout.ofNames map.Mesh map.Inputs t) (fun local -> Op.Cache(name, local))
        | Op.Constant(x, _) -> source shards node (Layout.replicated map.Mesh) (fun local -> Op.Constant(x, local))
        | Op.Iota axis -> source shards node (Layout.replicated map.Mesh) (fun _ -> Op.Iota axis)
        | _other -> compute shards forced node

    shards.Finish()

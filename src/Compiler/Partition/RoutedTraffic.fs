/// What an exchange of routed rows sends from rank to rank: expected, when any choice is as likely, or counted from a routing.
[<RequireQualifiedAccess>]
module internal DeepSeekGraph.Compiler.RoutedTraffic

open System.Collections.Generic
open DeepSeekGraph

/// One exchange between ranks that hold tokens and ranks that hold experts. flex: a token goes once to each other node that has experts
/// for it, and once to each rank there or at home that has; its rows come back as one sum a rank, and one a node.
type Exchange = {
    Choice: RouterChoice
    /// The row set by token and by expert: their layouts say who holds what.
    ByToken: SlotInfo
    ByExpert: SlotInfo
    /// Bytes that go with each row, and with each token once for each node of `RanksPerNode` ranks.
    RowBytes: float
    TokenBytes: float
    RanksPerNode: int
    /// False: from experts back to tokens.
    ToExperts: bool
}

/// Bytes that tell a row which token it is of; they go with the first dispatch of a row set.
let private placeBytes = 4.0

/// The exchange that a collective makes; none for others. `brings`: is a dispatch the first of its row set?
let ofCollective
    (slot: int -> SlotInfo)
    (choice: int -> RouterChoice option)
    brings
    kind
    (inputs: IReadOnlyList<int>)
    outputs
    =
    let width (skipped: int) (s: SlotInfo) = Seq.skip skipped s.Extents |> Seq.fold (*) 1 |> (*) s.DType.Bytes |> float

    let make byToken byExpert toExperts ranks rows tokens =
        choice inputs[byToken]
        |> Option.map (fun choice -> {
            Choice = choice
            ByToken = slot inputs[byToken]
            ByExpert = slot inputs[byExpert]
            RowBytes = rows
            TokenBytes = tokens
            RanksPerNode = ranks
            ToExperts = toExperts
        })

    let last = inputs.Count - 1
    let tuples () = seq { for i in 0..3..last -> width 3 (slot inputs[i]) } |> Seq.sum
    // probabilities are the second value, one for each row
    let probabilities = if inputs.Count > 3 then float (slot inputs[1]).DType.Bytes else 0.0

    match kind with
    | Collective.RowsToExperts -> make 1 2 true 1 (tuples ()) 0.0
    | Collective.RowsToTokens -> make 2 1 false 1 (tuples ()) 0.0
    | Collective.Dispatch ranks ->
        let places = if brings then placeBytes else 0.0
        make (last - 1) last true ranks (probabilities + places) (width 2 (slot inputs[0]))
    | Collective.Combine ranks -> make last (last - 1) false ranks probabilities (width 2 (slot (Seq.head outputs)))
    | Collective.AllReduceSum
    | Collective.AllReduceMax
    | Collective.AllGather _
    | Collective.ReduceScatter _
    | Collective.AllToAll _
    | Collective.RouteToExperts
    | Collective.Send _
    | Collective.Recv _ -> None

/// Does this collective bring a row set the places of its tokens' rows? `seen`: sets that have them, which it adds to.
let brings (seen: HashSet<int>) (kind: Collective) (inputs: IReadOnlyList<int>) =
    kind.IsDispatch && seen.Add inputs[inputs.Count - 1]

/// What members of a group, and nodes of theirs, get of one member's tokens.
type private Share = {
    /// Per member: rows, and tokens with at least one row.
    Rows: float[]
    Tokens: float[]
    /// Per node, in the order of `nodesOf`: tokens with at least one row there.
    Nodes: float[]
}

/// Bytes by sender: to all others, and to other nodes.
type Sent = {
    All: Dictionary<int, float>
    Away: Dictionary<int, float>
}

/// Nodes of a group, each with its members' places in the group.
let private nodesOf perNode (group: int[]) : int[][] =
    Array.init group.Length id |> Array.groupBy (fun m -> group[m] / perNode) |> Array.map snd

/// When any choice is as likely: everybody's tokens fall on experts alike.
let private expected (mesh: MeshInfo) (e: Exchange) (group: int[]) (nodes: int[][]) : int -> Share =
    let known = Dictionary<int list, float>()
    let size = e.Choice.Experts / e.Choice.Groups

    let experts = [|
        for rank in group ->
            let struct (first, count) = Routing.block mesh e.ByExpert 2 (Mesh.coordinates mesh rank)
            [| first .. first + count - 1 |]
    |]

    let reached (owned: int seq) =
        let perGroup = Array.zeroCreate<int> e.Choice.Groups

        for expert in owned do
            perGroup[expert / size] <- perGroup[expert / size] + 1

        let key = perGroup |> Array.sort |> List.ofArray

        match known.TryGetValue key with
        | true, share -> share
        | false, _ ->
            let share = Routing.reached e.Choice perGroup
            known[key] <- share
            share

    let tokens = float (e.ByToken.Extents[0] * e.ByToken.Extents[1])
    let rows = float e.Choice.TopK / float e.Choice.Experts

    let share = {
        Rows = [| for own in experts -> tokens * rows * float own.Length |]
        Tokens = [| for own in experts -> tokens * reached own |]
        Nodes = [|
            for members in nodes -> tokens * reached (members |> Seq.collect (fun m -> experts[m]))
        |]
    }

    fun _ -> share

/// From a routing: token by token.
let private counted (mesh: MeshInfo) (seqLength: int) (routing: IRouting) microbatch e (group: int[]) (nodes: int[][]) =
    let holder = Array.create e.Choice.Experts -1

    group
    |> Array.iteri (fun m rank ->
        let struct (first, count) = Routing.block mesh e.ByExpert 2 (Mesh.coordinates mesh rank)
        Array.fill holder first count m)

    let nodeOf = Array.zeroCreate<int> group.Length
    nodes |> Array.iteri (fun v members -> members |> Array.iter (fun m -> nodeOf[m] <- v))

    fun (me: int) ->
        let coordinates = Mesh.coordinates mesh group[me]
        let struct (firstRow, rows) = Routing.block mesh e.ByToken 0 coordinates
        let struct (firstPlace, places) = Routing.block mesh e.ByToken 1 coordinates

        let share = {
            Rows = Array.zeroCreate group.Length
            Tokens = Array.zeroCreate group.Length
            Nodes = Array.zeroCreate nodes.Length
        }

        let inc (counts: float[]) i = counts[i] <- counts[i] + 1.0

        for row in firstRow .. firstRow + rows - 1 do
            for place in firstPlace .. firstPlace + places - 1 do
                let position = ZigzagOrder.natural mesh.Context seqLength place

                let members =
                    routing.Chosen(e.Choice.Path, microbatch, row, position)
                    |> Seq.map (fun expert -> holder[expert])
                    // experts of other ranks' slices
                    |> Seq.filter (fun m -> m >= 0)
                    |> Array.ofSeq

                members |> Array.iter (inc share.Rows)
                members |> Array.distinct |> Array.iter (inc share.Tokens)
                members |> Array.map (fun m -> nodeOf[m]) |> Array.distinct |> Array.iter (inc share.Nodes)

        share

/// Bytes of one run of an exchange in these groups. A token enters another node at the member with its sender's place there, and goes on
/// from it to the others that hold experts of it; what comes back takes the same way. `routing`: none, or one and the microbatch.
let run
    gpusPerNode
    (mesh: MeshInfo)
    seqLength
    (routing: (IRouting * int) option)
    (groups: int[][])
    (e: Exchange)
    : Sent =
    let all, away = Dictionary<int, float>(), Dictionary<int, float>()

    let put (sums: Dictionary<int, float>) rank bytes =
        match sums.TryGetValue rank with
        | true, sum -> sums[rank] <- sum + bytes
        | false, _ -> sums[rank] <- bytes

    let add (from: int) (into: int) bytes =
        let sender, receiver = if e.ToExperts then from, into else into, from

        if sender <> receiver && bytes > 0.0 then
            put all sender bytes

            if sender / gpusPerNode <> receiver / gpusPerNode then
                put away sender bytes

    for group in groups do
        let nodes = nodesOf e.RanksPerNode group

        let share =
            match routing with
            | None -> expected mesh e group nodes
            | Some(known, microbatch) -> counted mesh seqLength known microbatch e group nodes

        nodes
        |> Array.iteri (fun own senders ->
            senders
            |> Array.iteri (fun place me ->
                let goes = share me

                for m in 0 .. group.Length - 1 do
                    add group[me] group[m] (goes.Rows[m] * e.RowBytes)

                if e.TokenBytes > 0.0 then
                    nodes
                    |> Array.iteri (fun v members ->
                        let gate = if v = own then me else members[place % members.Length]
                        add group[me] group[gate] (goes.Nodes[v] * e.TokenBytes)

                        for m in members do
                            add group[gate] group[m] (goes.Tokens[m] * e.TokenBytes))))

    { All = all; Away = away }

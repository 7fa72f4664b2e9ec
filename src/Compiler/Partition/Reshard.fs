/// Moving a value to another layout: slice, reduce-scatter, all-to-all, all-reduce, all-gather, one collective per kind.
/// before: a value in some layouts; after: the wanted one too. Law: the assembled value stays the same. Cost: what the layouts say.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.Reshard

open DeepSeekGraph

/// What one mesh axis asks for.
[<RequireQualifiedAccess; Struct>]
type private Move =
    | Stay
    | Slice of Into: int
    | Scatter of To: int
    | Exchange of From: int * Dest: int
    | Reduce
    | ReduceMax
    | Gather of Dim: int

let private move (from: AxisState) (into: AxisState) =
    match from, into with
    | AxisState.Replicated, AxisState.Split d -> Move.Slice d
    | AxisState.PartialSum, AxisState.Split d -> Move.Scatter d
    | AxisState.PartialSum, AxisState.Replicated -> Move.Reduce
    | AxisState.PartialMax, (AxisState.Replicated | AxisState.Split _) -> Move.ReduceMax
    | AxisState.Split d, AxisState.Replicated -> Move.Gather d
    | AxisState.Split d, AxisState.Split e when d <> e -> Move.Exchange(d, e)
    | AxisState.Split _, AxisState.Split _
    | AxisState.Replicated, AxisState.Replicated
    | AxisState.PartialSum, AxisState.PartialSum
    | AxisState.PartialMax, AxisState.PartialMax -> Move.Stay
    | _from, (AxisState.PartialSum | AxisState.PartialMax) -> invalidOp "a whole value never becomes partial"

/// Collectives that a way from one layout to another needs (slices are free).
let private distance (from: Layout) (into: Layout) =
    Array.map2 move from into |> Array.filter (fun m -> not (m.IsStay || m.IsSlice)) |> Array.length

/// A whole value never becomes partial again: such a copy is no start.
let private leadsTo (into: Layout) (from: Layout) =
    Array.forall2 (fun (f: AxisState) (i: AxisState) -> f = i || not (i.IsPartialSum || i.IsPartialMax)) from into

/// A dim is cut or joined along mesh axes that are faster than all that keep splitting it; else blocks would not be contiguous.
let private contiguous (layout: Layout) (dim: int) (axes: int list) =
    let others = Layout.axesOn layout dim |> List.except axes
    others.IsEmpty || axes.IsEmpty || List.max axes < List.min others

let private withState (layout: Layout) (axes: int list) state =
    layout |> Array.mapi (fun m s -> if List.contains m axes then state else s)

/// Cheapest first: what comes early makes what follows smaller (DESIGN section 4, rule 6).
let private rank (move: Move) =
    match move with
    | Move.Stay
    | Move.Slice _ -> 0
    | Move.Scatter _ -> 1
    | Move.Exchange _ -> 2
    | Move.Reduce -> 3
    | Move.ReduceMax -> 4
    | Move.Gather _ -> 5

let private isContiguous (layout: Layout) (move: Move) axes =
    match move with
    | Move.Slice d
    | Move.Scatter d
    | Move.Gather d -> contiguous layout d axes
    | Move.Exchange(d, e) -> contiguous layout d axes && contiguous layout e axes
    | Move.Stay
    | Move.Reduce
    | Move.ReduceMax -> true

/// The next step towards `into`: collective (none: a local slice), mesh axes, dim, layout afterwards.
let private step (from: Layout) (into: Layout) : (Collective option * int list * int * Layout) option =
    [ 0 .. from.Length - 1 ]
    |> List.groupBy (fun m -> move from[m] into[m])
    |> List.filter (fun (move, axes) -> not move.IsStay && isContiguous from move axes)
    |> List.sortBy (fst >> rank)
    |> List.tryHead
    |> Option.bind (fun (move, axes) ->
        let next collective dim state = Some(collective, axes, dim, withState from axes state)

        match move with
        | Move.Stay -> None
        | Move.Slice d -> next None d (AxisState.Split d)
        | Move.Scatter d -> next (Some(Collective.ReduceScatter d)) d (AxisState.Split d)
        | Move.Exchange(d, e) -> next (Some(Collective.AllToAll(e, d))) e (AxisState.Split e)
        | Move.Reduce -> next (Some Collective.AllReduceSum) -1 AxisState.Replicated
        | Move.ReduceMax -> next (Some Collective.AllReduceMax) -1 AxisState.Replicated
        | Move.Gather d -> next (Some(Collective.AllGather d)) d AxisState.Replicated)

/// Where blocks would not be contiguous: whole on every dim that changes, from where slices lead on.
let private detour (from: Layout) (into: Layout) : Layout =
    let dims = [
        for m in 0 .. from.Length - 1 do
            match move from[m] into[m] with
            | Move.Slice d
            | Move.Scatter d
            | Move.Gather d -> d
            | Move.Exchange(d, e) ->
                d
                e
            | Move.Stay
            | Move.Reduce
            | Move.ReduceMax -> ()
    ]

    Array.map2
        (fun state target ->
            match state with
            | AxisState.Split d when List.contains d dims -> AxisState.Replicated
            | _other when state <> target -> AxisState.Replicated
            | _other -> state)
        from
        into

/// May this copy serve a reader in `origin`?
let private usable (shards: Shards) value (origin: Origin) (copy: Copy) =
    let home = shards.Home value
    let t = shards.Builder.Type

    obj.ReferenceEquals(copy, home)
    || (copy.Unit = origin.Unit && copy.Pass.IsForward = origin.Pass.IsForward)
    // row sets are exchanged once a block, forward and backward
    || (copy.Unit = origin.Unit && shards.RouteOf value = value)
    // a later pass starts from a resolved copy that is no larger than the value itself
    || (copy.Unit = origin.Unit && copy.Pass.IsForward && (t copy.Value).Bytes <= (t home.Value).Bytes)

let private isRows (shards: Shards) value = shards.Source.Types[value].Routed

/// A local value id of `value` laid out as `want`, for a reader in `origin`; moves it if no copy lies so.
let rec toLayout (shards: Shards) (value: int) (want: Layout) (origin: Origin) : int =
    let candidates =
        shards.Copies value
        |> Seq.filter (fun c -> usable shards value origin c && leadsTo want c.Layout)
        |> List.ofSeq

    match candidates |> List.tryFind (fun c -> c.Layout = want) with
    | Some copy -> copy.Value
    | None ->
        let source = shards.Source.NodeOf value

        match source.Op with
        | Op.Constant(number, t) ->
            let op = Op.Constant(number, Layout.local shards.Mesh want t)
            remember shards value want origin (shards.Emit(op, [], origin, [| want |])[0])
        | _other ->
            let size copy = (shards.Builder.Type copy.Value).Bytes

            if isRows shards value then
                let isSet = shards.RouteOf value = value

                let reachable =
                    candidates |> List.choose (fun c -> Rows.distance isSet c.Layout want |> Option.map (fun d -> c, d))

                match reachable with
                | [] -> refuseRows shards (shards.Home value).Layout want origin
                | some -> moveRows shards value (some |> List.minBy (fun (c, d) -> d, size c) |> fst) want origin
            else
                walk shards value (candidates |> List.minBy (fun c -> distance c.Layout want, size c)) want origin

and private remember (shards: Shards) value layout (origin: Origin) local : int =
    shards.Remember(
        value,
        {
            Layout = layout
            Value = local
            Pass = origin.Pass
            Unit = origin.Unit
        }
    )

    local

/// Dense values: one step after the other; each intermediate is a copy as well.
and private walk (shards: Shards) value (from: Copy) (want: Layout) (origin: Origin) : int =
    let t = shards.Source.Types[value]

    let emit (collective: Collective option) axes dim (next: Layout) =
        let local = Layout.local shards.Mesh next t

        let op =
            match collective with
            | Some kind -> Op.Collective(kind, axes, local)
            | None -> Op.LocalSlice(dim, axes, local)

        let moved = shards.Emit(op, [ from.Value ], origin, [| next |])[0]
        remember shards value next origin moved |> ignore

        walk
            shards
            value
            {
                Layout = next
                Value = moved
                Pass = origin.Pass
                Unit = origin.Unit
            }
            want
            origin

    if from.Layout = want then
        from.Value
    else
        match step from.Layout want with
        | Some(collective, axes, dim, next) -> emit collective axes dim next
        | None ->
            let middle = detour from.Layout want

            walk
                shards
                value
                {
                    from with
                        Layout = middle
                        Value = walk shards value from middle origin
                }
                want
                origin

/// Rows go to their experts and back by their row set; along axes that split experts' features they are gathered and summed.
and private moveRows (shards: Shards) value (from: Copy) (want: Layout) (origin: Origin) : int =
    if from.Layout = want then
        from.Value
    else
        match Rows.step from.Layout want with
        | None -> refuseRows shards from.Layout want origin
        | Some(kind, axes, next) ->
            let route = shards.RouteOf value
            let op kind = Op.Collective(kind, axes, Layout.local shards.Mesh next shards.Source.Types[value])

            let op, inputs =
                match kind with
                | Collective.RowsToExperts when route = value -> op Collective.RouteToExperts, [ from.Value ]
                | Collective.AllReduceSum -> op kind, [ from.Value ]
                | _gather when route = value -> op kind, [ from.Value ]
                | _exchange ->
                    op kind,
                    [
                        from.Value
                        toLayout shards route (Rows.setLayout from.Layout) origin
                        toLayout shards route (Rows.setLayout next) origin
                    ]

            let moved = shards.Emit(op, inputs, origin, [| next |])[0]
            remember shards value next origin moved |> ignore

            moveRows
                shards
                value
                {
                    Layout = next
                    Value = moved
                    Pass = origin.Pass
                    Unit = origin.Unit
                }
                want
                origin

and private refuseRows (shards: Shards) (from: Layout) (want: Layout) (origin: Origin) : int =
    let names =
        [ 0 .. want.Length - 1 ]
        |> List.filter (fun m -> from[m] <> want[m])
        |> List.map (fun m -> shards.Mesh.Axes[m].Name)
        |> String.concat " x "

    raise (
        DiagnosticException.Of(
            Codes.RowsLayout,
            origin.Path,
            $"routed rows would have to change their split over mesh axes %s{names}; they are exchanged only between ranks of different tokens and ranks of different experts",
            "anchor the routed input as 'residual' so that tokens are split there, or choose expert parallelism 1"
        )
    )

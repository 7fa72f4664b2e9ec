/// Steps by which routed rows change their layout: exchange between tokens and experts, gather and sum over tokens.
/// Rows have token dims 0 (batch) and 1 (seq), and dim 2, the experts. With ETP: all-to-all over ep, then all-gather over etp, and
/// back the other way round; where both would cut one token dim, the order is turned, for blocks must stay contiguous.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.Rows

open DeepSeekGraph

let private tokenDim (state: AxisState) =
    match state with
    | AxisState.Split d when d < 2 -> Some d
    | AxisState.Split _
    | AxisState.Replicated
    | AxisState.PartialSum
    | AxisState.PartialMax -> None

let private isExpert (state: AxisState) = state = AxisState.Split 2

/// A dim is cut or joined along mesh axes that are faster than all that keep splitting it.
let private contiguous (layout: Layout) (dim: int) (axes: int list) =
    let others = Layout.axesOn layout dim |> List.except axes
    others.IsEmpty || axes.IsEmpty || List.max axes < List.min others

/// How the row set of rows in this layout lies: it never is a sum.
let setLayout (layout: Layout) : Layout =
    layout
    |> Array.map (fun s ->
        match s with
        | AxisState.Split d when d < 3 -> s
        | AxisState.Split _
        | AxisState.Replicated
        | AxisState.PartialSum
        | AxisState.PartialMax -> AxisState.Replicated)

let private where test (from: Layout) (want: Layout) = [
    for m in 0 .. from.Length - 1 do
        if test from[m] want[m] then
            m
]

let private changed (from: Layout) (axes: int list) (state: int -> AxisState) : Layout =
    from |> Array.mapi (fun m s -> if List.contains m axes then state m else s)

/// Towards the experts: exchange, then gather along seq, then along batch; what would leave blocks in pieces waits.
let private forth (from: Layout) (want: Layout) : (Collective * int list * Layout) option =
    let exchange () =
        let axes = where (fun f w -> (tokenDim f).IsSome && isExpert w) from want
        let next = changed from axes (fun _ -> AxisState.Split 2)
        let cut d = axes |> List.filter (fun m -> tokenDim from[m] = Some d)

        if not axes.IsEmpty && contiguous next 2 axes && contiguous from 0 (cut 0) && contiguous from 1 (cut 1) then
            Some(Collective.RowsToExperts, axes, next)
        else
            None

    let gather d () =
        match where (fun f w -> f = AxisState.Split d && w.IsReplicated) from want with
        | axes when not axes.IsEmpty && contiguous from d axes ->
            Some(Collective.AllGather d, axes, changed from axes (fun _ -> AxisState.Replicated))
        | _none -> None

    [ exchange; gather 1; gather 0 ] |> List.tryPick (fun attempt -> attempt ())

let rec private path (from: Layout) (want: Layout) : (Collective * int list) list option =
    if from = want then
        Some []
    else
        forth from want
        |> Option.bind (fun (kind, axes, next) -> path next want |> Option.map (fun rest -> (kind, axes) :: rest))

/// Towards the tokens: the way that the row set came, backwards, sums scattered where it was gathered.
let private back (from: Layout) (want: Layout) : (Collective * int list * Layout) option =
    match path (setLayout want) (setLayout from) |> Option.map List.tryLast with
    | Some(Some(Collective.RowsToExperts, axes)) ->
        Some(Collective.RowsToTokens, axes, changed from axes (fun m -> want[m]))
    | Some(Some(Collective.AllGather d, axes)) when axes |> List.forall (fun m -> from[m].IsPartialSum) ->
        Some(Collective.ReduceScatter d, axes, changed from axes (fun m -> want[m]))
    | Some _
    | None -> None

/// The next collective, its mesh axes, and the layout afterwards; None where no step leads on.
let step (from: Layout) (want: Layout) : (Collective * int list * Layout) option =
    match where (fun f w -> f.IsPartialSum && w.IsReplicated) from want with
    | [] ->
        match where (fun f w -> (isExpert f || f.IsPartialSum) && (tokenDim w).IsSome) from want with
        | [] -> forth from want
        | _towardsTokens -> back from want
    | sums -> Some(Collective.AllReduceSum, sums, changed from sums (fun _ -> AxisState.Replicated))

/// Collectives on the way, or None where there is none. A row set goes to the experts only: how to go back is remembered.
let rec distance (isSet: bool) (from: Layout) (want: Layout) : int option =
    if from = want then
        Some 0
    else
        match step from want with
        | Some(Collective.RowsToTokens, _, _) when isSet -> None
        | Some(_, _, next) -> distance isSet next want |> Option.map ((+) 1)
        | None -> None

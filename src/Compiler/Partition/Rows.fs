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

/// The next collective, its mesh axes, and the layout afterwards; None where no step leads on.
let step (from: Layout) (want: Layout) : (Collective * int list * Layout) option =
    let axes test = [
        for m in 0 .. from.Length - 1 do
            if test from[m] want[m] then
                m
    ]

    let next (axes: int list) state = from |> Array.mapi (fun m s -> if List.contains m axes then state m else s)
    let toExperts = axes (fun f w -> (tokenDim f).IsSome && isExpert w)
    let toTokens = axes (fun f w -> isExpert f && (tokenDim w).IsSome)
    let dims = [ 0; 1 ]

    let exchange kind (moved: int list) (layout: Layout) =
        let after = next moved (fun m -> want[m])
        // cut or joined on both sides: token dims where rows are by token, experts where they are by expert
        let byToken, byExpert = if kind = Collective.RowsToExperts then layout, after else after, layout

        if
            not moved.IsEmpty
            && contiguous byExpert 2 moved
            && dims
               |> List.forall (fun d ->
                   contiguous byToken d (moved |> List.filter (fun m -> tokenDim byToken[m] = Some d)))
        then
            Some(kind, moved, after)
        else
            None

    let gather d =
        match axes (fun f w -> f = AxisState.Split d && w.IsReplicated) with
        | [] -> None
        | moved when contiguous from d moved ->
            Some(Collective.AllGather d, moved, next moved (fun _ -> AxisState.Replicated))
        | _blocked -> None

    let scatter d =
        match axes (fun f w -> f.IsPartialSum && w = AxisState.Split d) with
        | [] -> None
        | moved ->
            // what still has to come to this dim from the experts comes first if it is slower
            let slower = toTokens |> List.exists (fun m -> tokenDim want[m] = Some d && m > List.min moved)

            if contiguous from d moved && not slower then
                Some(Collective.ReduceScatter d, moved, next moved (fun _ -> AxisState.Split d))
            else
                None

    let reduce () =
        match axes (fun f w -> f.IsPartialSum && w.IsReplicated) with
        | [] -> None
        | moved -> Some(Collective.AllReduceSum, moved, next moved (fun _ -> AxisState.Replicated))

    [
        fun () -> exchange Collective.RowsToExperts toExperts from
        fun () -> scatter 1
        fun () -> scatter 0
        fun () -> exchange Collective.RowsToTokens toTokens from
        reduce
        fun () -> gather 1
        fun () -> gather 0
    ]
    |> List.tryPick (fun attempt -> attempt ())

/// Collectives on the way, or None where there is none. A row set goes to the experts only: how to go back is remembered.
let rec distance (isSet: bool) (from: Layout) (want: Layout) : int option =
    if from = want then
        Some 0
    else
        match step from want with
        | Some(Collective.RowsToTokens, _, _) when isSet -> None
        | Some(_, _, next) -> distance isSet next want |> Option.map ((+) 1)
        | None -> None

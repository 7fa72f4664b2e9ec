/// Global tensors cut into the shards of a grid of ranks, and put together again.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Reference.Shard

open DeepSeekGraph

/// Ranks of a mesh: product of its axis sizes.
let ranks (sizes: int[]) = Array.fold (*) 1 sizes

/// Coordinates of a rank; axis 0 is the fastest.
let coordinates (sizes: int[]) (rank: int) =
    let strides = Array.scan (*) 1 sizes
    sizes |> Array.mapi (fun m size -> rank / strides[m] % size)

/// Number formed from the coordinates along some axes, slower axes major.
let index (sizes: int[]) (axes: int list) (coordinate: int[]) =
    axes |> List.sortDescending |> List.fold (fun n m -> n * sizes[m] + coordinate[m]) 0

/// Ranks that agree on all other axes, in member order.
let groups (sizes: int[]) (axes: int list) : int[][] =
    [| 0 .. ranks sizes - 1 |]
    |> Array.groupBy (fun r -> coordinates sizes r |> Array.mapi (fun m c -> if List.contains m axes then 0 else c))
    |> Array.map (fun (_, members) -> members |> Array.sortBy (fun r -> index sizes axes (coordinates sizes r)))

let private axesOn (layout: AxisState[]) dim = [
    for m in 0 .. layout.Length - 1 do
        if layout[m] = AxisState.Split dim then
            m
]

let private count (sizes: int[]) axes = axes |> List.fold (fun n m -> n * sizes[m]) 1

/// The part of a global tensor that lies at a coordinate. Of a partial sum, coordinate 0 holds all and the others nothing.
let shard (layout: AxisState[]) (sizes: int[]) (coordinate: int[]) (whole: DenseTensor) : DenseTensor =
    let cut =
        Seq.fold
            (fun x d ->
                match axesOn layout d with
                | [] -> x
                | axes -> Dense.block d (index sizes axes coordinate) (count sizes axes) x)
            whole
            [ 0 .. whole.Extents.Length - 1 ]

    let elsewhere = Array.exists2 (fun (s: AxisState) c -> s.IsPartialSum && c > 0) layout coordinate

    if elsewhere then Dense.zeros cut.Extents else cut

/// How much replicated copies may differ: different orders of summation.
let private tolerance = 1e-9

/// The global tensor that the shards of all ranks (by rank) make. Copies that should agree but do not raise.
let assemble (layout: AxisState[]) (sizes: int[]) (shards: DenseTensor[]) : DenseTensor =
    let local = shards[0].Extents
    let split = local |> Array.mapi (fun d _ -> axesOn layout d)
    let extents = Array.map2 (fun extent axes -> extent * count sizes axes) local split
    let maximum = layout |> Array.exists _.IsPartialMax

    if maximum && layout |> Array.exists _.IsPartialSum then
        invalidOp "a value is a partial sum and a partial maximum at once"

    let whole = Dense.full extents (if maximum then -infinity else 0.0)

    for r in 0 .. shards.Length - 1 do
        let coordinate = coordinates sizes r

        let original = Array.map2 (fun (s: AxisState) c -> if s.IsReplicated then 0 else c) layout coordinate

        if original <> coordinate then
            let first = index sizes [ 0 .. sizes.Length - 1 ] original
            let apart = Dense.distance shards[first] shards[r]

            if apart > tolerance then
                invalidOp $"ranks %i{first} and %i{r} should hold the same value but differ by %g{apart}: %A{layout}"
        else
            let start = Array.map2 (fun axes extent -> index sizes axes coordinate * extent) split local

            Dense.each local (fun i ->
                let value = Dense.at shards[r] i

                Dense.update whole (Array.map2 (+) start i) (fun v -> if maximum then max v value else v + value))

    whole

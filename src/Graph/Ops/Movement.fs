/// Moving without computing: slice, pad, concat, broadcast, rename, transpose, and the identities anchor and detach.
module DeepSeekGraph.Ops.Movement

open DeepSeekGraph

let private movement name infer vjp = {
    Name = name
    Axes = OpDef.taking 1 infer
    Result = OpDef.same 1
    Rows = OpDef.follows 1
    Linear = Linearity.InEach [ 0 ]
    Vjp = vjp
    Flops = OpDef.free
    Fusion = Fusion.Pointwise
}

let private one (f: Adjoint -> int) = Vjp.Rule(fun a -> [| ValueSome(f a) |])
let private plain (_: Axis) = Mark.Plain

/// A resized axis stays whole: a split one is never sliced, padded or joined.
let private resize (name: string) (length: int -> Result<int, string>) (types: TensorType[]) =
    match types[0].IndexOf name with
    | -1 -> Error $"%O{types[0]} has no axis '%s{name}'"
    | d ->
        OpDef.denseAxis name types[0]
        |> Result.bind (fun () -> length types[0].Axes[d].Extent)
        |> Result.map (fun extent ->
            Axes.carry types[0] (fun a -> if a.Name = name then Mark.Whole else Mark.Plain) (fun a ->
                if a.Name = name then { a with Extent = extent } else a))

let slice (axis: string) start length =
    movement
        "slice"
        (resize axis (fun extent ->
            if start < 0 || length < 1 || start > extent - length then
                Error $"slice [%i{start}, %i{start + length}) lies outside axis '%s{axis}' of %i{extent}"
            else
                Ok length))
        (one (fun a ->
            let t = a.Type a.Inputs[0]
            a.One (Op.Pad(axis, start, t.Axes[t.IndexOf axis].Extent)) [ a.Dy ]))

let pad (axis: string) before total =
    movement
        "pad"
        (resize axis (fun extent ->
            if before < 0 || int64 before + int64 extent > int64 total then
                Error $"%i{extent} of axis '%s{axis}' at %i{before} do not fit into %i{total}"
            else
                Ok total))
        (one (fun a ->
            let t = a.Type a.Inputs[0]
            a.One (Op.Slice(axis, before, t.Axes[t.IndexOf axis].Extent)) [ a.Dy ]))

let private inferConcat (axis: string) (types: TensorType[]) : Result<Rule, string> =
    let first = types[0]
    let d = first.IndexOf axis
    let others (t: TensorType) = t.Axes |> Array.filter (fun a -> a.Name <> axis)

    match
        types
        |> Array.tryFindIndex (fun t -> t.IndexOf axis <> d || t.Routed <> first.Routed || others t <> others first)
    with
    | _ when first.Routed && d >= 0 && d < 3 -> Error $"axis '%s{axis}' of %O{first} is sparse: route its rows instead"
    | _ when d < 0 -> Error $"%O{first} has no axis '%s{axis}'"
    | Some i -> Error $"input %i{i} is %O{types[i]}; all axes but '%s{axis}' must be those of input 0, %O{first}"
    | None ->
        // beyond the largest extent it is 0, which no axis may be
        let total = types |> Array.sumBy (fun t -> int64 t.Axes[d].Extent)
        let total = if total > int64 System.Int32.MaxValue then 0 else int total

        Ok {
            Factors =
                first.Axes
                |> Array.mapi (fun i a -> {
                    Letter = a.Name
                    Mark = if i = d then Mark.Whole else Mark.Plain
                    Extent = a.Extent
                    Operands = Array.create types.Length i
                    Results = [| i |]
                })
            ResultAxes = [|
                first.Axes |> Array.mapi (fun i a -> if i = d then { a with Extent = total } else a)
            |]
        }

let concat (axis: string) = {
    movement
        "concat"
        (inferConcat axis)
        (Vjp.Rule(fun a ->
            let extents = a.Inputs |> Array.map (fun x -> let t = a.Type x in t.Axes[t.IndexOf axis].Extent)

            let starts = Array.scan (+) 0 extents
            Array.mapi (fun i n -> ValueSome(a.One (Op.Slice(axis, starts[i], n)) [ a.Dy ])) extents)) with
        Axes = OpDef.takingSome (inferConcat axis)
        Linear = Linearity.Jointly
}

let broadcast (axis: Axis) dim =
    movement
        "broadcast"
        (fun types ->
            let t = types[0]

            if dim < (if t.Routed then 3 else 0) || dim > t.Rank || axis.Extent < 1 then
                Error $"a new axis '%s{axis.Name}' of %i{axis.Extent} at %i{dim} does not fit %O{t}"
            else
                let carried = Axes.carry t plain id

                let shift (f: Factor) = {
                    f with
                        Results = f.Results |> Array.map (fun d -> if d >= dim then d + 1 else d)
                }

                Ok {
                    Factors = [|
                        yield! Array.map shift carried.Factors
                        {
                            Letter = axis.Name
                            Mark = Mark.Whole
                            Extent = axis.Extent
                            Operands = [| -1 |]
                            Results = [| dim |]
                        }
                    |]
                    ResultAxes = [| Array.insertAt dim axis t.Axes |]
                })
        (one (fun a -> a.One (Op.Sum [ axis.Name ]) [ a.Dy ]))

let rename (from: string) (into: string) =
    movement
        "rename"
        (fun types ->
            if types[0].IndexOf from < 0 then
                Error $"%O{types[0]} has no axis '%s{from}'"
            else
                Ok(Axes.carry types[0] plain (fun a -> if a.Name = from then { a with Name = into } else a)))
        (one (fun a -> a.One (Op.Rename(into, from)) [ a.Dy ]))

let transpose (permutation: int list) =
    movement
        "transpose"
        (fun types ->
            let t = types[0]

            if List.sort permutation <> [ 0 .. t.Rank - 1 ] then
                Error $"%A{permutation} is no permutation of the %i{t.Rank} axes of %O{t}"
            elif t.Routed && List.truncate 3 permutation <> [ 0; 1; 2 ] then
                Error $"the first three axes of %O{t} are sparse and stay where they are"
            else
                Ok {
                    Factors =
                        (Axes.carry t plain id).Factors
                        |> Array.map (fun f -> {
                            f with
                                Results = [| List.findIndex ((=) f.Operands[0]) permutation |]
                        })
                    ResultAxes = [| permutation |> List.map (fun d -> t.Axes[d]) |> Array.ofList |]
                })
        (one (fun a ->
            let inverse = permutation |> List.mapi (fun i d -> d, i) |> List.sort |> List.map snd
            a.One (Op.Transpose inverse) [ a.Dy ]))

/// Balanced order of a causal sequence for context parallelism (as in Megatron Core): the axis stays whole.
let zigzag (axis: string) ranks isInverse =
    movement
        "zigzag"
        (resize axis (fun extent ->
            if ranks < 1 || extent % (2 * ranks) <> 0 then
                Error $"axis '%s{axis}' of %i{extent} does not fall into 2 x %i{ranks} blocks"
            else
                Ok extent))
        (one (fun a -> a.One (Op.Zigzag(axis, ranks, not isInverse)) [ a.Dy ]))

let private identity name vjp = {
    OpDef.pointwise name vjp with
        Linear = Linearity.InEach [ 0 ]
        Flops = OpDef.free
}

let anchor = identity "anchor" (one (fun a -> a.Dy))
let detach = identity "detach" Vjp.Stop

/// The layout algebra of collectives: what each makes of its operand's states, blocks and extents.
module DeepSeekGraph.Compiler.Checking.Collectives

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Checking.Shapes

let stateName (state: AxisState) =
    match state with
    | AxisState.Replicated -> "whole"
    | AxisState.Split d -> $"split on dim %i{d}"
    | AxisState.PartialSum -> "a partial sum"
    | AxisState.PartialMax -> "a partial maximum"

/// Mesh axes that split a dim, fastest first.
let axesOn (layout: IReadOnlyList<AxisState>) dim =
    [ 0 .. layout.Count - 1 ] |> List.filter (fun m -> layout[m] = AxisState.Split dim)

/// Blocks are cut and joined in one piece only along axes that are faster than all others of the dim.
let isInner (layout: IReadOnlyList<AxisState>) dim (axes: int list) =
    axesOn layout dim |> List.except axes |> List.forall (fun m -> m > List.max axes)

/// What is wrong with one operand tuple of a collective.
let rec private checkTuple
    (mesh: MeshInfo)
    (slots: IReadOnlyList<SlotInfo>)
    (group: Group)
    (kind: Collective)
    (inputs: IReadOnlyList<int>)
    (outputs: IReadOnlyList<int>)
    (report: string -> unit)
    : unit =
    let axes = List.ofSeq group.MeshAxes
    let size = Mesh.extent mesh axes
    let states id = slots[id].Layout
    let name id = named slots id

    let arity i o =
        if inputs.Count <> i || outputs.Count <> o then
            report $"it takes %i{i} inputs and %i{o} outputs, not %i{inputs.Count} and %i{outputs.Count}"

        inputs.Count = i && outputs.Count = o

    /// Input 0 becomes output 0: states along the group's axes, and each extent times a / b.
    let moved
        (from: AxisState -> bool)
        (wanted: string)
        (into: AxisState -> bool)
        (made: string)
        (grows: int -> int * int)
        =
        let a, b = inputs[0], outputs[0]

        for m in 0 .. mesh.Axes.Count - 1 do
            let x, y = (states a)[m], (states b)[m]

            if List.contains m axes then
                if not (from x) then
                    report
                        $"%s{name a} is %s{stateName x} over mesh axis %s{mesh.Axes[m].Name}; it would have to be %s{wanted}"
                elif not (into y) then
                    report
                        $"%s{name b} is declared %s{stateName y} over mesh axis %s{mesh.Axes[m].Name}; it becomes %s{made}"
            elif x <> y then
                report
                    $"%s{name a} is %s{stateName x} and %s{name b} %s{stateName y} over mesh axis %s{mesh.Axes[m].Name}, along which nothing moves"

        let x, y = slots[a], slots[b]

        let fits d =
            let times, over = grows d
            int64 x.Extents[d] * int64 times = int64 y.Extents[d] * int64 over

        let sameRank = x.Extents.Count = y.Extents.Count

        if
            x.DType <> y.DType
            || x.Routed <> y.Routed
            || x.Routed && abs (x.Density - y.Density) > 1e-9
            || not sameRank
            || not (List.forall fits [ 0 .. x.Extents.Count - 1 ])
        then
            report $"%s{name b} has not the element type and extents that %s{name a} gets"

    let inner id dim =
        if not (isInner (states id) dim axes) then
            report
                $"dim %i{dim} of %s{name id} is cut along an axis that is not the fastest: blocks would not be in order"

    let isSplit d (s: AxisState) = s = AxisState.Split d
    let same (_: int) = 1, 1

    let rows toExperts =
        let isToken (s: AxisState) = isSplit 0 s || isSplit 1 s
        let from, into = if toExperts then isToken, isSplit 2 else isSplit 2, isToken

        let words =
            if toExperts then
                "split by token", "split by expert"
            else
                "split by expert", "split by token"
        // the side that is split by token tells which token dim each axis cuts
        let tokens = if toExperts then inputs[0] else outputs[0]
        let over d = axes |> List.filter (fun m -> (states tokens)[m] = AxisState.Split d) |> Mesh.extent mesh

        let grows d =
            let n =
                if d < 2 then over d
                elif d = 2 then size
                else 1

            if d > 2 then 1, 1
            elif (d < 2) = toExperts then n, 1
            else 1, n

        moved from (fst words) into (snd words) grows

        for id in [ inputs[0]; outputs[0] ] do
            if not slots[id].Routed then
                report $"%s{name id} does not hold rows"

            for d in 0..2 do
                if
                    axesOn (states id) d |> List.exists (fun m -> List.contains m axes)
                    && not (isInner (states id) d axes)
                then
                    report
                        $"dim %i{d} of %s{name id} is cut along an axis that is not the fastest: blocks would not be in order"

    /// A row set must lie as the rows it belongs to, on batch, seq and expert.
    let setOf route rowsId =
        let r, x = slots[route], slots[rowsId]

        let lies m =
            match (states rowsId)[m] with
            | AxisState.Split d when d <= 2 -> (states route)[m] = AxisState.Split d
            | AxisState.Split _
            | AxisState.Replicated
            | AxisState.PartialSum
            | AxisState.PartialMax -> (states route)[m] = AxisState.Replicated

        let fits =
            r.Routed
            && r.DType = DType.Bool
            && r.Extents.Count = 3
            && x.Extents.Count >= 3
            && [ 0..2 ] |> List.forall (fun d -> r.Extents[d] = x.Extents[d])
            && [ 0 .. mesh.Axes.Count - 1 ] |> List.forall lies

        if not fits then
            report $"%s{name route} is not the row set of %s{name rowsId}"

    /// Rows that are gathered or scattered along a token dim come with both row sets; a row set and dense values come alone.
    let rowsArity () =
        if
            inputs.Count > 0
            && slots[inputs[0]].Routed
            && slots[inputs[0]].Extents.Count >= 3
            && inputs.Count <> 1
        then
            let fits = arity 3 1

            if fits then
                setOf inputs[1] inputs[0]
                setOf inputs[2] outputs[0]

            fits
        else
            arity 1 1

    let dimOf id d =
        let ok = d >= 0 && d < slots[id].Extents.Count

        if not ok then
            report $"%s{name id} has no dim %i{d}"

        ok

    /// One-wide rows of probabilities lie along the experts themselves; all others gain that axis.
    /// The rows by token that a fused collective makes of a dense operand, or sums to a dense result, without holding them.
    let virtually isProbs dense here (law: IReadOnlyList<SlotInfo> -> int -> unit) =
        let x, r = slots[dense], slots[here]

        if x.Routed || x.Extents.Count < 3 || not r.Routed || r.Extents.Count <> 3 then
            report $"%s{name dense} and %s{name here} are no dense value and its row set"
        else
            let shift (s: AxisState) =
                match s with
                | AxisState.Split d when d >= 2 && not isProbs -> AxisState.Split(d + 1)
                | AxisState.Split _
                | AxisState.Replicated
                | AxisState.PartialSum
                | AxisState.PartialMax -> s

            let insert (expert: 'a) (dims: 'a seq) =
                if isProbs then Array.ofSeq dims else Seq.insertAt 2 expert dims |> Array.ofSeq

            let rows = {
                x with
                    Routed = true
                    Density = r.Density
                    Axes = insert r.Axes[2] x.Axes
                    Extents = insert r.Extents[2] x.Extents
                    Layout = x.Layout |> Seq.map shift |> Array.ofSeq
            }

            law (Seq.append slots [ rows ] |> Array.ofSeq) slots.Count

    /// Operands of a fused collective: values, then the row sets of their side and of the other.
    let fused ranks takes law =
        let values = inputs.Count - 2

        if ranks < 1 then
            report $"a node has %i{ranks} ranks"
        elif values < 1 || values > 2 || outputs.Count <> values then
            report $"%s{takes}, and has an output for each value"
        else
            law inputs[values] inputs[values + 1] [ for i in 0 .. values - 1 -> i = 1, inputs[i], outputs[i] ]

    match kind with
    | Collective.Send _ -> arity 1 0 |> ignore
    | Collective.Recv _ -> arity 0 1 |> ignore
    | Collective.AllReduceSum ->
        if arity 1 1 then
            if axes.IsEmpty then
                // across stages nothing changes along the mesh
                moved (fun _ -> true) "" (fun _ -> true) "" same
            else
                moved
                    _.IsPartialSum
                    "a partial sum; anything else would be counted more than once"
                    _.IsReplicated
                    "whole"
                    same
    | Collective.AllReduceMax ->
        if arity 1 1 then
            moved _.IsPartialMax "a partial maximum" _.IsReplicated "whole" same
    | Collective.AllGather d ->
        if rowsArity () && dimOf inputs[0] d then
            moved (isSplit d) $"split on dim %i{d}" _.IsReplicated "whole" (fun k -> (if k = d then size else 1), 1)
            inner inputs[0] d
    | Collective.ReduceScatter d ->
        if rowsArity () && dimOf inputs[0] d then
            moved _.IsPartialSum "a partial sum" (isSplit d) $"split on dim %i{d}" (fun k ->
                1, (if k = d then size else 1))

            inner outputs[0] d
    | Collective.AllToAll(split, join) ->
        if arity 1 1 && dimOf inputs[0] split && dimOf inputs[0] join then
            moved (isSplit join) $"split on dim %i{join}" (isSplit split) $"split on dim %i{split}" (fun k ->
                if split = join then 1, 1
                elif k = join then size, 1
                elif k = split then 1, size
                else 1, 1)

            inner inputs[0] join
            inner outputs[0] split
    | Collective.RouteToExperts ->
        if arity 1 1 then
            rows true
    | Collective.RowsToExperts
    | Collective.RowsToTokens ->
        if arity 3 1 then
            rows kind.IsRowsToExperts
            setOf inputs[1] inputs[0]
            setOf inputs[2] outputs[0]
    | Collective.Dispatch ranks ->
        fused ranks "it takes x, or x and probabilities, and both row sets" (fun here there pairs ->
            for isProbs, dense, rows in pairs do
                virtually isProbs dense here (fun slots id ->
                    checkTuple mesh slots group Collective.RowsToExperts [| id; here; there |] [| rows |] report))
    | Collective.Combine ranks ->
        fused ranks "it takes rows, or rows and those of probabilities, and both row sets" (fun there here pairs ->
            for isProbs, rows, dense in pairs do
                virtually isProbs dense here (fun slots id ->
                    checkTuple mesh slots group Collective.RowsToTokens [| rows; there; here |] [| id |] report))

/// What is wrong with a collective's operands: each tuple of a bundle must be right by itself.
let check
    (mesh: MeshInfo)
    (slots: IReadOnlyList<SlotInfo>)
    (group: Group)
    (kind: Collective)
    (inputs: IReadOnlyList<int>)
    (outputs: IReadOnlyList<int>)
    (report: string -> unit)
    : unit =
    if outputs.Count < 2 || not kind.TakesTuples then
        checkTuple mesh slots group kind inputs outputs report
    elif inputs.Count % outputs.Count <> 0 then
        report $"%i{inputs.Count} inputs do not make %i{outputs.Count} operand tuples"
    else
        let tuples = Seq.chunkBySize (inputs.Count / outputs.Count) inputs

        for operands, output in Seq.zip tuples outputs do
            checkTuple mesh slots group kind operands [| output |] report

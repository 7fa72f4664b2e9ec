/// Is the memory table what slots, programs and timetable come to, and do no two slots that live at once share a byte?
module DeepSeekGraph.Compiler.Checking.Memory

open System
open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking.Shapes
open DeepSeekGraph.Compiler.Lowering

/// Ranges in use, none of which overlap.
[<Sealed>]
type private Occupied() =
    let ranges = SortedDictionary<int64, struct (int64 * int)>()
    let starts = SortedSet<int64>()

    /// The slot that already lies there, if any.
    member _.Take(first: int64, bytes: int64, slot: int) : int voption =
        if bytes = 0L then
            ValueNone
        else
            let clash (at: int64) =
                let struct (ends, other) = ranges[at]
                if at < first + bytes && first < ends then ValueSome other else ValueNone

            let view = starts.GetViewBetween(Int64.MinValue, first + bytes - 1L)

            match (if view.Count = 0 then ValueNone else clash (Seq.head (view.Reverse()))) with
            | ValueSome other -> ValueSome other
            | ValueNone ->
                starts.Add first |> ignore
                ranges[first] <- struct (first + bytes, slot)
                ValueNone

    member _.Give(first: int64) =
        starts.Remove first |> ignore
        ranges.Remove first |> ignore

/// Offsets of one stage: inside their region, apart from everything that lives at the same time; regions apart and in the arena.
let private offsets (f: Findings) (mesh: MeshInfo) (stage: StagePlan) (row: MemoryRow) =
    let size = stage.Slots |> Seq.map (Memory.bytesOf mesh Memory.Rows.Headroom) |> Array.ofSeq
    let lifetimes = Arena.lifetimes stage
    let at = $"stage %i{stage.Stage}, memory"
    let wrong message = f.Add(Codes.PlanShape, at, message)
    let name id = named stage.Slots id

    let region id = row.Regions |> Seq.tryFind (fun r -> Arena.holds stage r stage.Slots[id] lifetimes[id])

    let clash id other = wrong $"%s{name id} and %s{name other} live at the same time and share bytes"

    let take (occupied: Occupied) id =
        match occupied.Take(row.Offsets[id], size[id], id) with
        | ValueSome other -> clash id other
        | ValueNone -> ()

    for id in 0 .. stage.Slots.Count - 1 do
        match lifetimes[id], region id with
        | Arena.Lifetime.Never, _ -> ()
        | _, None -> wrong $"%s{name id} lies in no region"
        | _, Some r ->
            if row.Offsets[id] < 0L || row.Offsets[id] + size[id] > r.Stride then
                wrong $"%s{name id} lies at %i{row.Offsets[id]} with %i{size[id]} bytes, its region has %i{r.Stride}"

            if row.Offsets[id] % Arena.alignment <> 0L then
                wrong $"%s{name id} lies at %i{row.Offsets[id]}, no multiple of %i{Arena.alignment}"

    // what outlives a program: all of a frame live at once, and there is a frame for each microbatch in flight
    for r in row.Regions do
        let occupied = Occupied()

        for id in 0 .. stage.Slots.Count - 1 do
            match lifetimes[id] with
            | Arena.Lifetime.Plan when Arena.holds stage r stage.Slots[id] lifetimes[id] -> take occupied id
            | Arena.Lifetime.Across(p, q) when Arena.holds stage r stage.Slots[id] lifetimes[id] ->
                let flying = Arena.inFlight stage p q

                if r.Count < flying then
                    wrong $"%s{name id} has %i{r.Count} frames for %i{flying} microbatches in flight"

                take occupied id
            | Arena.Lifetime.Plan
            | Arena.Lifetime.Across _
            | Arena.Lifetime.Within _
            | Arena.Lifetime.Never -> ()

    // what one program takes and gives back
    stage.Programs
    |> Seq.iteri (fun p program ->
        let occupied = Dictionary<bool, Occupied>()
        occupied[false] <- Occupied()
        occupied[true] <- Occupied()

        let within id =
            match lifetimes[id] with
            | Arena.Lifetime.Within(q, _, _) -> q = p
            | Arena.Lifetime.Plan
            | Arena.Lifetime.Across _
            | Arena.Lifetime.Never -> false

        let take id =
            if within id then
                take occupied[stage.Slots[id].Routed] id

        if p = Arena.feeds stage then
            for slot in stage.Slots do
                if slot.Kind.IsInput then
                    take slot.Id

        for step in program.Steps do
            match step with
            | Step.Launch(_, _, _, outputs, _)
            | Step.Start(_, _, _, _, outputs, _) ->
                for id in outputs do
                    take id
            | Step.Wait _ -> ()
            | Step.Free id ->
                if within id then
                    occupied[stage.Slots[id].Routed].Give row.Offsets[id])

    let mutable ends = 0L

    for r in row.Regions |> Seq.sortBy _.Base do
        if r.Base < ends || r.Stride < 0L || r.Count < 0 then
            wrong $"the region from %s{r.From} until %s{r.Until} at %i{r.Base} overlaps the one that ends at %i{ends}"

        ends <- r.Base + r.Stride * int64 r.Count

    if ends > row.Arena then
        wrong $"regions end at %i{ends}, the arena has %i{row.Arena} bytes"

/// Every number of the table against what the plan comes to.
let private numbers (f: Findings) (said: MemoryRow) (row: MemoryRow) =
    let differ what (a: int64) (b: int64) =
        if a <> b then
            f.Add(
                Codes.PlanShape,
                $"stage %i{row.Stage}",
                $"the memory table says %s{what} of %i{a} bytes, its steps come to %i{b}"
            )

    differ "parameters" said.Parameters row.Parameters
    differ "an optimizer" said.Optimizer row.Optimizer
    differ "gradients" said.Gradients row.Gradients
    differ "counters" said.Counters row.Counters
    differ "activations" said.Activations row.Activations
    differ "collectives" said.Collectives row.Collectives
    differ "a peak" said.Peak row.Peak
    differ "a headroom" said.Headroom row.Headroom
    differ "a worst case" said.Worst row.Worst
    differ "an arena" said.Arena row.Arena

    if List.ofSeq said.Regions <> List.ofSeq row.Regions then
        f.Add(Codes.PlanShape, $"stage %i{row.Stage}", "the memory table's regions are not those of its slots")

    Seq.iteri2
        (fun id (a: int64) (b: int64) ->
            if a <> b then
                f.Add(
                    Codes.PlanShape,
                    $"stage %i{row.Stage}",
                    $"the memory table puts slot %%%i{id} at %i{a}; it belongs at %i{b}"
                ))
        said.Offsets
        row.Offsets

/// The memory table of a plan whose steps are in order.
let check (f: Findings) (plan: PlanSet) : unit =
    if plan.Memory.Count <> plan.Stages.Count then
        f.Add(
            Codes.PlanShape,
            "memory",
            $"the memory table has %i{plan.Memory.Count} rows for %i{plan.Stages.Count} stages"
        )

    for stage in plan.Stages do
        match plan.Memory |> Seq.tryFind (fun r -> r.Stage = stage.Stage) with
        | None -> f.Add(Codes.PlanShape, $"stage %i{stage.Stage}", "the memory table has no row for it")
        | Some said when said.Offsets.Count <> stage.Slots.Count ->
            f.Add(
                Codes.PlanShape,
                $"stage %i{stage.Stage}",
                $"the memory table has %i{said.Offsets.Count} offsets for %i{stage.Slots.Count} slots"
            )
        | Some said ->
            offsets f plan.Mesh stage said
            numbers f said (Memory.row plan.Mesh stage)

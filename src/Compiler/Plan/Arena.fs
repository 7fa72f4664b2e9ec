/// Where slots lie in a rank's memory: regions by lifetime, and an offset of every slot in its region.
/// Slots that outlive a program have one frame for each microbatch in flight; those of one program share what others left.
module DeepSeekGraph.Compiler.Lowering.Arena

open System.Collections.Generic
open DeepSeekGraph

/// Offsets are multiples of this; what accelerators and vector units ask for.
let alignment = 256L

let private align (bytes: int64) = (bytes + alignment - 1L) / alignment * alignment

/// How long a slot holds a value.
[<RequireQualifiedAccess; Struct>]
type Lifetime =
    | Never
    | Plan
    /// Programs and steps are indices; the slot is taken before step First and free after step Last.
    | Within of Program: int * First: int * Last: int
    /// From a run of one program to a run of another, for the same microbatch.
    | Across of Birth: int * Death: int

let persistent (kind: SlotKind) =
    match kind with
    | SlotKind.Parameter
    | SlotKind.Optimizer
    | SlotKind.Gradient
    | SlotKind.Counter
    | SlotKind.Scalar
    | SlotKind.Cache -> true
    | SlotKind.Input
    | SlotKind.Saved
    | SlotKind.Temporary -> false

/// The program that a microbatch runs first, which its inputs come with.
let feeds (stage: StagePlan) : int =
    match stage.Timetable |> Seq.tryFind _.Phase.IsF with
    | None -> -1
    | Some first ->
        stage.Programs
        |> Seq.tryFindIndex (fun p -> p.Phase = first.Phase && p.Chunk = first.Chunk)
        |> Option.defaultValue -1

/// Lifetime of every slot, read off the programs.
let lifetimes (stage: StagePlan) : Lifetime[] =
    let count = stage.Slots.Count
    let birth, death = Array.create count ValueNone, Array.create count ValueNone
    let feed = feeds stage

    for slot in stage.Slots do
        if slot.Kind.IsInput && feed >= 0 then
            birth[slot.Id] <- ValueSome struct (feed, -1)

    stage.Programs
    |> Seq.iteri (fun p program ->
        program.Steps
        |> Seq.iteri (fun i step ->
            match step with
            | Step.Launch(_, _, _, outputs, _)
            | Step.Start(_, _, _, _, outputs, _) ->
                for slot in outputs do
                    if birth[slot].IsNone then
                        birth[slot] <- ValueSome struct (p, i)
            | Step.Wait _ -> ()
            | Step.Free slot -> death[slot] <- ValueSome struct (p, i)))

    Array.init count (fun id ->
        if persistent stage.Slots[id].Kind then
            Lifetime.Plan
        else
            match birth[id], death[id] with
            | ValueSome struct (p, first), ValueSome struct (q, last) when p = q -> Lifetime.Within(p, first, last)
            | ValueSome struct (p, _), ValueSome struct (q, _) -> Lifetime.Across(p, q)
            | ValueSome struct (p, first), ValueNone -> Lifetime.Within(p, first, stage.Programs[p].Steps.Count)
            | ValueNone, _ -> Lifetime.Never)

/// Microbatches between a run of one program and that of another, at most.
let inFlight (stage: StagePlan) (birth: int) (death: int) : int =
    let is (action: Action) p = action.Phase = stage.Programs[p].Phase && action.Chunk = stage.Programs[p].Chunk
    let mutable now, most = 0, 0

    for action in stage.Timetable do
        if is action birth then
            now <- now + 1
            most <- max most now
        elif is action death then
            now <- now - 1

    most

/// The words that name a lifetime's region.
let private words (stage: StagePlan) (lifetime: Lifetime) =
    match lifetime with
    | Lifetime.Never -> struct ("never", "never")
    | Lifetime.Plan -> struct ("plan", "plan")
    | Lifetime.Within _ -> struct ("program", "program")
    | Lifetime.Across(p, q) -> struct (stage.Programs[p].Name, stage.Programs[q].Name)

/// Does the slot lie in the region?
let holds (stage: StagePlan) (region: MemoryRegion) (slot: SlotInfo) (lifetime: Lifetime) =
    words stage lifetime = struct (region.From, region.Until) && slot.Routed = region.Routed

/// One program's slots: the largest first, each in the smallest gap that its neighbours in time leave. Gives the bytes used.
let private pack (size: int64[]) (offsets: int64[]) (slots: struct (int * int * int)[]) : int64 =
    let placed = List<struct (int * int * int)>()
    let mutable top = 0L

    for struct (id, first, last) in slots |> Array.sortBy (fun struct (id, first, _) -> -size[id], first, id) do
        let need = align size[id]

        let near =
            placed
            |> Seq.filter (fun struct (_, f, l) -> f <= last && first <= l)
            |> Seq.map (fun struct (other, _, _) -> struct (offsets[other], offsets[other] + align size[other]))
            |> Seq.sort
            |> Array.ofSeq

        let mutable at, bestGap, best = 0L, System.Int64.MaxValue, -1L

        for struct (begins, ends) in near do
            if begins - at >= need && begins - at < bestGap then
                bestGap <- begins - at
                best <- at

            at <- max at ends

        offsets[id] <- (if best >= 0L then best else at)
        top <- max top (offsets[id] + need)
        placed.Add(struct (id, first, last))

    top

/// One slot behind the other. Gives the bytes used.
let private row (size: int64[]) (offsets: int64[]) (slots: int[]) : int64 =
    let mutable at = 0L

    for id in slots do
        offsets[id] <- at
        at <- at + align size[id]

    at

/// Regions in order, an offset of every slot in its region (-1 for slots never taken), and the bytes of all regions.
let assign (stage: StagePlan) (size: int64[]) : struct (MemoryRegion[] * int64[] * int64) =
    let lifetimes = lifetimes stage
    let offsets = Array.create stage.Slots.Count -1L
    let mutable at = 0L

    let region (lifetime: Lifetime) routed stride count =
        let struct (from, until) = words stage lifetime

        let made = {
            From = from
            Until = until
            Routed = routed
            Base = at
            Stride = stride
            Count = count
        }

        at <- at + stride * int64 count
        made

    let kept =
        lifetimes
        |> Array.indexed
        |> Array.choose (fun (id, lifetime) ->
            match lifetime with
            | Lifetime.Plan -> Some(struct (-1, -1, false), id)
            | Lifetime.Across(p, q) -> Some(struct (p, q, stage.Slots[id].Routed), id)
            | Lifetime.Never
            | Lifetime.Within _ -> None)
        |> Array.groupBy fst
        |> Array.sortBy fst
        |> Array.map (fun (struct (p, q, routed), slots) ->
            let stride = row size offsets (Array.map snd slots)

            if p < 0 then
                region Lifetime.Plan false stride 1
            else
                region (Lifetime.Across(p, q)) routed stride (inFlight stage p q))

    let shared =
        lifetimes
        |> Array.indexed
        |> Array.choose (fun (id, lifetime) ->
            match lifetime with
            | Lifetime.Within(p, first, last) -> Some(struct (id, p, first, last))
            | Lifetime.Never
            | Lifetime.Plan
            | Lifetime.Across _ -> None)
        |> Array.groupBy (fun struct (id, _, _, _) -> stage.Slots[id].Routed)
        |> Array.sortBy fst
        |> Array.map (fun (routed, slots) ->
            // a rank runs one program at a time
            let stride =
                slots
                |> Array.groupBy (fun struct (_, p, _, _) -> p)
                |> Array.map (fun (_, mine) ->
                    mine
                    |> Array.map (fun struct (id, _, first, last) -> struct (id, first, last))
                    |> pack size offsets)
                |> Array.max

            region (Lifetime.Within(0, 0, 0)) routed stride 1)

    struct (Array.append kept shared, offsets, at)

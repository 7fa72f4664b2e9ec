/// Bytes a rank holds: the timetable walked with slot sizes, for balanced routing, for the headroom kept, and for the worst case.
module DeepSeekGraph.Compiler.Lowering.Memory

open System.Collections.Generic
open DeepSeekGraph

/// How many routed rows are counted.
[<RequireQualifiedAccess>]
type Rows =
    /// Every expert gets its share.
    | Balanced
    /// What is kept free: some times the balanced rows, never more than there can be.
    | Headroom
    /// Every token chooses as many of this rank's experts as it can.
    | Worst

/// Routed rows that memory is kept for, in multiples of the balanced ones.
let headroom = 2.0

let private product (extents: int seq) = extents |> Seq.fold (fun n e -> n * int64 e) 1L

let private stored (slot: SlotInfo) (share: float) =
    int64 (ceil (float (product slot.Extents) * share)) * int64 slot.DType.Bytes

/// Bytes of one instance of a slot when routing is balanced, without what fills up blocks: what collectives move.
let bytes (slot: SlotInfo) : int64 = stored slot slot.Density

/// Rows that `rows` come to in blocks of a multiple of `n` for each of `experts`, however they fall: at most n - 1 more for each
/// expert that has any.
let private filled (n: int) (experts: int64) (rows: int64) =
    let n = int64 n
    (rows + (n - 1L) * min experts rows) / n * n

/// Bytes of one instance of a slot.
let bytesOf (mesh: MeshInfo) (rows: Rows) (slot: SlotInfo) : int64 =
    if not slot.Routed then
        bytes slot
    else
        let experts = slot.Extents[2]

        // rows that there can be
        let most () =
            let split =
                slot.Layout
                |> Seq.indexed
                |> Seq.fold (fun n (m, state) -> if state = AxisState.Split 2 then n * mesh.Axes[m].Size else n) 1

            let topK = int (System.Math.Round(slot.Density * float (experts * split)))
            int64 slot.Extents[0] * int64 slot.Extents[1] * int64 (min topK experts)

        let width = product (Seq.skip 3 slot.Extents) * int64 slot.DType.Bytes

        if slot.Padding = 1 then
            match rows with
            | Rows.Balanced -> bytes slot
            | Rows.Headroom -> min (most () * width) (stored slot (headroom * slot.Density))
            | Rows.Worst -> most () * width
        else
            let share times = int64 (ceil (float (product (Seq.truncate 3 slot.Extents)) * times * slot.Density))
            let filled = filled slot.Padding (int64 experts)

            match rows with
            | Rows.Balanced ->
                let each = (share 1.0 + int64 experts - 1L) / int64 experts
                // with less than a row an expert, not every expert has one
                min (int64 experts * Padding.up slot.Padding each) (filled (share 1.0)) * width
            | Rows.Headroom -> filled (min (most ()) (share headroom)) * width
            | Rows.Worst -> filled (most ()) * width

/// Bytes at the moment of a peak: all that come and go, and those of them that a collective in flight fills.
[<Struct>]
type private Moment = { Live: int64; Flying: int64 }

/// What one run of a program changes.
type private Course = { Peak: Moment; Net: Moment }

let private zero = { Live = 0L; Flying = 0L }

let private plus a b = {
    Live = a.Live + b.Live
    Flying = a.Flying + b.Flying
}

let private course
    (transient: int -> bool)
    (size: int64[])
    (tokens: Dictionary<_, _>)
    key
    (steps: IReadOnlyList<Step>)
    =
    let mutable now, peak = zero, zero

    let sum (slots: IReadOnlyList<int>) = slots |> Seq.sumBy (fun s -> if transient s then size[s] else 0L)

    for step in steps do
        match step with
        | Step.Launch(_, _, _, outputs, _) ->
            now <- {
                now with
                    Live = now.Live + sum outputs
            }
        | Step.Start(token, _, _, _, outputs, _) ->
            let filled = sum outputs
            tokens[struct (key, token)] <- filled

            now <- {
                Live = now.Live + filled
                Flying = now.Flying + filled
            }
        | Step.Wait token ->
            match tokens.TryGetValue(struct (key, token)) with
            | true, filled ->
                now <- {
                    now with
                        Flying = now.Flying - filled
                }
            | false, _ -> ()
        | Step.Free slot ->
            now <- {
                now with
                    Live = now.Live - size[slot]
            }

        if now.Live > peak.Live then
            peak <- now

    { Peak = peak; Net = now }

/// Live bytes behind every entry of the timetable and the highest moment, of slots that come and go.
let private walk (stage: StagePlan) (size: int64[]) : struct (int64[] * Moment) =
    let transient id = not (Arena.persistent stage.Slots[id].Kind)
    let tokens = Dictionary<struct (struct (bool * int) * int), int64>()

    let courses =
        stage.Programs
        |> Seq.map (fun p ->
            // what R begins the epilogue waits for
            let owner = struct (p.Phase.IsOnce, (if p.Phase.IsOnce then 0 else p.Chunk))
            struct (p.Phase, p.Chunk), course transient size tokens owner p.Steps)
        |> dict

    let inputs = stage.Slots |> Seq.filter _.Kind.IsInput |> Seq.sumBy (fun s -> size[s.Id])
    let fed = HashSet<int>()
    let mutable now, peak = zero, zero

    let behind =
        stage.Timetable
        |> Seq.map (fun action ->
            // the inputs of a microbatch come with its first program
            if action.Phase.IsF && fed.Add action.Microbatch then
                now <- { now with Live = now.Live + inputs }

                if now.Live > peak.Live then
                    peak <- now

            match courses.TryGetValue(struct (action.Phase, action.Chunk)) with
            | true, course ->
                let top = plus now course.Peak

                if top.Live > peak.Live then
                    peak <- top

                now <- plus now course.Net
            | false, _ -> ()

            now.Live)
        |> Array.ofSeq

    struct (behind, peak)

/// Bytes of slots that come and go, behind every entry of the stage's timetable, when routing is balanced.
let behindEntries (mesh: MeshInfo) (stage: StagePlan) : int64[] =
    let struct (behind, _) = walk stage (stage.Slots |> Seq.map (bytesOf mesh Rows.Balanced) |> Array.ofSeq)
    behind

/// The stage's line of the memory table; slots that outlive a step count all the time.
let row (mesh: MeshInfo) (stage: StagePlan) : MemoryRow =
    let sizes rows = stage.Slots |> Seq.map (bytesOf mesh rows) |> Array.ofSeq
    let balanced, kept = sizes Rows.Balanced, sizes Rows.Headroom

    let sum (keep: SlotKind -> bool) = stage.Slots |> Seq.sumBy (fun s -> if keep s.Kind then balanced[s.Id] else 0L)

    let held = sum Arena.persistent

    let peak size =
        let struct (_, moment) = walk stage size
        moment

    let top = peak balanced
    let struct (regions, offsets, arena) = Arena.assign stage kept

    {
        Stage = stage.Stage
        Parameters = sum _.IsParameter
        Optimizer = sum _.IsOptimizer
        Gradients = sum _.IsGradient
        Counters = sum (fun kind -> kind.IsCounter || kind.IsScalar || kind.IsCache)
        Activations = top.Live - top.Flying
        Collectives = top.Flying
        Peak = held + top.Live
        Headroom = held + (peak kept).Live
        Worst = held + (peak (sizes Rows.Worst)).Live
        Arena = arena
        Regions = regions
        Offsets = offsets
    }

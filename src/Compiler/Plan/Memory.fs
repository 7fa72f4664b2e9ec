/// Bytes a rank holds: the timetable walked with slot sizes, routed rows at their balanced size.
module DeepSeekGraph.Compiler.Lowering.Memory

open System.Collections.Generic
open DeepSeekGraph

/// Bytes of one instance of a slot when routing is balanced.
let bytes (slot: SlotInfo) : int64 =
    let elements = slot.Extents |> Seq.fold (fun n e -> n * int64 e) 1L
    int64 (ceil (float elements * slot.Density)) * int64 slot.DType.Bytes

let private persistent (kind: SlotKind) =
    match kind with
    | SlotKind.Parameter
    | SlotKind.Optimizer
    | SlotKind.Gradient
    | SlotKind.Counter
    | SlotKind.Scalar -> true
    | SlotKind.Input
    | SlotKind.Saved
    | SlotKind.Temporary -> false

/// The stage's line of the memory table; all slots of a step-long kind count all the time.
let row (stage: StagePlan) : MemoryRow =
    let size = stage.Slots |> Seq.map bytes |> Array.ofSeq
    let kinds = stage.Slots |> Seq.map _.Kind |> Array.ofSeq
    let sum (keep: SlotKind -> bool) = Array.fold2 (fun n k b -> if keep k then n + b else n) 0L kinds size
    let programs = stage.Programs |> Seq.map (fun p -> struct (p.Phase, p.Chunk), p.Steps) |> dict
    let fed = HashSet<int>()
    let live = HashSet<struct (int * int)>()
    let mutable now = 0L
    let mutable peak = 0L

    let take microbatch slot =
        if not (persistent kinds[slot]) && live.Add(struct (slot, microbatch)) then
            now <- now + size[slot]
            peak <- max peak now

    for action in stage.Timetable do
        // the inputs of a microbatch come with its first program
        if action.Phase.IsF && fed.Add action.Microbatch then
            for slot in stage.Slots do
                if slot.Kind.IsInput then
                    take action.Microbatch slot.Id

        match programs.TryGetValue(struct (action.Phase, action.Chunk)) with
        | true, steps ->
            for step in steps do
                match step with
                | Step.Launch(_, _, _, outputs, _)
                | Step.Start(_, _, _, _, outputs, _) ->
                    for slot in outputs do
                        take action.Microbatch slot
                | Step.Wait _ -> ()
                | Step.Free slot ->
                    if live.Remove(struct (slot, action.Microbatch)) then
                        now <- now - size[slot]
        | false, _ -> ()

    let held = sum persistent

    {
        Stage = stage.Stage
        Parameters = sum _.IsParameter
        Optimizer = sum _.IsOptimizer
        Gradients = sum _.IsGradient
        Activations = peak
        Peak = held + peak
    }

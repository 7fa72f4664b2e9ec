/// Gradients are reduced while the backward pass goes on: W is cut where enough of them are complete, and an R behind each part of its last run.
/// before: steps of W and a timetable of parts; after: pieces of W, and which gradients each R takes. Law: the same sums.
module DeepSeekGraph.Compiler.Lowering.Reductions

open System.Collections.Generic
open DeepSeekGraph

/// Parts of a chunk's W: more would not hide more, and each is a program.
let private most = 16L

/// Accumulators that a step adds to.
let private added (step: Step) : int seq =
    match step with
    | Step.Launch(KernelId.Accumulate, _, _, outputs, _) -> outputs :> int seq
    | Step.Launch _
    | Step.Start _
    | Step.Wait _
    | Step.Free _ -> Seq.empty

/// W in parts: a part ends behind the sum with which its gradients reach a bucket. `size`: elements of a gradient that are reduced over
/// data axes; 0 for what is not.
let cut (bucket: int64) (size: int -> int64) (steps: Step list) : Step list list =
    let completes step = added step |> Seq.sumBy size
    let all = steps |> List.sumBy completes
    let bucket = max bucket ((all + most - 1L) / most)
    let parts = List [ List<Step>() ]
    let mutable filled, left = 0L, all

    for step in steps do
        let size = completes step
        parts[parts.Count - 1].Add step
        filled <- filled + size
        left <- left - size

        if filled >= bucket && left > 0L then
            parts.Add(List())
            filled <- 0L

    [ for part in parts -> List.ofSeq part ]

/// What one R reduces.
type Early = {
    Chunk: int
    Part: int
    /// The entry of the timetable that it comes behind: the last run of its part.
    Behind: int
    /// Accumulators, in the order in which they are complete.
    Gradients: int list
}

/// Gradients by the part of W whose last run completes them, in the order of the timetable, which has W in parts. `steps` of a program;
/// `isReduced`: the gradients that are meant. Others, and what F or I adds to last, are left to the epilogue.
let early (steps: Action -> Step list) (isReduced: int -> bool) (table: Action list) : Early list =
    let lastRuns =
        table
        |> List.indexed
        |> List.filter (fun (_, action) -> not action.Phase.IsOnce)
        |> List.groupBy (fun (_, action) -> struct (action.Phase, action.Chunk))
        |> List.map (snd >> List.last)
        |> List.sortBy fst

    // what is added to in several programs is complete with the last of them
    let completed = Dictionary<int, int>()

    let sums = [
        for at, action in lastRuns ->
            let slots = steps action |> List.collect (added >> List.ofSeq) |> List.filter isReduced

            for slot in slots do
                completed[slot] <- at

            at, action, List.distinct slots
    ]

    [
        for at, action, slots in sums do
            match slots |> List.filter (fun slot -> completed[slot] = at) with
            | gradients when action.Phase.IsW && not gradients.IsEmpty -> {
                Chunk = action.Chunk
                Part = action.Phase.Part
                Behind = at
                Gradients = gradients
              }
            | _none -> ()
    ]

/// The timetable with each R behind the last run of its part.
let place (early: Early list) (table: Action list) : Action list =
    let behind = dict [ for e in early -> e.Behind, e ]

    [
        for i, action in List.indexed table do
            yield action

            match behind.TryGetValue i with
            | true, e ->
                yield {
                    Phase = Phase.R e.Part
                    Chunk = e.Chunk
                    Microbatch = 0
                }
            | false, _ -> ()
    ]

/// Gradients are reduced while the backward pass goes on: W is cut where enough of them are complete, and an R behind each part of its last run.
/// before: steps of W and a timetable; after: parts of W, the timetable of parts, and which gradients each R takes. Law: the same sums.
module DeepSeekGraph.Compiler.Lowering.Reductions

open System.Collections.Generic
open DeepSeekGraph

/// Parts of a chunk's W: more would not hide more, and each is a program.
let private most = 16L

/// W in parts: a part ends behind the sum with which its gradients reach a bucket. `size`: elements of a gradient that are reduced over
/// data axes; 0 for what is not.
let cut (bucket: int64) (size: int -> int64) (steps: Step list) : Step list list =
    let completes (step: Step) =
        match step with
        | Step.Launch(KernelId.Accumulate, _, _, outputs, _) -> outputs |> Seq.sumBy size
        | Step.Launch _
        | Step.Start _
        | Step.Wait _
        | Step.Free _ -> 0L

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

/// The timetable with every W in its parts; `parts` of a chunk.
let spread (parts: int -> int) (table: Action list) : Action list = [
    for action in table do
        match action.Phase with
        | Phase.W _ ->
            for part in 0 .. parts action.Chunk - 1 do
                yield { action with Phase = Phase.W part }
        | Phase.Prologue
        | Phase.F
        | Phase.I
        | Phase.S
        | Phase.R _
        | Phase.Epilogue -> yield action
]

/// What one R reduces.
type Early = {
    Chunk: int
    Part: int
    /// Accumulators, in the order in which they are complete.
    Gradients: int list
}

/// Gradients by the part of W whose last run completes them, in the order of the timetable, which has W in parts. `steps` of a program;
/// `isReduced`: the gradients that are meant. Others, and what F or I adds to last, are left to the epilogue.
let early (steps: Action -> Step list) (isReduced: int -> bool) (table: Action list) : Early list =
    let completed = Dictionary<int, int>()

    for i, action in List.indexed table do
        if not action.Phase.IsOnce then
            for step in steps action do
                match step with
                | Step.Launch(KernelId.Accumulate, _, _, outputs, _) ->
                    for slot in outputs do
                        if isReduced slot then
                            completed[slot] <- i
                | Step.Launch _
                | Step.Start _
                | Step.Wait _
                | Step.Free _ -> ()

    [
        for i, action in List.indexed table do
            let mine = HashSet()

            for KeyValue(slot, at) in completed do
                if at = i then
                    mine.Add slot |> ignore

            if action.Phase.IsW && mine.Count > 0 then
                {
                    Chunk = action.Chunk
                    Part = action.Phase.Part
                    Gradients = [
                        for step in steps action do
                            match step with
                            | Step.Launch(KernelId.Accumulate, _, _, outputs, _) ->
                                for slot in outputs do
                                    if mine.Remove slot then
                                        slot
                            | Step.Launch _
                            | Step.Start _
                            | Step.Wait _
                            | Step.Free _ -> ()
                    ]
                }
    ]

/// The timetable with each R behind the last run of its part.
let place (early: Early list) (table: Action list) : Action list =
    let last = Dictionary<struct (int * int), int>()

    table
    |> List.iteri (fun i action ->
        if action.Phase.IsW then
            last[struct (action.Chunk, action.Phase.Part)] <- i)

    let behind = dict [ for e in early -> last[struct (e.Chunk, e.Part)], e ]

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

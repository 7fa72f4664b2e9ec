/// When a slot's memory is given back: after the last step that touches it or waits for a collective that does.
module DeepSeekGraph.Compiler.Lowering.Lifetimes

open System.Collections.Generic
open DeepSeekGraph

/// Slots a step touches.
let touched (step: Step) : int seq =
    match step with
    | Step.Launch(_, _, inputs, outputs, _) -> Seq.append inputs outputs
    | Step.Start(_, _, _, inputs, outputs, _) -> Seq.append inputs outputs
    | Step.Wait _ -> Seq.empty
    | Step.Free slot -> Seq.singleton slot

/// Does a slot come and go with a microbatch (or, in prologue and epilogue, with the step)?
let private transient (slots: Slots.SlotTable) id =
    match slots[id].Kind with
    | SlotKind.Input
    | SlotKind.Saved
    | SlotKind.Temporary -> true
    | SlotKind.Parameter
    | SlotKind.Optimizer
    | SlotKind.Gradient
    | SlotKind.Counter
    | SlotKind.Scalar
    | SlotKind.Cache -> false

/// Inserts Free steps into programs that run in the given order for one microbatch; slots that live across programs become Saved.
let insert (slots: Slots.SlotTable) (programs: Step list[]) : Step[][] =
    let starts = Dictionary<int, int list>()
    let last = Dictionary<int, struct (int * int)>()
    let first = Dictionary<int, int>()

    programs
    |> Array.iteri (fun p steps ->
        steps
        |> List.iteri (fun i step ->
            let mine =
                match step with
                | Step.Start(token, _, _, _, _, _) ->
                    let all = List.ofSeq (touched step)
                    starts[token] <- all
                    all
                | Step.Wait token -> starts[token]
                | Step.Launch _
                | Step.Free _ -> List.ofSeq (touched step)

            for slot in mine do
                if transient slots slot then
                    last[slot] <- struct (p, i)
                    first.TryAdd(slot, p) |> ignore))

    let dying = Dictionary<struct (int * int), List<int>>()

    for KeyValue(slot, at) in last do
        let struct (p, _) = at

        if first[slot] <> p && slots[slot].Kind.IsTemporary then
            slots.SetKind(slot, SlotKind.Saved)

        match dying.TryGetValue at with
        | true, list -> list.Add slot
        | false, _ -> dying[at] <- List [ slot ]

    programs
    |> Array.mapi (fun p steps -> [|
        let mutable i = 0

        for step in steps do
            yield step

            match dying.TryGetValue(struct (p, i)) with
            | true, list ->
                for slot in Seq.sort list do
                    yield Step.Free slot
            | false, _ -> ()

            i <- i + 1
    |])

/// Neighbours of one group become one collective: latents and rope key, rows and probabilities, the two sums of cross-entropy.
/// before: a program's steps without Free; after: fewer starts, each with several operand tuples. Law: every slot gets the same bits.
module DeepSeekGraph.Compiler.Lowering.Bundle

open System.Collections.Generic
open DeepSeekGraph

/// How many steps behind a start its neighbour may begin; within one module they are closer.
let private reach = 96

/// The module in which both were asked for, kind, group and operands a tuple: what a bundle has in common.
let private shared (step: Step) =
    match step with
    | Step.Start(_, kind, group, inputs, outputs, path) when kind.TakesTuples ->
        ValueSome(struct (kind, group, inputs.Count / outputs.Count, path))
    | Step.Start _
    | Step.Launch _
    | Step.Wait _
    | Step.Free _ -> ValueNone

/// Behind which step each slot may be read; absent: filled before the program, or given from outside.
let private readyAt (steps: IReadOnlyList<Step>) =
    let ready = Dictionary<int, int>()
    let filled = Dictionary<int, IReadOnlyList<int>>()

    for i in 0 .. steps.Count - 1 do
        match steps[i] with
        | Step.Launch(_, _, _, outputs, _) ->
            for slot in outputs do
                ready[slot] <- i
        | Step.Start(token, _, _, _, outputs, _) -> filled[token] <- outputs
        | Step.Wait token ->
            match filled.TryGetValue token with
            | true, outputs ->
                for slot in outputs do
                    ready[slot] <- i
            // it fills nothing: a send
            | false, _ -> ()
        | Step.Free _ -> ()

    ready

/// The launches behind `first` that the operands at `second` wait for; nothing when they wait for a collective.
let private cone (steps: IReadOnlyList<Step>) (ready: Dictionary<int, int>) first (operands: int list) =
    let found = SortedSet<int>()
    let open' = Stack<int>(operands)
    let mutable free = true

    while free && open'.Count > 0 do
        match ready.TryGetValue(open'.Pop()) with
        | true, at when at > first ->
            match steps[at] with
            | Step.Launch(_, _, inputs, _, _) ->
                if found.Add at then
                    for slot in inputs do
                        open'.Push slot
            | Step.Start _
            | Step.Wait _
            | Step.Free _ -> free <- false
        | true, _
        | false, _ -> ()

    if free then ValueSome found else ValueNone

/// Both starts as one: the operand tuples of the first, then those of the second.
let private together (a: Step) (b: Step) =
    match a, b with
    | Step.Start(token, kind, group, ins, outs, path), Step.Start(other, _, _, ins', outs', _) ->
        let join (x: IReadOnlyList<int>) (y: IReadOnlyList<int>) = Seq.append x y |> Array.ofSeq
        struct (token, other, Step.Start(token, kind, group, join ins ins', join outs outs', path))
    | _, _ -> invalidOp "only starts are bundled (a bug in dsg)"

/// What waits for either token waits, at the first of those places, for the one that is left.
let private oneWait token other (steps: Step seq) =
    let mutable waited = false

    [|
        for step in steps do
            match step with
            | Step.Wait t when t = token || t = other ->
                if not waited then
                    waited <- true
                    Step.Wait token
            | Step.Wait _
            | Step.Launch _
            | Step.Start _
            | Step.Free _ -> step
    |]

/// The steps with starts `i` and `j` as one, or nothing when neither can move to the other.
let private merge (steps: Step[]) (ready: Dictionary<int, int>) i j =
    let struct (token, other, one) = together steps[i] steps[j]

    let operands =
        match steps[j] with
        | Step.Start(_, _, _, inputs, _, _) -> List.ofSeq inputs
        | Step.Launch _
        | Step.Wait _
        | Step.Free _ -> []

    match cone steps ready i operands with
    // the second begins with the first, behind the launches that make its operands
    | ValueSome early ->
        ValueSome(
            oneWait token other [
                yield! steps[.. i - 1]

                for k in early do
                    yield steps[k]

                yield one

                for k in i + 1 .. steps.Length - 1 do
                    if k <> j && not (early.Contains k) then
                        yield steps[k]
            ]
        )
    // the first begins with the second, when nobody reads its results before
    | ValueNone when Array.contains (Step.Wait token) steps[i..j] |> not ->
        ValueSome(
            oneWait token other [
                yield! steps[.. i - 1]
                yield! steps[i + 1 .. j - 1]
                yield one
                yield! steps[j + 1 ..]
            ]
        )
    | ValueNone -> ValueNone

/// Bundles what can begin together. All members of a group run the same program, so they agree on the order of their collectives.
let run (program: Step list) : Step list =
    let mutable steps = Array.ofList program
    let mutable ready = readyAt steps
    let mutable i = 0

    while i < steps.Length do
        let mine = shared steps[i]

        let merged =
            if mine.IsNone then
                ValueNone
            else
                seq { i + 1 .. min (i + reach) (steps.Length - 1) }
                |> Seq.filter (fun j -> shared steps[j] = mine)
                |> Seq.map (merge steps ready i)
                |> Seq.tryPick (fun found -> if found.IsSome then Some found.Value else None)
                |> ValueOption.ofOption

        match merged with
        | ValueSome changed ->
            steps <- changed
            ready <- readyAt steps
        // the place may hold a launch that moved up: it is looked at again
        | ValueNone -> i <- i + 1

    List.ofArray steps

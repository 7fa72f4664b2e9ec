/// Two microbatches at once: a forward and the backward of another take turns on a rank, so that one's collectives run beside the other's launches.
/// before: programs and a timetable of them; after: programs in parts and a timetable of parts. Law: every microbatch runs the same steps in
/// the same order, so every slot gets the same bits. What Megatron's combined 1F1B does for layers cut by hand.
module DeepSeekGraph.Compiler.Lowering.Weave

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler

/// Standing still for less is not worth a turn: ns.
let private least = 10_000L

/// A strand may be left for one that has come to life again after so much of its launches: ns.
let private grain = 100_000L

/// Beside launches a collective takes longer, since it gets a part of the GPU only: 2 to 4 times on two H200s.
let private beside (clock: Overlap.Clock) : Overlap.Clock = {
    clock with
        Collective = fun kind group inputs outputs -> 3L * clock.Collective kind group inputs outputs
}

/// What runs in one go. `Opens`: a program's part has to begin here.
[<Struct>]
type private Atom = { Steps: Step list; Opens: bool }

/// A program's pieces in atoms: one ends before each wait at which the program would stand still if it ran alone, and where it has run
/// for long. Messages between stages are no place to end: when they arrive is not known here.
let private atoms (clock: Overlap.Clock) (pieces: Step list list) : Atom list =
    let timeline, ends = Overlap.Timeline clock, Dictionary<int, int64>()
    let messages = HashSet<int>()

    [
        for piece in pieces do
            let mutable opens, began = true, timeline.Now
            let steps = List<Step>()

            for step in piece do
                let stands =
                    match step with
                    | Step.Start(token, (Collective.Send _ | Collective.Recv _), _, _, _, _) ->
                        messages.Add token |> ignore
                        false
                    | Step.Wait token -> not (messages.Contains token) && timeline.Stands(ends, token) >= least
                    | Step.Start _
                    | Step.Launch _
                    | Step.Free _ -> false

                if steps.Count > 0 && (stands || timeline.Now - began >= grain) then
                    {
                        Steps = List.ofSeq steps
                        Opens = opens
                    }

                    opens <- false
                    steps.Clear()

                timeline.Run(ends, step)

                if steps.Count = 0 then
                    began <- timeline.Now

                steps.Add step

            {
                Steps = List.ofSeq steps
                Opens = opens
            }
    ]

/// One microbatch's atoms on their way.
[<Sealed>]
type private Strand(clock: Overlap.Clock, atoms: Atom[]) =
    let ends = Dictionary<int, int64>()

    let cost (atom: Atom) =
        atom.Steps
        |> List.sumBy (fun step ->
            match step with
            | Step.Launch(kernel, attributes, inputs, outputs, _) -> clock.Launch kernel attributes inputs outputs
            | Step.Start _
            | Step.Wait _
            | Step.Free _ -> 0L)

    let costs = atoms |> Array.map cost
    let all = max 1L (Array.sum costs)
    let mutable at, ran = 0, 0L

    member _.AtEnd = at >= atoms.Length

    /// The share that has run.
    member _.Share = float ran / float all

    /// How long the timeline would stand still before the next atom.
    member _.Stands(timeline: Overlap.Timeline) =
        match atoms[at].Steps with
        | Step.Wait token :: _ -> timeline.Stands(ends, token)
        | _runs -> 0L

    member _.Run(timeline: Overlap.Timeline) =
        for step in atoms[at].Steps do
            timeline.Run(ends, step)

        ran <- ran + costs[at]
        at <- at + 1

/// Whose atom comes next, a forward's (true) or a backward's, and how long both stand still. A strand goes on until it would stand still, or
/// until the other is behind: at all if that stood still and need not any more, by a share of `lead` if it could go on.
let private turnsBy
    (lead: float)
    (clock: Overlap.Clock)
    (forward: Atom list)
    (backward: Atom list)
    : struct (int64 * bool list) =
    let timeline = Overlap.Timeline clock
    let mutable still = 0L
    let f, b = Strand(clock, Array.ofList forward), Strand(clock, Array.ofList backward)
    let mutable onForward, stood = true, false

    let next () =
        let mine, other = if onForward then f, b else b, f

        if mine.AtEnd || other.AtEnd then
            other.AtEnd = onForward
        else
            match mine.Stands timeline >= least, other.Stands timeline with
            | false, 0L when other.Share + (if stood then 0.0 else lead) < mine.Share ->
                stood <- false
                not onForward
            | false, _ -> onForward
            | true, theirs when theirs < mine.Stands timeline ->
                stood <- true
                not onForward
            | true, _ -> onForward

    let order = [
        while not (f.AtEnd && b.AtEnd) do
            onForward <- next ()
            let mine = if onForward then f else b
            still <- still + mine.Stands timeline
            mine.Run timeline
            onForward
    ]

    struct (still, order)

/// The best of some leads.
let private turns (clock: Overlap.Clock) (forward: Atom list) (backward: Atom list) : bool list =
    let struct (_, order) =
        [ 0.1; 0.03; 0.3 ]
        |> List.map (fun lead -> turnsBy lead clock forward backward)
        |> List.minBy (fun (struct (still, _)) -> still)

    order

/// The parts of every program, and the timetable of parts. `pieces` of a phase of a chunk: where its parts begin in any case. `table`: one
/// action after the other, but for an F with the I and W of another microbatch, which take turns.
let run
    (clock: Overlap.Clock)
    (pieces: Phase -> int -> Step list list)
    (table: Action list list)
    : struct ((Phase -> int -> Step list list) * Action list) =
    let clock = beside clock

    let remembered make =
        let known = Dictionary<struct (string * int), 'a>()

        fun (phase: Phase) (chunk: int) ->
            match known.TryGetValue(struct (phase.Word, chunk)) with
            | true, made -> made
            | false, _ ->
                let made = make phase chunk
                known[struct (phase.Word, chunk)] <- made
                made

    let pairs = table |> List.exists (fun group -> group.Length > 1)

    let atoms =
        remembered (fun phase chunk ->
            if pairs then
                Array.ofList (atoms clock (pieces phase chunk))
            else
                [| for steps in pieces phase chunk -> { Steps = steps; Opens = true } |])

    let known = Dictionary<struct (int * int), bool list>()

    /// Atoms of a group in the order in which they run: action and atom.
    let order (group: Action list) = [
        match group with
        | [ f; i; w ] ->
            let strand (actions: Action list) = [
                for a in actions do
                    for k, atom in Array.indexed (atoms a.Phase a.Chunk) -> struct (a, k), atom
            ]

            let forward, backward = strand [ f ], strand [ i; w ]
            let key = struct (f.Chunk, i.Chunk)

            if not (known.ContainsKey key) then
                known[key] <- turns clock (List.map snd forward) (List.map snd backward)

            let mutable forward, backward = List.map fst forward, List.map fst backward

            for isForward in known[key] do
                if isForward then
                    yield struct (isForward, List.head forward)
                    forward <- List.tail forward
                else
                    yield struct (isForward, List.head backward)
                    backward <- List.tail backward
        | actions ->
            for a in actions do
                for k in 0 .. (atoms a.Phase a.Chunk).Length - 1 do
                    yield struct (true, struct (a, k))
    ]

    let orders = table |> List.map order
    let opened = HashSet<struct (string * int * int)>()

    for order in orders do
        for before, now in List.pairwise order do
            let struct (first, _), struct (second, struct (a: Action, k)) = before, now

            if first <> second then
                opened.Add(struct (a.Phase.Word, a.Chunk, k)) |> ignore

    /// The part that each atom of a program is of.
    let partOf =
        remembered (fun phase chunk ->
            let mutable part = -1

            [|
                for k, atom in Array.indexed (atoms phase chunk) do
                    if k = 0 || atom.Opens || opened.Contains(struct (phase.Word, chunk, k)) then
                        part <- part + 1

                    part
            |])

    let parts =
        remembered (fun phase chunk ->
            Array.zip (partOf phase chunk) (atoms phase chunk)
            |> Array.groupBy fst
            |> Array.map (fun (_, together) -> together |> Array.map (fun (_, atom) -> atom.Steps) |> List.concat)
            |> List.ofArray)

    parts,
    [
        for order in orders do
            for struct (_, struct (action, k)) in order do
                let part = partOf action.Phase action.Chunk

                if k = 0 || part[k] <> part[k - 1] then
                    yield {
                        action with
                            Phase = action.Phase.WithPart part[k]
                    }
    ]

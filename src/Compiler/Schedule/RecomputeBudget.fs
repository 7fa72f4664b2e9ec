/// The cheapest recomputation that fits a budget of bytes a rank: compile, read the memory table, enlarge the set, compile again.
/// Candidates are (model unit, name) pairs in the order of bytes saved per work done again, both read off one rank's graph.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.RecomputeBudget

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Partition

/// One name chosen for one unit, and what was expected of it when it was chosen.
type Choice = {
    /// The pipeline rank that runs the unit.
    Stage: int
    Unit: ModelUnit
    Name: string
    /// Bytes that a microbatch in flight no longer keeps, on each rank.
    Saved: int64
    /// Microbatches in flight at most.
    InFlight: int
    /// FLOPs done again for each microbatch on each rank; moved and sent bytes count as the FLOPs that take as long.
    Work: float
}

/// What one attempt came to.
type Attempt = {
    Local: Partitioned
    Stages: IReadOnlyList<StagePlan>
    Memory: IReadOnlyList<MemoryRow>
}

/// What was chosen, and the peaks it went from.
type Outcome = {
    Choices: Choice list
    /// Peak bytes of each stage, routed rows at their headroom, with nothing but the recipe's own names.
    Before: int64[]
}

/// Moving a byte through memory takes as long as this many FLOPs (400 TFLOP/s against 3.35 TB/s).
let private flopsPerByte = 120.0
/// Sending a byte takes as long as this many (400 TFLOP/s against 50 GB/s).
let private flopsPerSentByte = 8_000.0

/// What the units of one rank's graph keep for their backward pass and do again, under any names.
[<Sealed>]
type private Ledger(graph: Graph) =
    let selector = Recompute.Selector graph
    let bytes v = graph.Types[v].Bytes

    /// A gathered copy is larger than what it was gathered from: a later pass gathers anew.
    let gathers (node: Node) =
        match node.Op with
        | Op.Collective(Collective.AllGather _, _, _) -> not graph.Types[node.Outputs[0]].Routed
        | _other -> false

    let work (node: Node) =
        let types (vs: int[]) = vs |> Array.map (fun v -> graph.Types[v])

        let moved = Array.append node.Inputs node.Outputs |> Array.sumBy (fun v -> float (bytes v))

        if node.Op.IsCollective then
            flopsPerSentByte * (node.Outputs |> Array.sumBy (fun v -> float (bytes v)))
        else
            (Catalog.define node.Op).Flops (types node.Inputs) (types node.Outputs) + flopsPerByte * moved

    let readers =
        graph.Nodes
        |> Array.filter (fun node -> not node.Origin.Pass.IsForward)
        |> Array.groupBy _.Origin.Unit
        |> dict

    member _.Units = selector.Units

    /// Bytes kept behind the unit's forward pass, and the work done again.
    member _.Of(part: ModelUnit, names: string list) : struct (int64 * float) =
        let selected = selector.Select(part, names)
        let kept, again = HashSet<int>(), HashSet<int>()

        let rec read v =
            let v = Lowering.Edges.root graph v
            let n = graph.Producer[v]
            let maker = graph.Nodes[n]

            if maker.Origin.Pass.IsForward then
                if maker.Origin.Unit = part && (selected.Contains n || gathers maker) then
                    if again.Add n then
                        for x in maker.Inputs do
                            read x
                elif not (maker.Op.IsParameter || maker.Op.IsInput) then
                    kept.Add v |> ignore

        match readers.TryGetValue part with
        | true, nodes ->
            for node in nodes do
                for v in node.Inputs do
                    read v
        | false, _ -> ()

        struct (Seq.sumBy bytes kept, again |> Seq.sort |> Seq.sumBy (fun n -> work graph.Nodes[n]))

/// Microbatches of which a chunk has run F but not W, at most.
let private inFlight (stage: StagePlan) (chunk: int) =
    let mutable now, most = 0, 0

    for action in stage.Timetable do
        if action.Chunk = chunk then
            if action.Phase = Phase.F 0 then
                now <- now + 1
                most <- max most now
            elif action.Phase = Phase.W 0 then
                now <- now - 1

    most

let private unreachable (recipe: Recipe) (budget: int64) (stage: int) (peak: int64) = {
    Code = Codes.RecomputeBudget
    At = $"recipe.recompute, recipe %s{recipe.Name}"
    Message =
        $"stage %i{stage} needs %i{peak} bytes a rank (%s{ByteSize.show peak}) whatever is recomputed; the budget is %i{budget} (%s{ByteSize.show budget})"
    Help = $"choose a budget of %s{ByteSize.show peak} or more, or more pipeline, tensor or expert parallelism"
}

/// Names of each unit: the recipe's own, and those chosen.
let policy (recipe: Recipe) (choices: Choice list) : Recompute.Policy =
    let own = List.ofSeq recipe.Recompute

    let added =
        choices
        |> List.groupBy _.Unit
        |> List.map (fun (part, list) -> part, own @ List.map _.Name list)
        |> dict

    fun part ->
        match added.TryGetValue part with
        | true, names -> names
        | false, _ -> own

/// What still can be chosen for a unit: every name that makes it keep less, with its expected effect.
let private candidates (ledger: Ledger) (part: ModelUnit) (names: string list) =
    let struct (kept, work) = ledger.Of(part, names)

    [
        for name in List.except names Recompute.names do
            let struct (kept', work') = ledger.Of(part, names @ [ name ])

            if kept' < kept then
                struct (name, kept - kept', max 1.0 (work' - work))
    ]

/// The bytes that count against the budget: with what is kept for routed rows.
let private peaks (attempt: Attempt) = attempt.Memory |> Seq.map _.Headroom |> Array.ofSeq

/// Chooses for every stage alone. `place`: pipeline rank and chunk of a unit. `plain`: one rank's graph without recomputation.
/// `compile`: what a policy comes to. Gives the choices, or which stage cannot fit.
let choose
    (recipe: Recipe)
    (budget: int64)
    (place: ModelUnit -> struct (int * int))
    (plain: Graph)
    (compile: Recompute.Policy -> Attempt)
    : Result<Outcome, Diagnostic list> =
    let ledger = Ledger plain
    let first = compile (policy recipe [])
    let before = peaks first
    let units = ledger.Units |> List.groupBy (fun part -> let struct (s, _) = place part in s) |> Map.ofList
    let known = Dictionary<struct (ModelUnit * string list), struct (string * int64 * float) list>()

    let candidatesOf part names =
        match known.TryGetValue(struct (part, names)) with
        | true, found -> found
        | false, _ ->
            let found = candidates ledger part names
            known[struct (part, names)] <- found
            found

    /// The choices of a stage until `need` bytes are expected to be saved; at least one more. None where nothing is left.
    let enlarge (stage: int) (need: int64) (chosen: Choice list) : Choice list option =
        let rec grow (left: int64) (chosen: Choice list) grown =
            if left <= 0L && grown then
                Some chosen
            else
                let names = policy recipe chosen

                let best =
                    Map.tryFind stage units
                    |> Option.defaultValue []
                    |> List.collect (fun part -> [
                        let struct (_, chunk) = place part
                        let flying = inFlight first.Stages[stage] chunk

                        for struct (name, saved, work) in candidatesOf part (names part) do
                            {
                                Stage = stage
                                Unit = part
                                Name = name
                                Saved = saved
                                InFlight = flying
                                Work = work
                            }
                    ])
                    |> List.sortBy (fun c ->
                        -(float c.Saved / c.Work), c.Unit, List.findIndex ((=) c.Name) Recompute.names)
                    |> List.tryHead

                match best with
                | Some choice -> grow (left - choice.Saved * int64 choice.InFlight) (chosen @ [ choice ]) true
                | None -> if grown then Some chosen else None

        grow need chosen false

    /// Choices of a stage that fit without the slack is used up: the dearest first.
    let thin (slack: int64) (mine: Choice list) =
        let mutable slack = slack

        mine
        |> List.sortByDescending (fun c -> c.Work)
        |> List.filter (fun c ->
            let held = c.Saved * int64 c.InFlight

            if held <= slack then
                slack <- slack - held
                true
            else
                false)

    let rec fit
        (attempt: Attempt)
        (best: int64[])
        (chosen: Choice list)
        : Result<Choice list * Attempt, Diagnostic list> =
        let now = peaks attempt
        let best = Array.map2 min best now

        let over = [
            for s in 0 .. now.Length - 1 do
                if now[s] > budget then
                    s
        ]

        let grown =
            over
            |> List.map (fun s -> s, enlarge s (now[s] - budget) (chosen |> List.filter (fun c -> c.Stage = s)))

        match grown |> List.filter (fun (_, list) -> list.IsNone) with
        | [] when over.IsEmpty -> Ok(chosen, attempt)
        | [] ->
            let more = grown |> List.collect (fun (_, list) -> list.Value)
            let chosen = (chosen |> List.filter (fun c -> not (List.contains c.Stage over))) @ more
            fit (compile (policy recipe chosen)) best chosen
        | stuck -> Error [ for s, _ in stuck -> unreachable recipe budget s best[s] ]

    fit first before []
    |> Result.map (fun (chosen, fitted) ->
        // an estimate may have chosen more than it takes: give back what is not needed, and keep that where it still fits
        let now = peaks fitted

        let dropped = [
            for s in 0 .. now.Length - 1 do
                yield! thin (budget - now[s]) (chosen |> List.filter (fun c -> c.Stage = s))
        ]

        let chosen =
            if dropped.IsEmpty then
                chosen
            else
                let after = peaks (compile (policy recipe (List.except dropped chosen)))
                chosen |> List.filter (fun c -> after[c.Stage] > budget || not (List.contains c dropped))

        {
            Choices = chosen |> List.sortBy (fun c -> c.Stage, c.Unit)
            Before = before
        })

/// What was chosen and why, as lines of a plan's recipe: one for each stage.
let explain (budget: int64) (outcome: Outcome) (memory: IReadOnlyList<MemoryRow>) : string list = [
    for row in memory do
        let mine = outcome.Choices |> List.filter (fun c -> c.Stage = row.Stage)

        let what =
            mine
            |> List.groupBy (fun c -> c.Name, c.Saved, c.InFlight, c.Work)
            |> List.map (fun ((name, saved, flying, work), same) ->
                let units = same |> List.map (fun c -> string c.Unit) |> String.concat " "
                let work = work.ToString("E1", System.Globalization.CultureInfo.InvariantCulture)
                $"%s{name} of %s{units}, each saves %s{ByteSize.show saved} x %i{flying} in flight for %s{work} FLOPs")

        let what = if what.IsEmpty then [ "nothing recomputed beyond the recipe's own" ] else what
        let before = ByteSize.show outcome.Before[row.Stage]
        let list = String.concat "; " what

        $"recompute.stage%i{row.Stage}=peak %s{before} to %s{ByteSize.show row.Headroom} of %s{ByteSize.show budget}: %s{list}"
]

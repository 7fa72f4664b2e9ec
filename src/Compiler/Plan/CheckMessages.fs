/// Can all stages reach the end? Their timetables are run against each other with rendezvous messages and in-order lanes.
/// A lane is a group that crosses stages, as it is one communicator of NCCL: what its members start there runs in that order.
/// Work inside a stage always ends.
module DeepSeekGraph.Compiler.Checking.Messages

open System
open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Checking.Shapes

/// What one stage posts on a lane: message or sum, with the slots that carry it.
[<Struct>]
type private Post = {
    Kind: Collective
    Slots: IReadOnlyList<int>
    Microbatch: int
    /// Of this stage's post: action and step.
    Action: Action
    Step: int
}

/// The only steps that another stage can hold up.
[<RequireQualifiedAccess>]
type private Event =
    | Post of Lane: int * Kind: Collective * Slots: IReadOnlyList<int> * Token: int * Step: int
    | Wait of Token: int * Step: int

/// Members of a lane, each with what it has posted so far.
type private Lane = {
    Name: string
    /// The stages, and for messages: sender, receiver.
    Stages: int[]
    Posts: List<Post>[]
}

/// The lanes of a plan, made as they are first used.
type private Lanes() =
    let lanes = List<Lane>()
    let index = Dictionary<int, int>()
    member _.All = lanes

    member _.Of(group: Group, isMessage: bool) : int =
        match index.TryGetValue group.Id with
        | true, i -> i
        | false, _ ->
            index[group.Id] <- lanes.Count
            let stages = Array.ofSeq group.Stages

            lanes.Add {
                Name =
                    if isMessage then
                        $"messages from stage %i{stages[0]} to stage %i{stages[1]} in group %s{group.Name}"
                    else
                        $"sums over the stages of %s{group.Name}"
                Stages = stages
                Posts = Array.init stages.Length (fun _ -> List<Post>())
            }

            lanes.Count - 1

/// Steps of a program that other stages can hold up.
let private events (plan: PlanSet) (lanes: Lanes) (program: Program) : Event[] =
    let tokens = HashSet<int>()

    let post kind group slots token i =
        tokens.Add token |> ignore
        let isMessage = (kind: Collective).IsSend || kind.IsRecv
        Some(Event.Post(lanes.Of(plan.Groups[group], isMessage), kind, slots, token, i))

    program.Steps
    |> Seq.indexed
    |> Seq.choose (fun (i, step) ->
        match step with
        | Step.Start(token, kind, group, inputs, outputs, _) ->
            match kind with
            | Collective.Send _ -> post kind group inputs token i
            | Collective.Recv _ -> post kind group outputs token i
            | Collective.AllReduceSum when plan.Groups[group].Stages.Count > 0 -> post kind group inputs token i
            | Collective.AllReduceSum
            | Collective.AllReduceMax
            | Collective.AllGather _
            | Collective.ReduceScatter _
            | Collective.AllToAll _
            | Collective.RouteToExperts
            | Collective.RowsToExperts
            | Collective.RowsToTokens
            | Collective.Dispatch _
            | Collective.Combine _ -> None
        // tokens of collectives inside the stage are not known as open and never block
        | Step.Wait token -> Some(Event.Wait(token, i))
        | Step.Launch _
        | Step.Free _ -> None)
    |> Array.ofSeq

/// One stage on its way through its timetable.
type private Runner(stage: StagePlan, programs: Dictionary<struct (Phase * int), Event[]>) =
    let mutable action, event = 0, 0
    // token of a microbatch (-1: of the step) -> lane and place on it
    let opened = Dictionary<struct (int * int), struct (int * int)>()

    let owner (a: Action) = if a.Phase.IsOnce then -1 else a.Microbatch

    member _.Stage = stage
    member _.AtEnd = action >= stage.Timetable.Count
    member _.Action = stage.Timetable[action]

    /// What the stage stands before; nothing at the end of an action.
    member this.Event =
        let program = programs[struct (this.Action.Phase, this.Action.Chunk)]
        if event < program.Length then ValueSome program[event] else ValueNone

    member _.Step() = event <- event + 1

    member _.NextAction() =
        action <- action + 1
        event <- 0

    member this.Open(token, lane, place) = opened[struct (owner this.Action, token)] <- struct (lane, place)

    member this.Lookup token =
        match opened.TryGetValue(struct (owner this.Action, token)) with
        | true, found -> ValueSome found
        | false, _ -> ValueNone

/// What a slot stands for. Temporaries of a sum are numbered by stage, behind '#', and may be reduced already.
/// Values of later chunks are told apart behind '@'.
let private meaning (post: Post) (slot: SlotInfo) =
    if post.Kind.IsSend || post.Kind.IsRecv then
        slot.Name.Split('@')[0]
    else
        let name = slot.Name.Split('#')[0]
        if name.StartsWith "reduced:" then name.Substring 8 else name

/// Both ends of the k-th message or sum must mean the same value.
let private compare (f: Findings) (plan: PlanSet) (lane: Lane) (k: int) =
    let stages = lane.Stages

    let describe i =
        let post = lane.Posts[i][k]
        post, [ for id in post.Slots -> plan.Stages[stages[i]].Slots[id] ]

    let first, carried = describe 0
    let at i = place stages[i] lane.Posts[i].[k].Action.Name lane.Posts[i].[k].Step ""

    for i in 1 .. stages.Length - 1 do
        let other, answered = describe i
        let wrong message = f.Add(Codes.PlanDeadlock, at i, message)

        if (first.Kind.IsSend || first.Kind.IsRecv) <> (other.Kind.IsSend || other.Kind.IsRecv) then
            wrong $"of the %s{lane.Name}, number %i{k} is a message on one stage and a sum on another"
        elif first.Microbatch <> other.Microbatch then
            wrong
                $"of the %s{lane.Name}, number %i{k} is of microbatch %i{first.Microbatch} on stage %i{stages[0]} but of microbatch %i{other.Microbatch} on stage %i{stages[i]}"
        elif carried.Length <> answered.Length then
            wrong
                $"of the %s{lane.Name}, number %i{k} has %i{carried.Length} values on stage %i{stages[0]} but %i{answered.Length} on stage %i{stages[i]}"
        else
            for slot, peer in List.zip carried answered do
                if meaning first slot <> meaning other peer then
                    wrong
                        $"of the %s{lane.Name}, number %i{k} is '%s{slot.Name}' on stage %i{stages[0]} but '%s{peer.Name}' on stage %i{stages[i]}"
                elif
                    slot.DType <> peer.DType
                    || List.ofSeq slot.Extents <> List.ofSeq peer.Extents
                    || List.ofSeq slot.Layout <> List.ofSeq peer.Layout
                    || slot.Routed <> peer.Routed
                then
                    wrong
                        $"of the %s{lane.Name}, number %i{k} ('%s{slot.Name}') has another type or layout on stage %i{stages[i]} than on stage %i{stages[0]}"

/// Runs all stages until none can go on.
let check (f: Findings) (plan: PlanSet) : unit =
    let lanes = Lanes()

    let runners =
        plan.Stages
        |> Seq.map (fun stage ->
            let programs = Dictionary<struct (Phase * int), Event[]>()

            for program in stage.Programs do
                programs[struct (program.Phase, program.Chunk)] <- events plan lanes program

            Runner(stage, programs))
        |> Array.ofSeq

    // posts of a lane that all members have made
    let matched = Array.zeroCreate<int> lanes.All.Count

    let rec settle lane =
        let l = lanes.All[lane]

        if l.Posts |> Array.forall (fun p -> p.Count > matched[lane]) then
            compare f plan l matched[lane]
            matched[lane] <- matched[lane] + 1
            settle lane

    let rec advance (r: Runner) moved =
        if r.AtEnd then
            moved
        else
            match r.Event with
            | ValueNone ->
                r.NextAction()
                advance r true
            | ValueSome(Event.Post(lane, kind, slots, token, step)) ->
                let l = lanes.All[lane]
                let member' = Array.IndexOf(l.Stages, r.Stage.Stage)

                l.Posts[member'].Add {
                    Kind = kind
                    Slots = slots
                    Microbatch = r.Action.Microbatch
                    Action = r.Action
                    Step = step
                }

                r.Open(token, lane, l.Posts[member'].Count - 1)
                settle lane
                r.Step()
                advance r true
            | ValueSome(Event.Wait(token, _)) ->
                match r.Lookup token with
                | ValueSome(struct (lane, place)) when place >= matched[lane] -> moved
                | ValueSome _
                | ValueNone ->
                    r.Step()
                    advance r true

    let mutable moved = true

    while moved do
        moved <- false

        for r in runners do
            moved <- advance r false || moved

    let stuck = runners |> Array.filter (fun r -> not r.AtEnd)

    let waiting (r: Runner) =
        let shown = $"stage %i{r.Stage.Stage} waits in %s{r.Action.Name}"

        match r.Event with
        | ValueSome(Event.Wait(token, _)) ->
            match r.Lookup token with
            | ValueSome(struct (lane, place)) -> $"%s{shown} for number %i{place} of the %s{lanes.All[lane].Name}"
            | ValueNone -> shown
        | ValueSome(Event.Post _)
        | ValueNone -> shown

    if stuck.Length > 0 then
        let r = stuck[0]

        let step =
            match r.Event with
            | ValueSome(Event.Wait(_, step))
            | ValueSome(Event.Post(_, _, _, _, step)) -> step
            | ValueNone -> 0

        let text = stuck |> Array.truncate 8 |> Array.map waiting |> String.concat "; "
        f.Add(Codes.PlanDeadlock, place r.Stage.Stage r.Action.Name step "", $"no stage can go on: %s{text}")
    else
        for i in 0 .. matched.Length - 1 do
            if lanes.All[i].Posts |> Array.exists (fun p -> p.Count <> matched[i]) then
                f.Add(Codes.PlanDeadlock, "", $"of the %s{lanes.All[i].Name}, some are never answered")

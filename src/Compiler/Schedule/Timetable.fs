/// Timetables of the pipeline: in which order each rank runs the programs of its chunks over the microbatches.
namespace DeepSeekGraph.Compiler

open DeepSeekGraph

[<RequireQualifiedAccess>]
type Schedule =
    /// All forwards, then all backwards: simplest, and most memory.
    | GPipe
    /// Warm-up, then one forward and one backward in turn: rank r of p holds at most p - r microbatches.
    | OneFOneB
    /// 1F1B over several chunks a rank (arXiv 2104.04473, section 2.2, in Megatron's order): the bubble shrinks by the number of chunks.
    | Interleaved

    /// As recipes and plans write it.
    member this.Name =
        match this with
        | GPipe -> "GPipe"
        | OneFOneB -> "1F1B"
        | Interleaved -> "Interleaved1F1B"

    /// In the order of preference.
    static member All = [| OneFOneB; Interleaved; GPipe |]

/// What a timetable is for.
type PipelineShape = {
    /// Pipeline ranks (p).
    Ranks: int
    /// Chunks of each rank (v).
    Chunks: int
    Microbatches: int
    /// Microbatches that a chunk runs before the next chunk of its rank has its turn (g); 0: p, or with one chunk none.
    Group: int
    /// Does each forward go with the backward of another microbatch, so that one's collectives run beside the other's launches? A rank then
    /// holds one microbatch more.
    Pairs: bool
}

[<RequireQualifiedAccess>]
module Timetable =
    /// The schedule a recipe names.
    let parse (name: string) : Result<Schedule, Diagnostic list> =
        let same (s: Schedule) = System.String.Equals(s.Name, name, System.StringComparison.OrdinalIgnoreCase)

        match Array.tryFind same Schedule.All with
        | Some schedule -> Ok schedule
        | None ->
            Error [
                {
                    Code = Codes.ScheduleName
                    At = "recipe schedule"
                    Message = $"there is no schedule '%s{name}'"
                    Help = "choose one of " + String.concat ", " (Schedule.All |> Seq.map _.Name)
                }
            ]

    /// Several chunks imply that 1F1B interleaves them.
    let resolve (schedule: Schedule) (shape: PipelineShape) : Schedule =
        match schedule with
        | Schedule.OneFOneB when shape.Chunks > 1 -> Schedule.Interleaved
        | Schedule.OneFOneB
        | Schedule.Interleaved
        | Schedule.GPipe -> schedule

    /// With the group that is meant.
    let grouped (shape: PipelineShape) : PipelineShape =
        if shape.Group = 0 && shape.Chunks > 1 then { shape with Group = shape.Ranks } else shape

    /// Group sizes that leave no group of fewer than p microbatches, the one nearest to `wanted` first.
    let private sizes (shape: PipelineShape) (wanted: int) =
        [ shape.Ranks .. shape.Microbatches ]
        |> List.filter (fun g -> shape.Microbatches % g = 0 || shape.Microbatches % g >= shape.Ranks)
        |> List.sortBy (fun g -> abs (g - wanted), g)

    /// What keeps a schedule from running on such a pipeline; empty when legal.
    let check (schedule: Schedule) (shape: PipelineShape) : Diagnostic list =
        let schedule, shape = resolve schedule shape, grouped shape

        let wrong message help = [
            {
                Code = Codes.ScheduleShape
                At = "recipe.virtual_pipeline"
                Message = message
                Help = help
            }
        ]

        let apart message help = [
            {
                Code = Codes.ScheduleShape
                At = "recipe.overlap_moe_expert_parallel_comm"
                Message = message
                Help = help + ", or leave overlap_moe_expert_parallel_comm out"
            }
        ]

        let choose wanted =
            match sizes shape wanted |> List.truncate 5 |> List.sort with
            | [] ->
                $"choose a global batch of %i{shape.Ranks} microbatches or more (there are %i{shape.Microbatches}), or virtual_pipeline 1"
            | some -> $"""choose microbatch_group from %s{some |> List.map string |> String.concat " "}"""

        let rest = if shape.Group < 1 then 0 else shape.Microbatches % shape.Group

        match schedule with
        | _any when shape.Chunks < 1 || shape.Chunks > 1000 ->
            wrong $"virtual_pipeline is %i{shape.Chunks}; a rank has at least 1 chunk, and at most 1000" "choose 1"
        | _any when shape.Chunks = 1 && shape.Group > 0 ->
            wrong
                $"microbatch_group is %i{shape.Group}, but virtual_pipeline is 1: only chunks take turns by groups"
                "choose a virtual_pipeline of 2 or more, or leave microbatch_group out"
        | Schedule.GPipe when shape.Chunks > 1 ->
            wrong
                $"schedule GPipe runs one chunk of each rank, but virtual_pipeline is %i{shape.Chunks}"
                "choose schedule Interleaved1F1B, or virtual_pipeline 1"
        | Schedule.Interleaved when shape.Chunks = 1 ->
            wrong
                "schedule Interleaved1F1B interleaves chunks, but virtual_pipeline is 1"
                "choose a virtual_pipeline of 2 or more, or schedule 1F1B"
        | Schedule.Interleaved when shape.Group < shape.Ranks ->
            wrong
                $"microbatch_group %i{shape.Group} is less than pipeline %i{shape.Ranks}: the first chunk's result is not back on rank 0 in time"
                (choose shape.Group)
        | Schedule.Interleaved when rest > 0 && rest < shape.Ranks ->
            wrong
                $"%i{shape.Microbatches} microbatches in groups of %i{shape.Group} leave a last group of %i{rest}, fewer than pipeline %i{shape.Ranks}"
                (choose shape.Group)
        | Schedule.GPipe when shape.Pairs ->
            apart "schedule GPipe runs no forward beside a backward" "choose schedule 1F1B"
        | Schedule.OneFOneB when shape.Pairs && shape.Ranks > 1 ->
            apart
                $"with one chunk on each of %i{shape.Ranks} pipeline ranks a forward and the backward beside it wait for each other's neighbours"
                "choose a virtual_pipeline of 2 or more"
        | _any when shape.Pairs && shape.Microbatches = 1 ->
            apart
                "there is one microbatch, and no other to go beside it"
                "choose a global batch of 2 microbatches or more"
        | Schedule.GPipe
        | Schedule.OneFOneB
        | Schedule.Interleaved -> []

    /// Chunk and microbatch of each forward of a rank, in order: groups of microbatches, chunk by chunk.
    let private order (shape: PipelineShape) : (int * int) list =
        let group = if shape.Chunks = 1 then shape.Microbatches else (grouped shape).Group

        [
            for first in 0..group .. shape.Microbatches - 1 do
                for chunk in 0 .. shape.Chunks - 1 do
                    for microbatch in first .. min shape.Microbatches (first + group) - 1 -> chunk, microbatch
        ]

    /// Forwards of a rank before its first backward.
    let warmup (schedule: Schedule) (shape: PipelineShape) (rank: int) =
        let all = shape.Microbatches * shape.Chunks
        let more = if shape.Pairs then 1 else 0

        match schedule with
        | Schedule.GPipe -> all
        | Schedule.OneFOneB -> min all (shape.Ranks - 1 - rank + more)
        | Schedule.Interleaved ->
            min all (2 * (shape.Ranks - rank - 1) + (shape.Chunks - 1) * (grouped shape).Group + more)

    /// Backwards between a cotangent's send and the wait for it: the receiving rank comes to its I up to that much later when chunks are
    /// interleaved. Found by replay with rendezvous messages: less makes ranks wait for each other, and none at all is a deadlock.
    let lag (schedule: Schedule) (shape: PipelineShape) =
        match schedule with
        | Schedule.GPipe
        | Schedule.OneFOneB -> 0
        | Schedule.Interleaved -> (grouped shape).Group - shape.Ranks / 2

    /// Every backward with S of the one that many turns before; the rest of S at the end.
    let private settled (lag: int) (backwards: (Action list * Action) list) : Action list list =
        let settles = List.map snd backwards
        let late = List.length settles - lag

        [
            for i, (work, _) in List.indexed backwards do
                if i < lag then work else work @ [ settles[i - lag] ]

            for i in max 0 late .. settles.Length - 1 do
                [ settles[i] ]
        ]

    /// One rank: prologue, warm-up, one forward and one backward in turn, cool-down, epilogue. Weight gradients follow at once.
    let private ofRank schedule (shape: PipelineShape) rank : Action list list =
        let action phase (chunk, microbatch) = {
            Phase = phase
            Chunk = chunk
            Microbatch = microbatch
        }

        let order = order shape
        let forwards = [ for turn in order -> [ action (Phase.F 0) turn ] ]

        // chunks go back in reverse
        let backwards = [
            for chunk, microbatch in order do
                let turn = shape.Chunks - 1 - chunk, microbatch
                [ action (Phase.I 0) turn; action (Phase.W 0) turn ], action Phase.S turn
        ]

        let before, during = List.splitAt (warmup schedule shape rank) forwards
        let paired, after = settled (lag schedule shape) backwards |> List.splitAt during.Length

        let alone = List.map List.singleton

        /// A forward and a backward in turn: two microbatches, of which neither waits for the other.
        let pair (forward: Action list) (backward: Action list) =
            let settles, work = backward |> List.partition _.Phase.IsS

            if shape.Pairs && forward.Head.Microbatch <> work.Head.Microbatch then
                (forward @ work) :: alone settles
            else
                alone (forward @ backward)

        [
            [ action Phase.Prologue (0, 0) ]
            yield! alone (List.concat before)
            yield! List.concat (List.map2 pair during paired)
            yield! alone (List.concat after)
            [ action Phase.Epilogue (0, 0) ]
        ]

    /// What each rank runs, in order: one action after the other, but for an F with the I and W of another microbatch, whose parts may take
    /// turns. `schedule` must pass `check`.
    let groups (schedule: Schedule) (shape: PipelineShape) : Action list list list =
        List.init shape.Ranks (ofRank schedule shape)

    /// What each rank runs, in order, without turns. `schedule` must pass `check`.
    let build (schedule: Schedule) (shape: PipelineShape) : Action list list =
        groups schedule shape |> List.map List.concat

    /// A pipeline of one chunk a rank.
    let plain (ranks: int) (microbatches: int) : PipelineShape = {
        Ranks = ranks
        Chunks = 1
        Microbatches = microbatches
        Group = 0
        Pairs = false
    }

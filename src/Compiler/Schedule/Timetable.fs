/// Timetables of the pipeline: in which order each stage runs its programs over the microbatches.
namespace DeepSeekGraph.Compiler

open DeepSeekGraph

[<RequireQualifiedAccess>]
type Schedule =
    /// All forwards, then all backwards: simplest, and most memory.
    | GPipe
    /// Warm-up, then one forward and one backward in turn: stage r of p holds at most p - r microbatches.
    | OneFOneB

    /// As recipes and plans write it.
    member this.Name =
        match this with
        | GPipe -> "GPipe"
        | OneFOneB -> "1F1B"

    /// In the order of preference.
    static member All = [| OneFOneB; GPipe |]

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

    /// Forwards of a stage before its first backward.
    let warmup (schedule: Schedule) (stages: int) (microbatches: int) (stage: int) =
        match schedule with
        | Schedule.GPipe -> microbatches
        | Schedule.OneFOneB -> min microbatches (stages - 1 - stage)

    /// One stage: prologue, warm-up, steady phase, cool-down, epilogue. Weight gradients follow at once.
    let private ofStage schedule stages microbatches stage : Action list =
        let action phase microbatch = {
            Phase = phase
            Chunk = 0
            Microbatch = microbatch
        }

        let forward i = [ action Phase.F i ]
        let backward i = [ action Phase.I i; action Phase.W i ]
        let ahead = warmup schedule stages microbatches stage

        [
            action Phase.Prologue 0
            yield! List.collect forward [ 0 .. ahead - 1 ]

            for i in 0 .. microbatches - ahead - 1 do
                yield! forward (ahead + i)
                yield! backward i

            yield! List.collect backward [ microbatches - ahead .. microbatches - 1 ]
            action Phase.Epilogue 0
        ]

    /// What each stage runs, in order.
    let build (schedule: Schedule) (stages: int) (microbatches: int) : Action list list =
        List.init stages (ofStage schedule stages microbatches)

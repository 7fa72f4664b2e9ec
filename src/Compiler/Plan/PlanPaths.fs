/// Which code a GPU runs for the kernels of a plan that have two, how often, and why.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open DeepSeekGraph

/// Launches of one kernel by one path.
type PathRow = {
    Kernel: KernelId
    Path: KernelPath
    /// Why it is exact: what the library does not take, or that somebody asked for it; empty for the library.
    Why: string
    /// In a step, by a rank of each stage.
    Launches: int64
}

[<RequireQualifiedAccess>]
module PlanPaths =
    /// Why the library does not compute a launch of a stage; empty where it does.
    let refusal (stage: StagePlan) (kernel: KernelId) (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        let operands (ids: IReadOnlyList<int>) = [| for id in ids -> OperandType.Of stage.Slots[id] |]
        LibraryKernels.refusal kernel (operands inputs) (operands outputs)

    /// Every kernel with a path, by kernel, the library first; empty for a plan without any.
    let list (plan: PlanSet) : IReadOnlyList<PathRow> =
        [|
            for stage in plan.Stages do
                let runs = stage.Timetable |> Seq.countBy (fun a -> struct (a.Phase, a.Chunk)) |> dict

                for program in stage.Programs do
                    match runs.TryGetValue(struct (program.Phase, program.Chunk)) with
                    | false, _ -> ()
                    | true, times ->
                        for step in program.Steps do
                            match step with
                            | Step.Launch(kernel, attributes, inputs, outputs, _) ->
                                match KernelPaths.ofLaunch kernel attributes with
                                | None -> ()
                                | Some KernelPath.Library -> struct (kernel, KernelPath.Library, ""), times
                                | Some KernelPath.Exact ->
                                    let reason =
                                        match refusal stage kernel inputs outputs with
                                        | "" -> "asked for"
                                        | reason -> reason

                                    struct (kernel, KernelPath.Exact, reason), times
                            | Step.Start _
                            | Step.Wait _
                            | Step.Free _ -> ()
        |]
        |> Array.groupBy fst
        |> Array.map (fun (struct (kernel, path, why), launches) -> {
            Kernel = kernel
            Path = path
            Why = why
            Launches = launches |> Array.sumBy (snd >> int64)
        })
        |> Array.sortBy (fun row -> int row.Kernel, row.Path.IsExact, row.Why)
        :> IReadOnlyList<PathRow>

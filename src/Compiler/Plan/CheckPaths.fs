/// Does a GPU's library take what launches on its path give it?
module DeepSeekGraph.Compiler.Checking.Paths

open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Checking.Shapes

/// Paths of every launch that has one. Our own code takes everything, so that `exact` is never wrong.
/// Launches have the operands of their kernels: layouts are checked before.
let check (f: Findings) (plan: PlanSet) : unit =
    for stage in plan.Stages do
        for program in stage.Programs do
            program.Steps
            |> Seq.iteri (fun i step ->
                match step with
                | Step.Launch(kernel, attributes, inputs, outputs, path) when
                    KernelPaths.ofLaunch kernel attributes = Some KernelPath.Library
                    ->
                    match PlanPaths.refusal stage kernel inputs outputs with
                    | "" -> ()
                    | reason ->
                        f.Add(
                            Codes.PlanPath,
                            place stage.Stage program.Name i path,
                            $"%s{PlanNames.kernel kernel}: the library does not take %s{reason}"
                        )
                | Step.Launch _
                | Step.Start _
                | Step.Wait _
                | Step.Free _ -> ())

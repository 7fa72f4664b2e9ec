/// Do rows stand in blocks where grouped products read them, and nowhere else, and does nothing sum over what fills blocks up?
module DeepSeekGraph.Compiler.Checking.Padding

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Lowering
open DeepSeekGraph.Compiler.Checking.Shapes

/// Blocks of rows: those that grouped products read are filled up to one multiple throughout, no others are.
let check (f: Findings) (plan: PlanSet) : unit =
    let multiple = plan.Stages |> Seq.collect _.Slots |> Seq.fold (fun n s -> max n s.Padding) 1

    for stage in plan.Stages do
        let due = Padding.find stage.Slots (stage.Programs |> Seq.collect _.Steps)

        for slot in stage.Slots do
            let wanted = if due[slot.Id] then multiple else 1

            if slot.Padding <> wanted then
                f.Add(
                    Codes.PlanLayout,
                    $"stage %i{stage.Stage}",
                    $"%s{named stage.Slots slot.Id} has a padding of %i{slot.Padding}; its rows stand in blocks of %i{wanted}"
                )

        for program in stage.Programs do
            program.Steps
            |> Seq.iteri (fun i step ->
                match step with
                | Step.Start(_, (Collective.Send _ | Collective.Recv _), _, inputs, outputs, path) ->
                    for id in Seq.append inputs outputs do
                        if stage.Slots[id].Padding > 1 then
                            f.Add(
                                Codes.PlanLayout,
                                place stage.Stage program.Name i path,
                                $"%s{named stage.Slots id} is padded: padding never leaves a rank"
                            )
                // who has the row set knows which rows there are
                | Step.Launch(kernel, _, inputs, outputs, path) when
                    outputs |> Seq.exists (fun id -> not stage.Slots[id].Routed)
                    && inputs |> Seq.exists (fun id -> stage.Slots[id].Padding > 1)
                    && not (
                        inputs |> Seq.exists (fun id -> stage.Slots[id].Routed && stage.Slots[id].DType = DType.Bool)
                    )
                    ->
                    f.Add(
                        Codes.PlanLayout,
                        place stage.Stage program.Name i path,
                        $"%O{kernel} would sum over the rows that fill up blocks: it has no row set"
                    )
                | Step.Start _
                | Step.Launch _
                | Step.Wait _
                | Step.Free _ -> ())

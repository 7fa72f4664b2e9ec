/// Which slots hold rows in blocks: those of row sets that grouped products read, where each local expert's rows are filled up.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Lowering.Padding

open System.Collections.Generic
open DeepSeekGraph

/// The largest multiple; no product has larger blocks.
let most = 4096

/// Rounded up to a multiple.
let up (multiple: int) (n: int64) : int64 =
    let m = int64 multiple
    (n + m - 1L) / m * m

/// Slots of one step that are rows of one set, or that set: they stand alike. A step that makes another set of it ends there.
let private alike (slots: IReadOnlyList<SlotInfo>) (step: Step) : int list list =
    let routed (ids: int seq) = ids |> Seq.filter (fun id -> slots[id].Routed) |> List.ofSeq

    /// Operand tuples of a bundle: inputs of output i.
    let tuples (inputs: IReadOnlyList<int>) (outputs: IReadOnlyList<int>) =
        let n = inputs.Count / outputs.Count

        [
            for i in 0 .. outputs.Count - 1 -> [ for k in 0 .. n - 1 -> inputs[i * n + k] ], outputs[i]
        ]

    match step with
    | Step.Launch(KernelId.LocalSlice, attributes, inputs, outputs, _) ->
        match attributes[0] with
        | Attribute.Int 2L -> [ routed inputs ]
        | _otherDim -> [ routed (Seq.append inputs outputs) ]
    | Step.Launch(_, _, inputs, outputs, _) -> [ routed (Seq.append inputs outputs) ]
    | Step.Start(_, (Collective.Send _ | Collective.Recv _), _, _, _, _) -> []
    | Step.Start(_, kind, _, inputs, outputs, _) when kind.TakesTuples ->
        tuples inputs outputs
        |> List.collect (fun (from, into) ->
            match from with
            // rows, their set, and the set that they go to
            | [ rows; here; there ] -> [ routed [ rows; here ]; routed [ there; into ] ]
            // a set that becomes another one
            | [ set ] when slots[set].Routed && slots[set].DType = DType.Bool -> []
            | same -> [ routed (into :: same) ])
    | Step.Start(_, Collective.Dispatch _, _, inputs, outputs, _) -> [
        routed (Seq.append [ inputs[inputs.Count - 1] ] outputs)
      ]
    // Combine: rows, their set, and the set of the tokens
    | Step.Start(_, _, _, inputs, _, _) -> [ routed (Seq.truncate (inputs.Count - 1) inputs) ]
    | Step.Wait _
    | Step.Free _ -> []

/// Is a slot rows that stand as a grouped product reads them? For each slot of a stage.
let find (slots: IReadOnlyList<SlotInfo>) (steps: Step seq) : bool[] =
    let steps = Array.ofSeq steps
    let groups = steps |> Seq.collect (alike slots) |> Seq.filter (fun g -> g.Length > 1) |> Array.ofSeq
    let found = Array.create slots.Count false
    let reached = Dictionary<int, List<int>>()

    groups
    |> Array.iteri (fun i group ->
        for id in group do
            match reached.TryGetValue id with
            | true, of' -> of'.Add i
            | false, _ -> reached[id] <- List [ i ])

    let rec spread id =
        if slots[id].Routed && not found[id] then
            found[id] <- true

            match reached.TryGetValue id with
            | true, groups' ->
                for i in groups' do
                    List.iter spread groups[i]
            | false, _ -> ()

    for step in steps do
        match step with
        | Step.Launch((KernelId.GroupedMatMul | KernelId.GroupedWeightGrad), _, inputs, _, _) ->
            spread inputs[inputs.Count - 1]
        | Step.Launch _
        | Step.Start _
        | Step.Wait _
        | Step.Free _ -> ()

    found

/// The slots of a stage, those of rows that grouped products read in blocks of `multiple`.
let assign (multiple: int) (slots: SlotInfo[]) (steps: Step seq) : SlotInfo[] =
    if multiple = 1 then
        slots
    else
        let found = find slots steps
        slots |> Array.map (fun s -> if found[s.Id] then { s with Padding = multiple } else s)

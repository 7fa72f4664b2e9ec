/// The slots of a stage and the groups of a job, numbered as they are first named.
module DeepSeekGraph.Compiler.Lowering.Slots

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler.Partition

/// Slots of one stage.
[<Sealed>]
type SlotTable() =
    let slots = List<SlotInfo>()
    let byName = Dictionary<string, int>()

    /// The slot of that name, made if need be.
    member _.Get(name: string, kind: SlotKind, t: TensorType, layout: Layout) : int =
        match byName.TryGetValue name with
        | true, id -> id
        | false, _ ->
            let id = slots.Count
            byName[name] <- id

            slots.Add(Layout.slot id name kind t layout)
            id

    member _.TryFind(name: string) =
        match byName.TryGetValue name with
        | true, id -> ValueSome id
        | false, _ -> ValueNone

    member _.Item
        with get (id: int) = slots[id]

    /// A slot whose kind turned out otherwise (saved for a later program).
    member _.SetKind(id: int, kind: SlotKind) = slots[id] <- { slots[id] with Kind = kind }
    member _.ToArray() = slots.ToArray()

/// Groups of the whole job; equal ones are one.
[<Sealed>]
type GroupTable(mesh: MeshInfo) =
    let groups = List<Group>()

    let get name (axes: int list) (stages: int list) =
        match groups |> Seq.tryFind (fun g -> g.Name = name) with
        | Some g -> g.Id
        | None ->
            groups.Add {
                Id = groups.Count
                Name = name
                MeshAxes = Array.ofList axes
                Stages = Array.ofList stages
            }

            groups.Count - 1

    /// All coordinates along mesh axes.
    member _.Along(axes: int list) : int =
        let axes = List.sort axes
        get (axes |> List.map (fun m -> mesh.Axes[m].Name) |> String.concat "+") axes []

    /// The same on a lane of its own, so that gradients hold nothing up that the backward pass waits for.
    member _.Beside(axes: int list) : int =
        let axes = List.sort axes
        get ((axes |> List.map (fun m -> mesh.Axes[m].Name) |> String.concat "+") + ".grad") axes []

    /// The same coordinates on several stages, to sum over.
    member _.Across(stages: int list) : int =
        let names = stages |> List.map string |> String.concat "-"
        get $"pp.%s{names}" [] stages

    /// Messages from a part of the model to another, on their pipeline ranks. A group has one direction, and with chunks one distance
    /// in the model: so both ends start its messages in one order, whatever else goes between the two ranks.
    member _.Between(from: int, into: int) : int =
        let pp = mesh.Pipeline
        let sender, receiver = from % pp, into % pp
        let around = if into - from = receiver - sender then "" else $"+%i{into - from}".Replace("+-", "-")
        get $"pp.%i{sender}>%i{receiver}%s{around}" [] [ sender; receiver ]

    member _.Item
        with get (id: int) = groups[id]

    member _.ToArray() = groups.ToArray()

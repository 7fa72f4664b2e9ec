/// Which experts tokens choose: any, within the groups that a router keeps, or as somebody recorded it.
namespace DeepSeekGraph.Compiler

open System.Collections.Generic
open DeepSeekGraph

/// What a router chooses from: `TopK` of `Experts` that lie in `KeepGroups` of `Groups`.
type RouterChoice = {
    /// Module path of the router; of the row set where no router made it.
    Path: string
    Experts: int
    TopK: int
    Groups: int
    KeepGroups: int
}

/// A known routing of one step.
type IRouting =
    /// Experts of a token: of a router's path, a microbatch, a sequence of it and a position in natural order.
    abstract Chosen: path: string * microbatch: int * sequence: int * position: int -> IReadOnlyList<int>

/// What made a value, on the way from a row set to its router.
[<RequireQualifiedAccess>]
type private Maker =
    /// A row set of a mask.
    | Set of Path: string * TopK: int * Experts: int * Mask: int
    | Router of Path: string * Groups: int * Keep: int
    | Other of Inputs: int seq

[<RequireQualifiedAccess>]
module Routing =
    /// The share of tokens that choose at least one of some experts, `owned` of each group; every choice that the router may make
    /// is as likely as any other: groups first (hypergeometric), then experts among those of the groups kept.
    let reached (choice: RouterChoice) (owned: int[]) : float =
        let total, keep = Array.sum owned, choice.KeepGroups
        // ways[j, n]: choices of j groups that hold n of the owned experts
        let ways = Array2D.zeroCreate<float> (keep + 1) (total + 1)
        ways[0, 0] <- 1.0

        for count in owned do
            for j in keep - 1 .. -1 .. 0 do
                for n in total - count .. -1 .. 0 do
                    ways[j + 1, n + count] <- ways[j + 1, n + count] + ways[j, n]

        let candidates = keep * (choice.Experts / choice.Groups)

        let missed n =
            Seq.init choice.TopK float
            |> Seq.fold (fun p i -> p * max 0.0 (float (candidates - n) - i) / (float candidates - i)) 1.0

        let all = Seq.init (total + 1) (fun n -> ways[keep, n]) |> Seq.sum
        let none = Seq.init (total + 1) (fun n -> ways[keep, n] * missed n) |> Seq.sum
        1.0 - none / all

    /// What chose the rows of a row set, by what made each value.
    let private choice (maker: int -> Maker) (route: int) : RouterChoice option =
        let seen = HashSet<int>()

        let rec find (value: int) (set: RouterChoice option) =
            if not (seen.Add value) then
                None
            else
                match maker value, set with
                | Maker.Set(path, topK, experts, mask), _ ->
                    let any = {
                        Path = path
                        Experts = experts
                        TopK = topK
                        Groups = 1
                        KeepGroups = 1
                    }

                    find mask (Some any) |> Option.orElse (Some any)
                | Maker.Router(path, groups, keep), Some any ->
                    Some {
                        any with
                            Path = path
                            Groups = groups
                            KeepGroups = keep
                    }
                | Maker.Router _, None -> None
                | Maker.Other inputs, _ -> inputs |> Seq.tryPick (fun input -> find input set)

        find route None

    /// What chose the rows of a row set of a stage, by the step that wrote each slot.
    let choiceOf (writers: IReadOnlyDictionary<int, Step>) (route: int) : RouterChoice option =
        let maker slot =
            match writers.TryGetValue slot with
            | true, Step.Launch(KernelId.Route, attributes, inputs, _, path) ->
                match List.ofSeq attributes with
                | [ Attribute.Int topK; Attribute.Int experts ] -> Maker.Set(path, int topK, int experts, inputs[0])
                | _other -> Maker.Other []
            | true, Step.Launch((KernelId.Router | KernelId.GroupTopK), attributes, _, _, path) ->
                match List.ofSeq attributes with
                | Attribute.Int _ :: Attribute.Int groups :: Attribute.Int keep :: _ ->
                    Maker.Router(path, int groups, int keep)
                | _other -> Maker.Other []
            | true, Step.Launch(_, _, inputs, _, _)
            | true, Step.Start(_, _, _, inputs, _, _) -> Maker.Other inputs
            | true, Step.Wait _
            | true, Step.Free _
            | false, _ -> Maker.Other []

        choice maker route

    /// What chose the rows of a row set of a graph.
    let choiceIn (graph: Graph) (route: int) : RouterChoice option =
        let maker value =
            let node = graph.NodeOf value

            match node.Op with
            | Op.Route(topK, experts) -> Some(Maker.Set(node.Origin.Path, topK, experts, node.Inputs[0]))
            | Op.Router { Choice = spec }
            | Op.GroupTopK spec -> Some(Maker.Router(node.Origin.Path, spec.Groups, spec.KeepGroups))
            | _other -> None
            |> Option.defaultValue (Maker.Other node.Inputs)

        choice maker route

    /// What the first row set of a graph is chosen from: all layers of a model choose alike.
    let first (graph: Graph) : RouterChoice option =
        graph.Nodes
        |> Array.tryPick (fun node -> if node.Op.IsRoute then choiceIn graph node.Outputs[0] else None)

    /// The first index and the number of them that a rank holds of a dim, by its coordinates.
    let block (mesh: MeshInfo) (slot: SlotInfo) (dim: int) (coordinates: int[]) : struct (int * int) =
        let mutable at = 0

        for m in slot.Layout.Count - 1 .. -1 .. 0 do
            if slot.Layout[m] = AxisState.Split dim then
                at <- at * mesh.Axes[m].Size + coordinates[m]

        struct (at * slot.Extents[dim], slot.Extents[dim])

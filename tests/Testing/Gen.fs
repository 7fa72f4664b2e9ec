/// FsCheck generators of graphs, with shrinkers.
namespace DeepSeekGraph.Testing

open FsCheck
open FsCheck.FSharp
open DeepSeekGraph

/// A random legal graph with the scalar output `loss`.
type RandomGraph = {
    Graph: Graph
} with

    /// The text form: what a failing law shows.
    override this.ToString() = "\n" + Text.print this.Graph

[<RequireQualifiedAccess>]
module Shrink =
    /// What becomes of one node in a smaller graph.
    [<RequireQualifiedAccess>]
    type private Change =
        | Keep of Op * int[]
        | Alias of int

    /// The graph with changed nodes, or nothing when that is no legal graph.
    let private rewrite (graph: Graph) (change: int -> Node -> Change) : Graph option =
        let builder = Builder()
        let map = Array.create graph.Types.Length -1

        let add (node: Node) op (inputs: int[]) =
            match builder.TryAdd(op, [ for v in inputs -> map[v] ], node.Origin) with
            | Error _ -> false
            | Ok values ->
                node.Outputs |> Array.iteri (fun i v -> map[v] <- values[i])
                true

        let step n (node: Node) =
            match change n node with
            | Change.Alias v ->
                map[node.Outputs[0]] <- map[v]
                true
            | Change.Keep(op, inputs) -> add node op inputs

        if graph.Nodes |> Array.indexed |> Array.forall (fun (n, node) -> step n node) then
            for name, v in graph.Outputs do
                builder.SetOutput(name, map[v])

            Some(Rewrite.prune (builder.ToGraph()))
        else
            None

    let private keep (node: Node) = Change.Keep(node.Op, node.Inputs)

    let private at n (found: Node -> Change) = fun k node -> if k = n then found node else keep node

    let private isSource (node: Node) = node.Inputs.Length = 0

    /// Computed nodes, then elements: what shrinking makes less.
    let size (graph: Graph) : int * int64 =
        graph.Nodes |> Array.filter (isSource >> not) |> Array.length, graph.Types |> Array.sumBy (fun t -> t.Elements)

    /// A parameter in place of a computed value.
    let private cuts (graph: Graph) = seq {
        for n in graph.Nodes.Length - 1 .. -1 .. 0 do
            let node = graph.Nodes[n]
            let t = graph.Types[node.Outputs[0]]

            if not (isSource node) && node.Outputs.Length = 1 && t.DType.IsFloat && not t.Routed && t.Rank > 0 then
                let spec = {
                    Name = $"cut.%i{n}"
                    Init = Init.Ones
                    Update = Update.AdamW true
                    KeepFloat32 = false
                }

                rewrite graph (at n (fun _ -> Change.Keep(Op.Parameter(spec, t), [||])))
    }

    /// One addend less.
    let private addends (graph: Graph) = seq {
        for n in 0 .. graph.Nodes.Length - 1 do
            let node = graph.Nodes[n]

            if node.Op.IsAdd && node.Inputs.Length > 1 then
                for i in 0 .. node.Inputs.Length - 1 do
                    rewrite graph (at n (fun _ -> Change.Keep(Op.Add, Array.removeAt i node.Inputs)))
    }

    /// A same-typed operand in place of a node.
    let private aliases (graph: Graph) = seq {
        for n in 0 .. graph.Nodes.Length - 1 do
            let node = graph.Nodes[n]

            if node.Outputs.Length = 1 then
                for v in Array.distinct node.Inputs do
                    if graph.Types[v] = graph.Types[node.Outputs[0]] then
                        rewrite graph (at n (fun _ -> Change.Alias v))
    }

    /// An op on an axis of half the extent.
    let private halved (name: string) (op: Op) : Op =
        let half n = max 1 (n / 2)

        let axis (a: Axis) = if a.Name = name then { a with Extent = half a.Extent } else a

        let typed (t: TensorType) = { t with Axes = Array.map axis t.Axes }

        match op with
        | Op.Parameter(spec, t) -> Op.Parameter(spec, typed t)
        | Op.Input(input, t) -> Op.Input(input, typed t)
        | Op.Constant(value, t) -> Op.Constant(value, typed t)
        | Op.Iota a -> Op.Iota(axis a)
        | Op.Broadcast(a, dim) -> Op.Broadcast(axis a, dim)
        | Op.Slice(a, start, length) when a = name -> Op.Slice(a, start / 2, half length)
        | Op.Pad(a, before, total) when a = name -> Op.Pad(a, before / 2, half total)
        | Op.RotaryTable spec when name = "rope" -> Op.RotaryTable { spec with Dim = half spec.Dim }
        | other -> other

    let private halves (graph: Graph) = seq {
        let names =
            graph.Types
            |> Array.collect _.Axes
            |> Array.filter (fun a -> a.Extent > 1)
            |> Array.map _.Name
            |> Array.distinct

        for name in names do
            rewrite graph (fun _ node -> Change.Keep(halved name node.Op, node.Inputs))
    }

    /// Smaller legal graphs, the most promising first.
    let graph (graph: Graph) : Graph seq =
        Seq.concat [ cuts graph; addends graph; aliases graph; halves graph ]
        |> Seq.choose id
        |> Seq.filter (fun smaller -> size smaller < size graph && (Verify.check smaller).IsEmpty)

/// The graph that a list of numbers stands for.
[<RequireQualifiedAccess>]
module Grow =
    let graph (choices: int[]) : Graph = Grower(choices).Grow()

/// Arbitraries for `Properties.propertyOver`.
type Generators =
    static member RandomGraph() : Arbitrary<RandomGraph> =
        let graphs =
            Gen.choose (0, 1 <<< 20)
            |> Gen.arrayOfLength 160
            |> Gen.map (fun choices -> { Graph = Grow.graph choices })

        Arb.fromGenShrink (graphs, fun random -> Shrink.graph random.Graph |> Seq.map (fun g -> { Graph = g }))

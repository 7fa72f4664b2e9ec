/// Partition of random graphs over random meshes and axis maps: partitioned = unpartitioned, in float64.
module DeepSeekGraph.Compiler.Tests.PropagateTests

open System.Collections.Concurrent
open Expecto
open FsCheck
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition
open DeepSeekGraph.Reference
open DeepSeekGraph.Testing

/// A graph, mesh axis sizes, and for each mesh axis the axis names that it splits (of parameters and of tokens).
type Case = {
    Random: RandomGraph
    Sizes: int[]
    /// Per mesh axis: the parameter axis and the token axis.
    Splits: (string * string)[]
} with

    override this.ToString() = $"mesh %A{this.Sizes} splits %A{this.Splits}%O{this.Random}"

let private weightAxes = [ "heads"; "ffn"; "vocab"; "hidden"; "experts"; "experts" ]
let private tokenAxes = [ "batch"; "seq"; "batch"; "seq"; "none" ]

let private case = gen {
    let! random = Generators.RandomGraph().Generator
    let! sizes = Gen.elements [ [| 2 |]; [| 2; 2 |]; [| 2; 2 |]; [| 2; 3 |]; [| 3 |]; [| 4 |]; [| 2; 2; 2 |] ]
    let! splits = Gen.arrayOfLength sizes.Length (Gen.zip (Gen.elements weightAxes) (Gen.elements tokenAxes))

    return {
        Random = random
        Sizes = sizes
        Splits = splits
    }
}

type Cases =
    static member Case() : Arbitrary<Case> =
        Arb.fromGenShrink (
            case,
            fun c -> seq {
                for i in 0 .. c.Sizes.Length - 1 do
                    if c.Sizes.Length > 1 then
                        {
                            c with
                                Sizes = Array.removeAt i c.Sizes
                                Splits = Array.removeAt i c.Splits
                        }

                for smaller in Seq.truncate 12 (Generators.RandomGraph().Shrinker c.Random) do
                    { c with Random = smaller }
            }
        )

let private extentOf (graph: Graph) name =
    graph.Types
    |> Array.tryPick (fun t -> t.Axes |> Array.tryFind (fun a -> a.Name = name))
    |> Option.map _.Extent

/// The axis map of a case. Experts are split only where tokens are: rows are exchanged between ranks of different tokens.
let private mapOf (c: Case) (graph: Graph) : AxisMap =
    let mesh: MeshInfo = {
        Tensor = 1
        Context = 1
        Data = 1
        Pipeline = 1
        ExpertTensor = 1
        Expert = 1
        ExpertData = 1
        Axes = c.Sizes |> Array.mapi (fun m n -> { Name = $"x%i{m}"; Size = n })
    }

    let names pick = [
        for name in c.Splits |> Array.map pick |> Array.distinct do
            if name <> "none" then
                name,
                [
                    for m in 0 .. c.Sizes.Length - 1 do
                        if pick c.Splits[m] = name then
                            m
                ]
    ]

    let divides (name, axes) =
        match extentOf graph name with
        | Some extent -> extent % Layout.size mesh axes = 0
        | None -> false

    let tokens = names snd |> List.filter divides
    let split = tokens |> List.collect snd

    // rows are exchanged between tokens and experts only: their features stay whole
    let features = graph.Types |> Array.filter _.Routed |> Array.collect (fun t -> t.Names[3..]) |> Array.distinct

    // a trained value split by expert that is no bank of experts (a router's weights, scores where a graph was cut) would split the
    // scores that top-k needs whole (models name that axis "router")
    let scoresSplit =
        graph.Nodes
        |> Array.exists (fun n ->
            let t = graph.Types[n.Outputs[0]]
            let experts = t.IndexOf "experts"
            n.Op.IsParameter && experts >= 0 && (t.Rank < 3 || experts > 0))

    let weights =
        names fst
        |> List.filter divides
        |> List.filter (fun (name, _) -> not (Array.contains name features))
        |> List.filter (fun (name, _) -> name <> "experts" || not scoresSplit)
        |> List.filter (fun (name, axes) -> name <> "experts" || axes |> List.forall (fun m -> List.contains m split))

    {
        Mesh = mesh
        // random graphs also train values of tokens' shape
        Parameters = Map.ofList (weights @ tokens)
        Inputs = Map.ofList tokens
        Anchors = Map [ "residual", Map.ofList tokens ]
        Dispatcher = Dispatcher.AllToAll
    }

let private seen = ConcurrentDictionary<string, int>()

let private total name =
    match seen.TryGetValue name with
    | true, n -> float n
    | false, _ -> 0.0

let private count name yes =
    if yes then
        seen.AddOrUpdate(name, 1, (fun _ n -> n + 1)) |> ignore

let private cover (c: Case) (local: Partitioned) =
    let any what = local.Layouts |> Array.exists (Array.exists what)
    count "cases" true
    count "split values" (any _.IsSplit)
    count "pending partial sums" (any _.IsPartialSum)
    count "two or more base axes" (c.Sizes.Length >= 2)

    count
        "rows split by expert"
        (Array.exists2
            (fun (t: TensorType) l -> t.Routed && Array.contains (AxisState.Split 2) l)
            local.Graph.Types
            local.Layouts)

let private apart (a: DenseTensor) (b: DenseTensor) =
    let scale = b.Data |> Array.fold (fun m x -> max m (abs x)) 1.0
    Dense.distance a b / scale

/// Are the tokens that become routed rows anchored, as a model's are? Where they are not, rows may have to move as nothing moves them,
/// which the compiler says (DSG0394) instead of doing it wrong.
let private anchored (graph: Graph) =
    graph.Nodes
    |> Array.forall (fun n ->
        match n.Op with
        | Op.Permute _
        | Op.PermuteWithProbs ->
            match graph.NodeOf(n.Inputs[0]).Op with
            | Op.Anchor _ -> true
            | _other -> false
        | _other -> true)

let private holds (c: Case) (joint: Graph) (local: Partitioned) =
    cover c local
    Expect.isEmpty (Verify.check local.Graph) "a rank's graph is legal"
    let whole = Feed.lookup 3 joint
    let reference = Evaluator.run joint whole whole
    let spmd = Spmd.runGlobal c.Sizes local.Layouts local.Graph whole

    for name in reference.OutputNames do
        let distance = apart (spmd.Output name) (reference.Output name)

        if not (distance < 1e-8) then
            failtestf "%s differs by %g\n%O" name distance c

let private law (c: Case) =
    match Autodiff.differentiate "loss" c.Random.Graph with
    | Error wrong -> failtestf "%A" wrong
    | Ok joint ->
        let local =
            try
                Some(Propagate.run (mapOf c joint) joint)
            with :? DiagnosticException as e ->
                if e.Diagnostics[0].Code <> Codes.RowsLayout || anchored c.Random.Graph then
                    failtestf "%s\n%O" e.Message c

                count "refused" true
                None

        local |> Option.iter (holds c joint)

let private config = {
    Properties.config [ typeof<Cases> ] with
        maxTest = Properties.cases
}

let tests =
    testSequenced
    <| testList "Partition.Propagate" [
        testPropertyWithConfig config "a partitioned graph computes what the graph computes" law

        testCase "from every layout to every other of a 2 x 2 x 2 mesh there is a way that ends"
        <| fun () ->
            let states = [ AxisState.Replicated; AxisState.Split 0; AxisState.Split 1 ]
            let starts = AxisState.PartialSum :: states

            let graph =
                let builder = Builder()

                let origin = {
                    Path = "x"
                    Unit = ModelUnit.Layer 0
                    Pass = Pass.Forward
                }

                let t = TensorType.create DType.Float32 [ "a", 8; "b", 8 ]
                builder.SetOutput("x", builder.Add(Op.Input("x", t), [], origin)[0])
                builder.ToGraph()

            let mesh =
                (mapOf
                    {
                        Random = { Graph = graph }
                        Sizes = [| 2; 2; 2 |]
                        Splits = Array.create 3 ("none", "none")
                    }
                    graph)

            let all states = [
                for x in states do
                    for y in states do
                        for z in states -> [| x; y; z |]
            ]

            let whole = Feed.lookup 3 graph

            for from in all starts do
                for into in all states do
                    let shards = Shards(mesh, graph)

                    let origin = {
                        Path = "x"
                        Unit = ModelUnit.Layer 0
                        Pass = Pass.Forward
                    }

                    let local = Layout.local mesh.Mesh from graph.Types[0]

                    shards.Remember(
                        0,
                        {
                            Layout = from
                            Value = shards.Emit(Op.Input("x", local), [], origin, [| from |])[0]
                            Pass = Pass.Forward
                            Unit = origin.Unit
                        }
                    )

                    let moved = Reshard.toLayout shards 0 into origin
                    let made = shards.Finish()
                    let spmd = Spmd.runGlobal [| 2; 2; 2 |] made.Layouts made.Graph whole
                    Expect.isLessThan (Dense.distance (spmd.Assemble moved) (whole "x")) 1e-12 $"%A{from} to %A{into}"

        testCase "the cases cover splits, partial sums and several mesh axes (whole models cover rows split by expert)"
        <| fun () ->
            for name in
                [
                    "split values"
                    "pending partial sums"
                    "two or more base axes"
                    "rows split by expert"
                ] do
                printfn $"""coverage: %s{name} %.0f{100.0 * total name / total "cases"} %%"""

            printfn
                $"""refused for rows without an anchor: %.0f{total "refused"} of %.0f{total "cases" + total "refused"}"""

            Expect.isLessThanOrEqual (total "refused" / total "cases") 0.05 "refused"

            for name in [ "split values"; "pending partial sums"; "two or more base axes" ] do
                Expect.isGreaterThanOrEqual (total name / total "cases") 0.3 name
    ]

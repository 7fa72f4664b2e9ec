/// A graph of one rank's shards, and the growing one that partition builds: every value with its copies in other layouts.
namespace DeepSeekGraph.Compiler.Partition

open System.Collections.Generic
open DeepSeekGraph

/// What one rank computes: local types, collectives included, and the layout of every value.
type Partitioned = { Graph: Graph; Layouts: Layout[] }

/// A value of the logical graph as it lies somewhere.
type Copy = {
    Layout: Layout
    /// Value id in the local graph.
    Value: int
    Pass: Pass
    Unit: ModelUnit
}

/// The local graph under construction. Copies of a logical value: the first is where it lives, the others were moved.
[<Sealed>]
type Shards(map: AxisMap, source: Graph) =
    let builder = Builder()
    let layouts = List<Layout>()
    let copies = Array.init source.Types.Length (fun _ -> List<Copy>())
    let routes = Array.create source.Types.Length -1
    let gathered = HashSet<struct (int * int)>()

    member _.Map = map
    member _.Mesh = map.Mesh
    member _.Source = source
    member _.Builder = builder
    member _.Copies(value: int) = copies[value]
    /// The copy a value lives in.
    member _.Home(value: int) : Copy = copies[value][0]

    /// The logical route value whose rows a routed value holds, or -1.
    member _.RouteOf
        with get (value: int) = routes[value]
        and set (value: int) (route: int) = routes[value] <- route

    /// Is a forward value whole over a mesh axis only because what it is made from was gathered?
    member _.IsGathered(value: int, meshAxis: int) = gathered.Contains(struct (value, meshAxis))
    member _.SetGathered(value: int, meshAxis: int) = gathered.Add(struct (value, meshAxis)) |> ignore

    /// Adds a local node; each result lies as told.
    member _.Emit(op: Op, inputs: int list, origin: Origin, results: Layout[]) : int[] =
        let outputs = builder.Add(op, inputs, origin)

        for i in 0 .. outputs.Length - 1 do
            if outputs[i] = layouts.Count then
                layouts.Add results[i]
            elif layouts[outputs[i]] <> results[i] then
                invalidOp $"%s{origin.Path}: one local value, two layouts (a bug in dsg)"

        outputs

    member _.Remember(value: int, copy: Copy) = copies[value].Add copy

    /// Makes a moved copy the value's home.
    member _.Rehome(value: int, copy: Copy) =
        copies[value].Remove copy |> ignore
        copies[value].Insert(0, copy)

    member this.Finish() : Partitioned =
        for name, v in source.Outputs do
            let home: Copy = this.Home v
            builder.SetOutput(name, home.Value)

        {
            Graph = builder.ToGraph()
            Layouts = layouts.ToArray()
        }

/// One rank's graph as text: the graph's own form, then a layout for each value.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.PartitionText

open System.Text
open DeepSeekGraph

let private state (s: AxisState) =
    match s with
    | AxisState.Replicated -> "R"
    | AxisState.Split d -> $"S%i{d}"
    | AxisState.PartialSum -> "P"
    | AxisState.PartialMax -> "M"

/// To read and compare; one state per mesh axis as in plans: R whole, S split on a dim, P partial sum, M partial maximum.
let print (p: Partitioned) : string =
    let out = StringBuilder(Text.print p.Graph)

    for v in 0 .. p.Layouts.Length - 1 do
        let states = p.Layouts[v] |> Array.map state |> String.concat " "
        out.Append($"layout %%%i{v} <%s{states}>\n") |> ignore

    out.ToString()

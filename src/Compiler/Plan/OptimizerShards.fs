/// Where the optimizer states of a parameter lie: split further over the data axes that hold copies of it (ZeRO-1, arXiv 1910.02054).
module DeepSeekGraph.Compiler.Lowering.OptimizerShards

open System.Collections.Generic
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Partition

/// Mesh axes whose ranks hold copies of a parameter and see other data: dp and cp; of experts, edp.
let dataAxes (mesh: MeshInfo) (axisNames: IReadOnlyList<string>) : int list =
    if Seq.contains "experts" axisNames then
        Mesh.axesOf mesh "edp"
    else
        List.sort (Mesh.axesOf mesh "cp" @ Mesh.axesOf mesh "dp")

/// The states of one parameter.
type Shard = {
    /// Mesh axes of its gradient's partial sum that see other data: those that are reduced first, and at once.
    Data: int list
    /// The dim that they split; nothing where no dim divides: then every copy holds all states.
    Dim: int voption
    Layout: Layout
}

/// The first dim that the data axes can split, given that blocks are cut in one piece only along axes faster than all others of the dim.
let private splittable (mesh: MeshInfo) (p: ParameterInfo) (data: int list) =
    let layout = Array.ofSeq p.Layout
    let n = Mesh.extent mesh data

    let fits d =
        let taken = Layout.axesOn layout d
        let local = p.Extents[d] / Mesh.extent mesh taken
        local % n = 0 && taken |> List.forall (fun m -> m > List.max data)

    match [ 0 .. p.Extents.Count - 1 ] |> List.tryFind fits with
    | Some d -> ValueSome d
    | None -> ValueNone

/// How the states of `p` lie, whose accumulated gradient lies as `gradient`.
let place (distributed: bool) (mesh: MeshInfo) (p: ParameterInfo) (gradient: IReadOnlyList<AxisState>) : Shard =
    let layout = Array.ofSeq p.Layout
    let data = dataAxes mesh p.Axes |> List.filter (fun m -> gradient[m].IsPartialSum)
    let dim = if distributed && not data.IsEmpty then splittable mesh p data else ValueNone

    match dim with
    | ValueSome d ->
        for m in data do
            layout[m] <- AxisState.Split d
    | ValueNone -> ()

    {
        Data = data
        Dim = dim
        Layout = layout
    }

/// How one value lies across mesh axes: states, local types, and the recipe's map from axis names to mesh axes.
namespace DeepSeekGraph.Compiler.Partition

open DeepSeekGraph
open DeepSeekGraph.Compiler

/// One state per mesh axis.
type Layout = AxisState[]

/// Which mesh axes split which named axes.
type AxisMap = {
    Mesh: MeshInfo
    /// Of parameters, by axis name.
    Parameters: Map<string, int list>
    /// Of inputs, by axis name.
    Inputs: Map<string, int list>
    /// Of anchored values, by anchor name, then axis name.
    Anchors: Map<string, Map<string, int list>>
    /// How routed rows reach their experts: AllGather, AllToAll or Flex.
    Dispatcher: Dispatcher
}

[<RequireQualifiedAccess>]
module Layout =
    let replicated (mesh: MeshInfo) : Layout = Array.create mesh.Axes.Count AxisState.Replicated
    let size (mesh: MeshInfo) (axes: int seq) = axes |> Seq.fold (fun n m -> n * mesh.Axes[m].Size) 1

    /// Mesh axes that split a dim, fastest first.
    let axesOn (layout: Layout) (dim: int) = [
        for m in 0 .. layout.Length - 1 do
            match layout[m] with
            | AxisState.Split d when d = dim -> m
            | AxisState.Split _
            | AxisState.Replicated
            | AxisState.PartialSum
            | AxisState.PartialMax -> ()
    ]

    /// Mesh axes over which the value is a partial sum.
    let partials (layout: Layout) = [
        for m in 0 .. layout.Length - 1 do
            if layout[m].IsPartialSum then
                m
    ]

    /// The type of one rank's shard. Extents must divide (checked where layouts are chosen).
    let local (mesh: MeshInfo) (layout: Layout) (t: TensorType) : TensorType = {
        t with
            Axes =
                t.Axes
                |> Array.mapi (fun d a -> {
                    a with
                        Extent = a.Extent / size mesh (axesOn layout d)
                })
    }

    /// The slot of a value of local type `t` that lies so.
    let slot (id: int) (name: string) (kind: SlotKind) (t: TensorType) (layout: Layout) : SlotInfo = {
        Id = id
        Name = name
        Kind = kind
        DType = t.DType
        Axes = t.Names
        Extents = t.Extents
        Routed = t.Routed
        Density = t.Density
        Padding = 1
        Layout = layout
    }

    /// The layout that splits each named axis of `t` as `map` says, where the extent divides.
    let ofNames (mesh: MeshInfo) (map: Map<string, int list>) (t: TensorType) : Layout =
        let layout = replicated mesh

        t.Axes
        |> Array.iteri (fun d a ->
            match Map.tryFind a.Name map with
            // a mesh axis splits one dim: the first that asks
            | Some axes when a.Extent % size mesh axes = 0 && axes |> List.forall (fun m -> layout[m].IsReplicated) ->
                for m in axes do
                    layout[m] <- AxisState.Split d
            | Some _
            | None -> ())

        layout

[<RequireQualifiedAccess>]
module AxisMap =
    /// Tensor parallel heads, ffn and vocab; expert parallel experts; the sequence over cp, between tensor parallel regions over tp too.
    let create (sequenceParallel: bool) (dispatcher: Dispatcher) (mesh: MeshInfo) : AxisMap =
        let tp, cp, dp = Mesh.axesOf mesh "tp", Mesh.axesOf mesh "cp", Mesh.axesOf mesh "dp"
        let tokens = Map [ "batch", dp; "seq", (if sequenceParallel then tp @ cp else cp) ]

        {
            Mesh = mesh
            Parameters =
                Map [
                    "heads", tp
                    "ffn", tp
                    "vocab", tp
                    "experts", Mesh.axesOf mesh "ep"
                    "expert_ffn", Mesh.axesOf mesh "etp"
                ]
            Inputs = Map [ "batch", dp ]
            Anchors =
                Map [
                    "residual", tokens
                    "sequence", Map [ "batch", dp; "seq", cp ]
                    "logits", Map [ "batch", dp; "seq", cp; "vocab", tp ]
                ]
            Dispatcher = dispatcher
        }

    /// With sequence parallelism, rows exchanged.
    let ofMesh (mesh: MeshInfo) : AxisMap = create true Dispatcher.AllToAll mesh

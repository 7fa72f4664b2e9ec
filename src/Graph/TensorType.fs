/// The type of one value: element type and named axes with extents.
namespace DeepSeekGraph

/// A named dimension. Names are unique within a tensor; layouts are chosen by name.
[<Struct>]
type Axis = { Name: string; Extent: int }

/// `Routed`: the first three axes (batch, seq, experts) are sparse and stored as rows, one per (token, chosen expert).
/// Logically such a value is dense and zero where nothing is routed. `Density`: expected share of rows present (top-k / experts), 1 when dense.
type TensorType = {
    DType: DType
    Axes: Axis[]
    Routed: bool
    Density: float
} with

    member this.Rank = this.Axes.Length
    member this.Extents = this.Axes |> Array.map _.Extent
    member this.Names = this.Axes |> Array.map _.Name

    /// Elements of the dense value.
    member this.Elements = this.Axes |> Array.fold (fun n a -> n * int64 a.Extent) 1L

    /// Bytes stored when routing is balanced.
    member this.Bytes = int64 (ceil (float this.Elements * this.Density)) * int64 this.DType.Bytes

    /// Position of the axis named `name`, or -1.
    member this.IndexOf(name: string) =
        this.Axes |> Array.tryFindIndex (fun a -> a.Name = name) |> Option.defaultValue -1

    /// As printed: bf16[batch 2, seq 64, hidden 128], with `rows` in front of routed axes.
    override this.ToString() =
        let axes = this.Axes |> Array.map (fun a -> $"%s{a.Name} %i{a.Extent}") |> String.concat ", "
        let routed = if this.Routed then "rows " else ""
        $"%s{this.DType.Name}[%s{routed}%s{axes}]"

[<RequireQualifiedAccess>]
module TensorType =
    /// A dense type.
    let create dtype (axes: (string * int) seq) = {
        DType = dtype
        Axes = [| for name, extent in axes -> { Name = name; Extent = extent } |]
        Routed = false
        Density = 1.0
    }

    let scalar dtype = create dtype []

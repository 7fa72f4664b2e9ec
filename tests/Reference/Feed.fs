/// Values for a graph's inputs and parameters: a fixed function of seed, name and element.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Reference.Feed

open DeepSeekGraph

/// A number in [0, 1) from a seed, a name and an element (SplitMix64).
let private unit (seed: int) (name: string) (element: int) =
    let mix (z: uint64) =
        let z = (z ^^^ (z >>> 30)) * 0xBF58476D1CE4E5B9UL
        let z = (z ^^^ (z >>> 27)) * 0x94D049BB133111EBUL
        z ^^^ (z >>> 31)

    let start = name |> Seq.fold (fun h c -> mix (h * 31UL + uint64 c)) (uint64 seed)

    float (mix (start + 0x9E3779B97F4A7C15UL * uint64 (element + 1)) >>> 11) / float (1UL <<< 53)

/// Ids must exist: the extent of the axes that embeddings and picks look up.
let private vocabulary (graph: Graph) =
    let lists =
        graph.Nodes
        |> Array.choose (fun n ->
            match n.Op with
            | Op.Embedding
            | Op.EmbeddingGrad
            | Op.Pick
            | Op.PickGrad -> Some graph.Types[Array.last n.Inputs].Axes[0].Extent
            | Op.LinearCrossEntropy
            | Op.LinearCrossEntropyGrad
            | Op.LinearLogSumExp _
            | Op.LinearLogSumExpGrad _ -> Some graph.Types[n.Inputs[3]].Axes[0].Extent
            | _other -> None)

    if lists.Length = 0 then 4 else Array.min lists

/// Values in [-1, 1], ids in the vocabulary, and 0 or 1, by element type.
let values (seed: int) (graph: Graph) (name: string) (t: TensorType) : DenseTensor =
    let ids = float (vocabulary graph)

    let value u =
        match t.DType with
        | DType.Float32
        | DType.BFloat16 -> 2.0 * u - 1.0
        | DType.Int64
        | DType.Int32
        | DType.Int16 -> floor (u * ids)
        | DType.Bool -> if u < 0.5 then 0.0 else 1.0

    {
        Extents = t.Extents
        Data = Array.init (int t.Elements) (fun i -> value (unit seed name i))
    }

/// Types of the graph's inputs and parameters, by name.
let sources (graph: Graph) : Map<string, TensorType> =
    graph.Nodes
    |> Array.choose (fun n ->
        match n.Op with
        | Op.Parameter(spec, t) -> Some(spec.Name, t)
        | Op.Input(name, t)
        | Op.Cache(name, t) -> Some(name, t)
        | _computed -> None)
    |> Map.ofArray

/// A value for any input or parameter of the graph.
let lookup (seed: int) (graph: Graph) : string -> DenseTensor =
    let types = sources graph
    let made = System.Collections.Generic.Dictionary<string, DenseTensor>()

    fun name ->
        match made.TryGetValue name with
        | true, x -> x
        | false, _ ->
            let x = values seed graph name types[name]
            made[name] <- x
            x

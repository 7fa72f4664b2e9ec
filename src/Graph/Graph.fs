/// The immutable graph: nodes in topological order by construction, values typed, named outputs.
namespace DeepSeekGraph

/// Part of the model that a node belongs to; stages are cut between units.
[<RequireQualifiedAccess>]
type ModelUnit =
    /// Computed from inputs alone, wherever it is needed.
    | Shared
    | Embed
    | Layer of Index: int
    | Mtp of Index: int
    | Head

    /// As printed: shared, embed, layer.3, mtp.0, head.
    override this.ToString() =
        match this with
        | Shared -> "shared"
        | Embed -> "embed"
        | Layer i -> $"layer.%i{i}"
        | Mtp i -> $"mtp.%i{i}"
        | Head -> "head"

[<RequireQualifiedAccess>]
type Pass =
    | Forward
    | Backward
    /// Forward work done again in the backward pass, so that its results need not be kept.
    | Recompute

/// Where a node comes from.
type Origin = {
    /// Module path such as layers.3.self_attn.
    Path: string
    Unit: ModelUnit
    Pass: Pass
}

/// One op applied to values; inputs and outputs are value ids.
type Node = {
    Op: Op
    Inputs: int[]
    Outputs: int[]
    Origin: Origin
}

/// A computation. Value v is made by node Producer[v] and has type Types[v].
[<Sealed>]
type Graph(nodes: Node[], types: TensorType[], outputs: (string * int)[], primals: int[]) =
    let producer =
        let p = Array.create types.Length -1

        for n in 0 .. nodes.Length - 1 do
            for v in nodes[n].Outputs do
                p[v] <- n

        p

    member _.Nodes = nodes
    member _.Types = types
    /// Named results: loss, grad:<parameter>, count:<path>, ...
    member _.Outputs = outputs
    /// The value that v is a complete cotangent of, or -1.
    member _.Primals = primals
    member _.Producer = producer
    member _.NodeOf(value: int) = nodes[producer[value]]
    member _.Output(name: string) = outputs |> Array.find (fun (n, _) -> n = name) |> snd

    member _.TryOutput(name: string) =
        outputs |> Array.tryFind (fun (n, _) -> n = name) |> Option.map snd |> Option.toValueOption

/// A graph in few words: sources, ops, and a loss that makes every gradient count.
namespace DeepSeekGraph.Testing

open DeepSeekGraph

/// Grows a graph for a test; what is wrong with an op raises.
[<Sealed>]
type Sketch() =
    let builder = Builder()

    let mutable origin = {
        Path = "test"
        Unit = ModelUnit.Layer 0
        Pass = Pass.Forward
    }

    let mutable weights = 0

    /// Path and model unit of the nodes to come.
    member _.Origin
        with get () = origin
        and set value = origin <- value

    member _.Builder = builder
    member _.Type(value: int) = builder.Type value
    member _.TryAll(op: Op, inputs: int list) = builder.TryAdd(op, inputs, origin)
    /// Every result of an op.
    member _.All(op: Op, inputs: int list) = builder.Add(op, inputs, origin)
    /// The first result of an op.
    member this.On(op: Op, inputs: int list) = this.All(op, inputs)[0]

    member this.Source(op: Op) = builder.Add(op, [], { origin with Unit = ModelUnit.Shared })[0]

    /// A trained fp32 parameter.
    member this.Param(name: string, axes: (string * int) list) =
        let spec = {
            Name = name
            Init = Init.Normal 0.02
            Update = Update.AdamW true
            KeepFloat32 = false
        }

        this.Source(Op.Parameter(spec, TensorType.create DType.Float32 axes))

    member this.In(name: string, dtype: DType, axes: (string * int) list) =
        this.Source(Op.Input(name, TensorType.create dtype axes))

    member this.Iota(name: string, extent: int) = this.Source(Op.Iota { Name = name; Extent = extent })

    /// The row set of `topK` experts a token, chosen by the input `name`.
    member this.Route(name: string, axes: (string * int) list, topK: int) =
        let scores = this.In(name, DType.Float32, axes)

        let spec = {
            TopK = topK
            Groups = 1
            KeepGroups = 1
            ZeroMasked = false
            GroupScore = GroupScore.BestTwo
        }

        this.On(Op.Route(topK, axes |> List.last |> snd), [ this.On(Op.GroupTopK spec, [ scores ]) ])

    /// A dense value of the same rows: rows are gathered per token, wider ones after summing what trails.
    member private this.Dense(value: int, route: int) =
        let t = this.Type value
        let extra = t.Names[4..] |> List.ofArray

        let flat = if extra.IsEmpty then value else this.On(Op.Sum extra, [ value ])

        match (this.Type flat).Rank with
        | 3 -> this.On(Op.UnrouteProbs, [ flat; route ])
        | _ -> this.On(Op.Unpermute false, [ flat; route ])

    /// One number that depends on each element of `values` with a weight of its own; `routes` for those that are rows.
    member this.Weighted(values: (int * int voption) list) =
        let terms = [
            for value, route in values do
                let dense =
                    match route with
                    | ValueSome r when (this.Type value).Routed -> this.Dense(value, r)
                    | _ -> value

                let t = this.Type dense

                let wide = if t.DType = DType.Float32 then dense else this.On(Op.Cast DType.Float32, [ dense ])

                weights <- weights + 1

                let weight = this.Source(Op.Input($"weight.%i{weights}", { t with DType = DType.Float32 }))

                let product = this.On(Op.Mul, [ wide; weight ])

                if t.Rank = 0 then product else this.On(Op.Sum(List.ofArray t.Names), [ product ])
        ]

        match terms with
        | [ one ] -> one
        | many -> this.On(Op.Add, many)

    member _.Output(name: string, value: int) = builder.SetOutput(name, value)
    member _.ToGraph() = builder.ToGraph()

    /// The graph whose loss weighs every element of these dense values.
    member this.Loss(values: int list) =
        this.Output("loss", this.Weighted [ for v in values -> v, ValueNone ])
        this.ToGraph()

    /// The graph whose loss weighs every element of these values over one row set.
    member this.LossOfRows(route: int, values: int list) =
        this.Output("loss", this.Weighted [ for v in values -> v, ValueSome route ])
        this.ToGraph()

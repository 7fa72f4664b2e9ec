/// The record of everything the compiler knows about one op, and what a gradient rule may use.
namespace DeepSeekGraph

/// How operand dims correspond to each other and to results.
[<RequireQualifiedAccess>]
type AxisRule =
    /// The axis language.
    | Axes of string
    /// The axis language; a letter must also carry the same axis name wherever it occurs.
    | Named of string
    /// Where letters cannot say it; the op's comment says why.
    | Custom of (TensorType[] -> Result<Rule, string>)

/// In which operands an op is linear, so that a partial sum may pass.
[<RequireQualifiedAccess>]
type Linearity =
    | No
    /// In each of these alone, the others fixed.
    | InEach of int list
    /// In all operands together (sums, joins).
    | Jointly
    /// In the first operands together, the others fixed.
    | JointlyInFirst of int

/// What a gradient rule sees of its node: values are ids, absent cotangents are zero.
type Adjoint = {
    Inputs: int[]
    Outputs: int[]
    Type: int -> TensorType
    Cotangents: int voption[]
    Emit: Op -> int list -> int[]
} with

    /// Emits an op with one result.
    member this.One op inputs = (this.Emit op inputs)[0]

    /// The only cotangent of a one-result op.
    member this.Dy = this.Cotangents[0].Value

[<RequireQualifiedAccess>]
type Vjp =
    /// Cotangent of each input.
    | Rule of (Adjoint -> int voption[])
    /// Piecewise constant: no cotangent flows.
    | Stop
    /// Not differentiable, and why.
    | Missing of string

/// How fusion may treat an op.
[<RequireQualifiedAccess>]
type Fusion =
    | Pointwise
    | Reduction
    | Contraction
    | Opaque

type OpDef = {
    /// snake_case, stable, as printed.
    Name: string
    Axes: AxisRule
    /// Element types of the results, or what is wrong with the operands'.
    Result: TensorType[] -> Result<DType[], string>
    /// Density of each result that is rows, 0 for dense results.
    Rows: TensorType[] -> float[]
    Linear: Linearity
    Vjp: Vjp
    /// Floating-point operations, from operand and result types.
    Flops: TensorType[] -> TensorType[] -> float
    Fusion: Fusion
}

[<RequireQualifiedAccess>]
module OpDef =
    /// Axes, then types: what the op makes of its operands.
    let infer (def: OpDef) (types: TensorType[]) : Result<Rule * TensorType[], string> =
        let rule =
            match def.Axes with
            | AxisRule.Axes text -> Axes.bind false (Axes.parse text) types
            | AxisRule.Named text -> Axes.bind true (Axes.parse text) types
            | AxisRule.Custom infer -> infer types

        // types only once the axes fit: they may count on arity and rank
        match rule |> Result.bind (fun rule -> def.Result types |> Result.map (fun dtypes -> rule, dtypes)) with
        | Error text -> Error text
        | Ok(rule, dtypes) ->
            let results =
                Array.map3
                    (fun axes dtype density -> {
                        DType = dtype
                        Axes = axes
                        Routed = density > 0.0
                        Density = if density > 0.0 then density else 1.0
                    })
                    rule.ResultAxes
                    dtypes
                    (def.Rows types)

            let impossible =
                results
                |> Array.tryFind (fun t ->
                    t.Axes |> Array.exists (fun a -> a.Extent < 1)
                    || t.Axes |> Array.fold (fun n a -> n * float a.Extent) 1.0 > 1e18)

            let twice =
                results
                |> Array.tryPick (fun t ->
                    t.Names |> Array.countBy id |> Array.tryPick (fun (n, k) -> if k > 1 then Some n else None))

            match twice, impossible with
            | Some name, _ -> Error $"the result would have axis '%s{name}' twice"
            | None, Some t -> Error $"the result would be %O{t}: extents are at least 1, elements at most 1e18"
            | None, None -> Ok(rule, results)

    // dtype rules

    /// All operands have one element type; each of `n` results has it too.
    let same n (types: TensorType[]) : Result<DType[], string> =
        match types |> Array.tryFindIndex (fun t -> t.DType <> types[0].DType) with
        | Some i -> Error $"input 0 is %s{types[0].DType.Name} but input %i{i} is %s{types[i].DType.Name}"
        | None -> Ok(Array.create n types[0].DType)

    /// The operands `which` have one floating type; each of `n` results has it.
    let sameOf (which: int list) n (types: TensorType[]) : Result<DType[], string> =
        let first = types[which.Head].DType

        match which |> List.tryFind (fun i -> types[i].DType <> first || not types[i].DType.IsFloat) with
        | Some i ->
            Error
                $"input %i{which.Head} is %s{first.Name} but input %i{i} is %s{types[i].DType.Name}; both must be one floating type"
        | None -> Ok(Array.create n first)

    /// A custom axis rule for exactly `count` operands.
    let taking (count: int) (infer: TensorType[] -> Result<Rule, string>) =
        AxisRule.Custom(fun types ->
            if types.Length = count then
                infer types
            else
                Error $"takes %i{count} inputs, not %i{types.Length}")

    /// A custom axis rule for any number of operands but none.
    let takingSome (infer: TensorType[] -> Result<Rule, string>) =
        AxisRule.Custom(fun types -> if types.Length > 0 then infer types else Error "takes at least one input")

    /// The operands `which` must be rows, all others dense.
    let wantRows (which: int list) (types: TensorType[]) : Result<unit, string> =
        match types |> Array.indexed |> Array.tryFind (fun (i, t) -> t.Routed <> List.contains i which) with
        | Some(i, t) when t.Routed -> Error $"input %i{i} is rows, %O{t}, but must be dense"
        | Some(i, t) -> Error $"input %i{i} is dense, %O{t}, but must be rows"
        | None -> Ok()

    /// Axis `name` is none of the three that rows are sparse in.
    let denseAxis (name: string) (t: TensorType) : Result<unit, string> =
        if t.Routed && t.IndexOf name < 3 then
            Error $"axis '%s{name}' of %O{t} is sparse: route its rows instead"
        else
            Ok()

    // rows rules

    /// No result is rows.
    let dense n (_types: TensorType[]) = Array.create n 0.0

    /// Density of an operand's rows, 0 when it is dense.
    let density (t: TensorType) = if t.Routed then t.Density else 0.0

    /// Results are rows when operand `i` is.
    let followsOf i n (types: TensorType[]) = Array.create n (density types[i])
    /// Results are rows when the first operand is.
    let follows n types = followsOf 0 n types

    // costs

    let private stored (t: TensorType) = float t.Elements * t.Density

    /// `k` operations for each element of the largest operand or result.
    let perElement (k: float) (inputs: TensorType[]) (outputs: TensorType[]) =
        k * (Array.append inputs outputs |> Array.map stored |> Array.max)

    /// Nothing is computed.
    let free (_inputs: TensorType[]) (_outputs: TensorType[]) = 0.0

    /// Two operations for each point of the index space spanned by all letters.
    let contraction (axes: string) (inputs: TensorType[]) (_outputs: TensorType[]) =
        match Axes.bind false (Axes.parse axes) inputs with
        | Error _ -> 0.0
        | Ok rule ->
            let density = inputs |> Array.map _.Density |> Array.min
            rule.Factors |> Array.fold (fun n f -> n * float f.Extent) (2.0 * density)

    /// One operand of the same shape as the result.
    let pointwise name vjp = {
        Name = name
        Axes = AxisRule.Axes "... -> ..."
        Result = same 1
        Rows = follows 1
        Linear = Linearity.No
        Vjp = vjp
        Flops = perElement 1.0
        Fusion = Fusion.Pointwise
    }

    /// A whole-tensor op with its own kernel and gradient.
    let opaque name axes result vjp = {
        Name = name
        Axes = AxisRule.Axes axes
        Result = result
        Rows = dense 1
        Linear = Linearity.No
        Vjp = vjp
        Flops = perElement 4.0
        Fusion = Fusion.Opaque
    }

/// The surface for model code: named tensors with operators, and scopes that name what is declared.
namespace DeepSeekGraph

open System
open System.Collections.Generic

/// What a declaration in progress shares: the graph under construction, where it stands, and the mistakes found so far.
[<Sealed>]
type Declaration() =
    let builder = Builder()
    let diagnostics = List<Diagnostic>()

    let mutable origin = {
        Path = ""
        Unit = ModelUnit.Shared
        Pass = Pass.Forward
    }

    let units = Dictionary<int, ModelUnit>()

    let unitOf (value: int) =
        match units.TryGetValue value with
        | true, part -> part
        | false, _ -> ModelUnit.Shared

    /// Outside any unit, a node belongs where the latest of its operands is; parameters are no earlier than the embedding.
    let placed (inputs: int list) =
        match origin.Unit with
        | ModelUnit.Shared -> {
            origin with
                Unit = inputs |> List.fold (fun part v -> max part (unitOf v)) ModelUnit.Shared
          }
        | _unit -> origin

    member _.Builder: Builder = builder

    /// Standard deviation of the weights declared from here on.
    member val InitStd = 0.02 with get, set

    /// Mistakes found so far; a mistake yields a placeholder tensor, so that all of them are found.
    member _.Diagnostics = diagnostics :> IReadOnlyList<Diagnostic>

    /// Where nodes added now belong: the scope being declared.
    member _.Origin
        with get () = origin
        and internal set (value: Origin) = origin <- value

    /// Records a mistake at the scope being declared.
    member _.Report(code: string, message: string, help: string) =
        diagnostics.Add {
            Code = code
            At = origin.Path
            Message = message
            Help = help
        }

    /// Adds an op; a mistake is recorded and yields placeholders (-1).
    member internal this.Apply(op: Op, inputs: int list) : int[] =
        if List.contains -1 inputs then
            Array.create 3 -1
        else
            let at = placed inputs

            match builder.TryAdd(op, inputs, at) with
            | Ok values ->
                for v in values do
                    units.TryAdd(v, at.Unit) |> ignore

                values
            | Error text ->
                let code =
                    if text.Contains "fp32 but" || text.Contains "bf16 but" then
                        Codes.TypeClash
                    else
                        Codes.AxisClash

                this.Report(code, text, "")
                Array.create 3 -1

    /// Adds an op without operands; it belongs to no unit, whoever reads it holds it.
    member internal _.Source(op: Op, name: string) : int =
        let value =
            builder.Add(
                op,
                [],
                {
                    Path = name
                    Unit = ModelUnit.Shared
                    Pass = Pass.Forward
                }
            )[0]

        if op.IsParameter then
            units.TryAdd(value, ModelUnit.Embed) |> ignore

        value

    /// The declared graph. Raises DiagnosticException when there were mistakes.
    member _.ToGraph() =
        if diagnostics.Count > 0 then
            raise (DiagnosticException diagnostics)

        builder.ToGraph()

/// A value of the model under declaration: element type and named axes. Immutable; every operation adds a node
/// that belongs to the scope being declared.
[<Sealed>]
type Tensor(declaration: Declaration, value: int) =
    let apply op = Tensor(declaration, declaration.Apply(op, [ value ])[0])

    let applyTo op (others: Tensor[]) =
        Tensor(declaration, declaration.Apply(op, [ value; yield! others |> Array.map _.Value ])[0])

    static let binary op (a: Tensor) (b: Tensor) =
        Tensor(a.Declaration, a.Declaration.Apply(op, [ a.Value; b.Value ])[0])

    member _.Declaration: Declaration = declaration
    /// Value id in the graph; -1 for the placeholder after a mistake.
    member _.Value: int = value

    member _.Type: TensorType = if value < 0 then TensorType.scalar DType.Float32 else declaration.Builder.Type value

    /// Extent of a named axis; 1 for the placeholder.
    member this.Extent(axis: string) =
        match this.Type.IndexOf axis with
        | -1 -> 1
        | d -> this.Type.Axes[d].Extent

    override this.ToString() = this.Type.ToString()

    static member (+)(a: Tensor, b: Tensor) : Tensor = binary Op.Add a b
    static member (-)(a: Tensor, b: Tensor) : Tensor = binary Op.Sub a b
    static member (*)(a: Tensor, b: Tensor) : Tensor = binary Op.Mul a b
    static member (/)(a: Tensor, b: Tensor) : Tensor = binary Op.Div a b
    static member (*)(a: Tensor, k: float) : Tensor = a.Apply(Op.Scale k)
    static member (*)(k: float, a: Tensor) : Tensor = a.Apply(Op.Scale k)
    static member (+)(a: Tensor, k: float) : Tensor = a.Apply(Op.Offset k)
    static member (~-)(a: Tensor) : Tensor = a.Apply(Op.Neg)

    /// Any op on this tensor and others; its first result.
    member _.Apply(op: Op, [<ParamArray>] others: Tensor[]) : Tensor = applyTo op others
    member _.Exp() = apply Op.Exp
    member _.Log() = apply Op.Log
    member _.Sigmoid() = apply Op.Sigmoid
    member _.Silu() = apply Op.Silu
    member _.Cast(dtype: DType) = apply (Op.Cast dtype)
    member _.Slice(axis: string, start: int, length: int) = apply (Op.Slice(axis, start, length))
    member _.Rename(from: string, into: string) = apply (Op.Rename(from, into))

    /// A new axis in front of dim `dim`, repeated.
    member _.Broadcast(axis: string, extent: int, dim: int) =
        apply (Op.Broadcast({ Name = axis; Extent = extent }, dim))

    /// Identity whose result must lie as the recipe says for this anchor.
    member _.Anchor(name: string) = apply (Op.Anchor name)
    /// Identity without gradient.
    member _.Detach() = apply Op.Detach
    member _.Sum([<ParamArray>] axes: string[]) = apply (Op.Sum(List.ofArray axes))
    member _.Max([<ParamArray>] axes: string[]) = apply (Op.Max(List.ofArray axes))

    /// Joins tensors along a named axis.
    static member Concat(axis: string, [<ParamArray>] parts: Tensor[]) : Tensor =
        let d = parts[0].Declaration
        Tensor(d, d.Apply(Op.Concat axis, [ for p in parts -> p.Value ])[0])

    /// Product contracted over every axis that both have by name: x[batch, seq, hidden] with w[ffn, hidden] is [batch, seq, ffn].
    member this.MatMul(weight: Tensor) : Tensor =
        let a, b = this.Type.Names, weight.Type.Names
        let shared name = Array.contains name a && Array.contains name b
        let letter name = if shared name then name + "+" else name
        let term names = String.Join(" ", Array.map letter names)
        let result = String.Join(" ", Array.append a b |> Array.filter (fun n -> not (shared n)))
        binary (Op.Contract $"%s{term a}, %s{term b} -> %s{result}") this weight

/// Where declarations happen: a module path and a model unit. Scopes nest; names of parameters are their paths.
[<Sealed>]
type ModelScope private (declaration: Declaration, path: string, part: ModelUnit) =
    let join (name: string) = if path = "" then name else $"%s{path}.%s{name}"

    /// The root scope of a new declaration.
    new(declaration: Declaration) = ModelScope(declaration, "", ModelUnit.Shared)

    member _.Declaration = declaration
    /// Module path such as model.layers.3.self_attn; empty at the root.
    member _.Path = path
    member _.Unit = part

    /// Declares `body` in a scope below this one; its nodes carry the scope's path.
    member this.Scope(name: string, body: Func<ModelScope, 'T>) : 'T = this.Scope(name, part, body)

    /// Declares `body` in a scope below this one whose nodes belong to `unit` of the model.
    member _.Scope(name: string, unit: ModelUnit, body: Func<ModelScope, 'T>) : 'T =
        let inner = ModelScope(declaration, (if name = "" then path else join name), unit)
        let outer = declaration.Origin

        declaration.Origin <- {
            outer with
                Path = inner.Path
                Unit = unit
        }

        try
            body.Invoke inner
        finally
            declaration.Origin <- outer

    /// Adds an op of any number of results.
    member _.Apply(op: Op, [<ParamArray>] inputs: Tensor[]) : Tensor[] =
        declaration.Apply(op, [ for x in inputs -> x.Value ]) |> Array.map (fun v -> Tensor(declaration, v))

    member private _.Source(op: Op, name: string) : Tensor = Tensor(declaration, declaration.Source(op, name))

    /// Declares a parameter named by the path, fp32 as declared (the precision pass decides what it computes in).
    member this.Parameter
        (name: string, init: Init, update: Update, keepFloat32: bool, [<ParamArray>] axes: struct (string * int)[])
        : Tensor =
        let spec = {
            Name = join name
            Init = init
            Update = update
            KeepFloat32 = keepFloat32
        }

        if not (declaration.Builder.DeclareParameter spec.Name) then
            declaration.Report(
                Codes.IllegalGraph,
                $"parameter %s{spec.Name} is declared twice",
                "share the tensor, or choose another name"
            )

        let t = TensorType.create DType.Float32 [ for struct (n, e) in axes -> n, e ]
        this.Source(Op.Parameter(spec, t), spec.Name)

    /// A parameter that AdamW updates; one-dimensional ones without weight decay.
    member this.Weight(name: string, init: Init, [<ParamArray>] axes: struct (string * int)[]) : Tensor =
        this.Parameter(name, init, Update.AdamW(axes.Length > 1), false, axes)

    /// Declares an input of the step: tokens, masks, or a scalar when there are no axes.
    member this.Input(name: string, dtype: DType, [<ParamArray>] axes: struct (string * int)[]) : Tensor =
        let t = TensorType.create dtype [ for struct (n, e) in axes -> n, e ]
        this.Source(Op.Input(name, t), name)

    /// What is kept from one run to the next, zero at first; name what CacheWrite makes of it as an output `cache:` and this name.
    member this.Cache(name: string, [<ParamArray>] axes: struct (string * int)[]) : Tensor =
        let t = TensorType.create DType.Float32 [ for struct (n, e) in axes -> n, e ]
        this.Source(Op.Cache(join name, t), join name)

    /// A value known when the model is declared, the same everywhere.
    member this.Constant(value: float, [<ParamArray>] axes: struct (string * int)[]) : Tensor =
        let t = TensorType.create DType.Float32 [ for struct (n, e) in axes -> n, e ]
        this.Source(Op.Constant(value, t), "constant")

    /// 0, 1, 2, ... along a named axis.
    member this.Iota(axis: string, extent: int) : Tensor = this.Source(Op.Iota { Name = axis; Extent = extent }, axis)

    /// Names a result of the model (loss, metric:..., count:..., logits).
    member _.Output(name: string, x: Tensor) =
        if x.Value >= 0 then
            declaration.Builder.SetOutput(name, x.Value)

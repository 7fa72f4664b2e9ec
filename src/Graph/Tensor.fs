/// The surface for model code: named tensors with operators, and scopes that name what is declared.
namespace DeepSeekGraph

open System
open System.Collections.Generic

/// What a declaration in progress shares: the graph under construction and the mistakes found so far.
[<Sealed>]
type Declaration() =
    let builder = Builder()
    let diagnostics = List<Diagnostic>()
    member _.Builder = builder
    /// Mistakes found so far; a mistake yields a placeholder tensor, so that all of them are found.
    member _.Diagnostics = diagnostics :> IReadOnlyList<Diagnostic>
    member internal _.Report(diagnostic: Diagnostic) = diagnostics.Add diagnostic

    /// The declared graph. Raises DiagnosticException when there were mistakes.
    member _.ToGraph() =
        if diagnostics.Count > 0 then
            raise (DiagnosticException diagnostics)

        builder.ToGraph()

/// A value of the model under declaration: element type and named axes. Immutable; every operation adds a node.
[<Sealed>]
type Tensor internal (scope: ModelScope, value: int) =
    member _.Scope = scope
    /// Value id in the graph; -1 for the placeholder after a mistake.
    member _.Value = value
    member _.IsPlaceholder = value < 0

    member _.Type =
        if value < 0 then TensorType.scalar DType.Float32 else scope.Declaration.Builder.Type value

    /// Extent of a named axis; 1 for the placeholder.
    member this.Extent(axis: string) =
        match this.Type.IndexOf axis with
        | -1 -> 1
        | d -> this.Type.Axes[d].Extent

    override this.ToString() = this.Type.ToString()

    static member (+)(a: Tensor, b: Tensor) = a.Scope.Apply(Op.Add, a, b)
    static member (-)(a: Tensor, b: Tensor) = a.Scope.Apply(Op.Sub, a, b)
    static member (*)(a: Tensor, b: Tensor) = a.Scope.Apply(Op.Mul, a, b)
    static member (/)(a: Tensor, b: Tensor) = a.Scope.Apply(Op.Div, a, b)
    static member (*)(a: Tensor, k: float) = a.Scope.Apply(Op.Scale k, a)
    static member (*)(k: float, a: Tensor) = a.Scope.Apply(Op.Scale k, a)
    static member (+)(a: Tensor, k: float) = a.Scope.Apply(Op.Offset k, a)
    static member (~-)(a: Tensor) = a.Scope.Apply(Op.Neg, a)

    member this.Exp() = scope.Apply(Op.Exp, this)
    member this.Log() = scope.Apply(Op.Log, this)
    member this.Sigmoid() = scope.Apply(Op.Sigmoid, this)
    member this.Silu() = scope.Apply(Op.Silu, this)
    member this.Cast(dtype: DType) = scope.Apply(Op.Cast dtype, this)
    member this.Slice(axis: string, start: int, length: int) = scope.Apply(Op.Slice(axis, start, length), this)
    member this.Rename(from: string, into: string) = scope.Apply(Op.Rename(from, into), this)
    /// A new axis in front of dim `dim`, repeated.
    member this.Broadcast(axis: string, extent: int, dim: int) =
        scope.Apply(Op.Broadcast({ Name = axis; Extent = extent }, dim), this)
    /// Identity whose result must lie as the recipe says for this anchor.
    member this.Anchor(name: string) = scope.Apply(Op.Anchor name, this)
    /// Identity without gradient.
    member this.Detach() = scope.Apply(Op.Detach, this)
    member this.Sum([<ParamArray>] axes: string[]) = scope.Apply(Op.Sum(List.ofArray axes), this)
    member this.Max([<ParamArray>] axes: string[]) = scope.Apply(Op.Max(List.ofArray axes), this)

    /// Product contracted over every axis that both have by name: x[batch, seq, hidden] with w[ffn, hidden] is [batch, seq, ffn].
    member this.MatMul(weight: Tensor) =
        let a, b = this.Type.Names, weight.Type.Names
        let shared name = Array.contains name a && Array.contains name b
        let letter name = if shared name then name + "+" else name
        let term names = String.Join(" ", Array.map letter names)
        let result = Array.append a b |> Array.filter (fun n -> not (shared n))
        scope.Apply(Op.Contract $"""%s{term a}, %s{term b} -> %s{String.Join(" ", result)}""", this, weight)

/// Where declarations happen: a module path and a model unit. Scopes nest; names of parameters are their paths.
and [<Sealed; AllowNullLiteral>] ModelScope internal (declaration: Declaration, path: string, part: ModelUnit) =
    let join (name: string) = if path = "" then name else $"%s{path}.%s{name}"

    new(declaration: Declaration) = ModelScope(declaration, "", ModelUnit.Shared)

    member _.Declaration = declaration
    /// Module path such as layers.3.self_attn; empty at the root.
    member _.Path = path
    member _.Unit = part

    /// A scope below this one.
    member _.Scope(name: string) = ModelScope(declaration, join name, part)
    /// A scope below this one whose nodes belong to `part` of the model.
    member _.Scope(name: string, part: ModelUnit) = ModelScope(declaration, join name, part)
    /// The root scope, in `part`: for parameters whose names do not nest.
    member _.Root(part: ModelUnit) = ModelScope(declaration, "", part)
    /// The same tensor, with operations on it belonging to this scope.
    member this.Enter(x: Tensor) = Tensor(this, x.Value)

    member _.Report(code: string, message: string, help: string) =
        declaration.Report { Code = code; At = path; Message = message; Help = help }

    /// Adds an op; a mistake is recorded and yields placeholders.
    member this.ApplyAll(op: Op, [<ParamArray>] inputs: Tensor[]) : Tensor[] =
        if inputs |> Array.exists _.IsPlaceholder then
            Array.create 3 (Tensor(this, -1))
        else
            let origin = { Path = path; Unit = part; Pass = Pass.Forward }

            match declaration.Builder.TryAdd(op, [ for x in inputs -> x.Value ], origin) with
            | Ok values -> values |> Array.map (fun v -> Tensor(this, v))
            | Error text ->
                let code = if text.Contains "fp32 but" || text.Contains "bf16 but" then Codes.TypeClash else Codes.AxisClash
                this.Report(code, text, "")
                Array.create 3 (Tensor(this, -1))

    /// Adds an op with one result.
    member this.Apply(op: Op, [<ParamArray>] inputs: Tensor[]) : Tensor = this.ApplyAll(op, inputs)[0]

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
            this.Report(Codes.IllegalGraph, $"parameter %s{spec.Name} is declared twice", "share the tensor, or choose another name")

        let t = TensorType.create DType.Float32 [ for struct (n, e) in axes -> n, e ]
        let origin = { Path = spec.Name; Unit = ModelUnit.Shared; Pass = Pass.Forward }
        Tensor(this, declaration.Builder.Add(Op.Parameter(spec, t), [], origin)[0])

    /// A parameter that AdamW updates; one-dimensional ones without weight decay.
    member this.Weight(name: string, init: Init, [<ParamArray>] axes: struct (string * int)[]) : Tensor =
        this.Parameter(name, init, Update.AdamW(axes.Length > 1), false, axes)

    /// Declares an input of the step: tokens, masks, or a scalar when there are no axes.
    member this.Input(name: string, dtype: DType, [<ParamArray>] axes: struct (string * int)[]) : Tensor =
        let t = TensorType.create dtype [ for struct (n, e) in axes -> n, e ]
        let origin = { Path = name; Unit = ModelUnit.Shared; Pass = Pass.Forward }
        Tensor(this, declaration.Builder.Add(Op.Input(name, t), [], origin)[0])

    /// 0, 1, 2, ... along a named axis.
    member this.Iota(axis: string, extent: int) : Tensor =
        let origin = { Path = axis; Unit = ModelUnit.Shared; Pass = Pass.Forward }
        Tensor(this, declaration.Builder.Add(Op.Iota { Name = axis; Extent = extent }, [], origin)[0])

    /// Names a result of the model (loss, metric:..., count:..., logits).
    member _.Output(name: string, x: Tensor) =
        if not x.IsPlaceholder then
            declaration.Builder.SetOutput(name, x.Value)

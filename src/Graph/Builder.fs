/// The only way to add a node: infers and checks its type as it does, and shares equal nodes.
namespace DeepSeekGraph

open System.Collections.Generic

/// Grows a graph. Not thread-safe; the graph it makes is immutable.
[<Sealed>]
type Builder() =
    let nodes = List<Node>()
    let types = List<TensorType>()
    let primals = List<int>()
    let outputs = List<string * int>()
    let shared = Dictionary<struct (Op * int list * Pass), int>(HashIdentity.Structural)
    let parameters = HashSet<string>()

    member _.Type(value: int) = types[value]
    member _.NodeCount = nodes.Count
    member _.ValueCount = types.Count
    member _.Node(index: int) = nodes[index]

    /// Adds a node, or finds the equal one made before in the same or an earlier pass; gives its result values or what is wrong.
    member _.TryAdd(op: Op, inputs: int list, origin: Origin) : Result<int[], string> =
        let find pass =
            match shared.TryGetValue(struct (op, inputs, pass)) with
            | true, n -> Some nodes[n].Outputs
            | false, _ -> None

        let known =
            match origin.Pass with
            | Pass.Forward -> find Pass.Forward
            // recomputed values and collectives of the backward pass are made again rather than kept alive
            | Pass.Recompute -> find Pass.Recompute
            | Pass.Backward when op.IsCollective -> find Pass.Backward
            | Pass.Backward -> find Pass.Forward |> Option.orElse (find Pass.Backward)

        match known with
        | Some outputs -> Ok outputs
        | None ->
            let def = Catalog.define op
            let operands = inputs |> List.map (fun v -> types[v]) |> Array.ofList

            match OpDef.infer def operands with
            | Error text -> Error $"%s{def.Name}: %s{text}"
            | Ok(_, results) ->
                let first = types.Count

                for t in results do
                    types.Add t
                    primals.Add -1

                let outputs = Array.init results.Length (fun i -> first + i)

                nodes.Add {
                    Op = op
                    Inputs = Array.ofList inputs
                    Outputs = outputs
                    Origin = origin
                }

                shared[struct (op, inputs, origin.Pass)] <- nodes.Count - 1
                Ok outputs

    /// Adds a node that must be legal: for passes, whose input was verified.
    member this.Add(op: Op, inputs: int list, origin: Origin) : int[] =
        match this.TryAdd(op, inputs, origin) with
        | Ok outputs -> outputs
        | Error text -> invalidOp $"%s{origin.Path}: %s{text} (a bug in dsg)"

    /// Declares a parameter name; false when it is taken.
    member _.DeclareParameter(name: string) = parameters.Add name

    /// Names a result.
    member _.SetOutput(name: string, value: int) = outputs.Add((name, value))

    /// Records that `value` is the complete cotangent of `primal`; the first record stays.
    member _.SetPrimal(value: int, primal: int) =
        if primals[value] < 0 then
            primals[value] <- primal

    member _.PrimalOf(value: int) = primals[value]

    /// The graph so far.
    member _.ToGraph() = Graph(nodes.ToArray(), types.ToArray(), outputs.ToArray(), primals.ToArray())

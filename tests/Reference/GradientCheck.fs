/// VJP = central differences in float64.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Reference.GradientCheck

open DeepSeekGraph

/// What gradients take for constant (Detach, top-k masks) as inputs that hold the values of one evaluation.
let private freeze (graph: Graph) (seed: int) : Graph * Map<string, DenseTensor> =
    let values = Evaluator.run graph (Feed.lookup seed graph) (Feed.lookup seed graph)
    let mutable frozen = Map.empty

    let result =
        graph
        |> Rewrite.fold (fun rebuild node ->
            match node.Op with
            | Op.Detach
            | Op.GroupTopK _ ->
                let v = node.Outputs[0]
                let name = $"frozen.%i{v}"
                frozen <- frozen.Add(name, values[v])
                rebuild.Put(node, Op.Input(name, graph.Types[v]), [])
            | _other -> rebuild.Copy node)

    result, frozen

/// One entry of a gradient: what reverse mode says, what central differences say.
type Mismatch = {
    Parameter: string
    Element: int
    Reverse: float
    Central: float
}

/// Richardson's combination of two central differences: error of order step^4.
let private slope (f: float -> float) (step: float) =
    let central h = (f h - f -h) / (2.0 * h)
    (4.0 * central step - central (2.0 * step)) / 3.0

/// Entries where the gradient of `loss` differs from central differences by more than `tolerance`, relative to
/// the larger of 1 and the entry; at most `entries` of each parameter are tried.
let mismatches (tolerance: float) (entries: int) (seed: int) (graph: Graph) : Result<Mismatch list, Diagnostic list> =
    Autodiff.differentiate "loss" graph
    |> Result.map (fun joint ->
        let feed = Feed.lookup seed graph
        let reverse = Evaluator.run joint feed feed
        let frozenGraph, frozen = freeze graph seed

        let inputs name =
            match frozen.TryFind name with
            | Some x -> x
            | None -> feed name

        let lossWith (name: string) (x: DenseTensor) =
            let parameters n = if n = name then x else feed n
            (Evaluator.run frozenGraph inputs parameters).Output("loss").Data[0]

        [
            for node in graph.Nodes do
                match node.Op with
                | Op.Parameter(spec, t) when spec.Update.IsAdamW ->
                    let x = feed spec.Name
                    let name = $"grad:%s{spec.Name}"

                    let gradient =
                        if Array.contains name reverse.OutputNames then
                            reverse.Output name
                        else
                            Dense.zeros t.Extents

                    let count = int t.Elements
                    let stride = max 1 (count / entries)

                    for e in 0..stride .. count - 1 do
                        let moved h = {
                            x with
                                Data = Array.mapi (fun i v -> if i = e then v + h else v) x.Data
                        }

                        let central = slope (fun h -> lossWith spec.Name (moved h)) 1e-3
                        let found = gradient.Data[e]

                        if not (abs (central - found) <= tolerance * max 1.0 (max (abs central) (abs found))) then
                            {
                                Parameter = spec.Name
                                Element = e
                                Reverse = found
                                Central = central
                            }
                | _other -> ()
        ])

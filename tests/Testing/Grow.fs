/// Well-typed random graphs, grown step by step from a list of numbers: each step binds its axes to what is in scope.
namespace DeepSeekGraph.Testing

open System.Collections.Generic
open DeepSeekGraph

/// Grows one graph. Axes have the names and roles of models, so that recipes can split them.
[<Sealed>]
type internal Grower(choices: int[]) =
    let s = Sketch()
    let values = List<int>()
    let used = HashSet<int>()
    let mutable next = 0
    let mutable named = 0
    let mutable computed = 0

    let pick n =
        let choice = if next < choices.Length then choices[next] else 0
        next <- next + 1
        choice % n

    let oneOf (items: 'a list) = items[pick items.Length]
    let extents = Dictionary<string, int>()

    /// The extent of an axis name, the same throughout a graph.
    let rec extent (name: string) =
        match extents.TryGetValue name with
        | true, e -> e
        | false, _ ->
            let e =
                match name with
                // every rank scores all experts, whoever holds them: the router's own axis is never split
                | "router" -> extent "experts"
                | "batch"
                | "seq"
                | "heads"
                | "experts" -> oneOf [ 2; 1; 4; 3 ]
                | "gate_up" -> 2
                | "qk_dim"
                | "rope" -> oneOf [ 2; 4 ]
                | _other -> oneOf [ 2; 4; 1; 3; 6; 5 ]

            extents[name] <- e
            e

    let axis name = name, extent name
    let axes names = List.map axis names

    let fresh prefix =
        named <- named + 1
        $"%s{prefix}.%i{named}"

    let names value = List.ofArray (s.Type value).Names

    let param names = s.Param(fresh "w", axes names)

    let on op (inputs: int list) =
        computed <- computed + 1
        inputs |> List.iter (used.Add >> ignore)
        s.On(op, inputs)

    let scaled k x = on (Op.Scale k) [ x ]

    let contract (x: int) (w: int) =
        let a, b = names x, names w
        let both = a |> List.filter (fun n -> List.contains n b)

        let mark n = if List.contains n both then n + "+" else n

        let term names = String.concat " " (List.map mark names)

        let kept = (a @ b) |> List.filter (fun n -> not (List.contains n both)) |> String.concat " "

        scaled 0.6 (on (Op.Contract $"%s{term a}, %s{term b} -> %s{kept}") [ x; w ])

    /// A value in scope that has all these axes in this order, or a new parameter.
    let having (wanted: string list) =
        let found = values |> Seq.filter (fun v -> names v = wanted) |> List.ofSeq
        if found.IsEmpty then param wanted else oneOf found

    let any () = oneOf (List.ofSeq values)
    let tokens () = having [ "batch"; "seq"; "hidden" ]

    let table dim =
        let spec = {
            Dim = dim
            Theta = 100.0
            Factor = oneOf [ 1.0; 4.0 ]
            Original = 8.0
            BetaFast = 4.0
            BetaSlow = 0.5
            Mscale = 1.0
        }

        on (Op.RotaryTable spec) [ s.Iota("seq", extent "seq") ]

    let ids () = s.In(fresh "ids", DType.Int64, axes [ "batch"; "seq" ])

    let vocab () = s.Iota("vocab", extent "vocab")

    let unary () =
        let x = any ()

        match pick 9 with
        | 0 -> on Op.Silu [ x ]
        | 1 -> on Op.Sigmoid [ x ]
        | 2 -> on Op.Neg [ x ]
        | 3 -> on (Op.Scale -0.7) [ x ]
        | 4 -> on (Op.Offset 0.3) [ x ]
        | 5 -> on Op.Exp [ on Op.Sigmoid [ x ] ]
        | 6 -> on Op.Log [ on (Op.Offset 1.0) [ on Op.Sigmoid [ x ] ] ]
        | 7 -> on Op.Rsqrt [ on (Op.Offset 1.0) [ on Op.Sigmoid [ x ] ] ]
        | _ -> on (Op.Cast DType.Float32) [ on (Op.Cast DType.BFloat16) [ x ] ]

    let binary () =
        let x = any ()
        let have = names x

        let narrower =
            values |> Seq.filter (fun v -> names v |> List.forall (fun n -> List.contains n have)) |> List.ofSeq

        let y =
            match pick 3 with
            | 0 -> param (have |> List.filter (fun _ -> pick 2 = 0))
            | _ -> oneOf narrower

        match pick 4 with
        | 0 -> on Op.Add [ x; y ]
        | 1 -> on Op.Sub [ x; y ]
        | 2 -> on Op.Mul [ x; y ]
        | _ -> on Op.Div [ x; on (Op.Offset 1.0) [ on Op.Sigmoid [ y ] ] ]

    let linear () =
        let x = any ()

        match names x with
        | [] -> on Op.Mul [ x; x ]
        | have ->
            let inner = oneOf have

            match [ "ffn"; "hidden"; "heads"; "vocab" ] |> List.filter (fun n -> not (List.contains n have)) with
            | [] -> contract x (param [ inner ])
            | outer -> contract x (param [ oneOf outer; inner ])

    let movement () =
        let x = any ()
        let t = s.Type x
        let free = [ "copies"; "ffn"; "heads" ] |> List.filter (fun n -> t.IndexOf n < 0)

        match pick 7, t.Rank with
        | 0, _ when not free.IsEmpty && t.Rank < 4 ->
            let name, e = axis (oneOf free)
            on (Op.Broadcast({ Name = name; Extent = e }, pick (t.Rank + 1))) [ x ]
        | 1, rank when rank > 1 ->
            let turn = pick rank
            on (Op.Transpose [ for d in 0 .. rank - 1 -> (d + turn) % rank ]) [ x ]
        | 2, rank when rank > 0 ->
            let a = t.Axes[pick rank]
            let start = pick a.Extent
            let part = on (Op.Slice(a.Name, start, 1 + pick (a.Extent - start))) [ x ]
            on (Op.Pad(a.Name, start, a.Extent)) [ part ]
        | 3, rank when rank > 0 ->
            let a = t.Axes[pick rank]
            let twice = on (Op.Concat a.Name) [ x; x ]
            on (Op.Slice(a.Name, pick (a.Extent + 1), a.Extent)) [ twice ]
        | 4, _ -> on (Op.Anchor "residual") [ x ]
        | 5, _ -> on Op.Mul [ x; on Op.Detach [ x ] ]
        | _, _ -> on Op.Add [ x; x; x ]

    let reduction () =
        let x = any ()
        let gone = names x |> List.filter (fun _ -> pick 2 = 0)
        scaled 0.5 (on (Op.Sum gone) [ x ])

    let norm () =
        let x = any ()

        match names x with
        | [] -> on Op.Silu [ x ]
        | have -> on (Op.RmsNorm 0.1) [ x; param [ List.last have ] ]

    let gated () =
        let x = tokens ()
        on Op.SwiGlu [ contract x (param [ "gate_up"; "ffn"; "hidden" ]) ]

    let rope () =
        let x = contract (tokens ()) (param [ "heads"; "rope"; "hidden" ])
        on (Op.Rope(pick 2 = 1)) [ x; table (extent "rope") ]

    let attention () =
        let x = tokens ()

        let head width = contract x (param [ "heads"; width; "hidden" ])

        let q, k = head "qk_dim", head "qk_dim"
        let out = on (Op.Attention 0.7) [ q; k; head "v_dim" ]
        contract out (param [ "hidden"; "heads"; "v_dim" ])

    /// Router scores, top-k, dispatch, gated experts, combine.
    let experts () =
        let x = tokens ()
        let count = extent "experts"
        let logits = on (Op.Rename("router", "experts")) [ contract x (param [ "router"; "hidden" ]) ]
        let scores = on Op.Sigmoid [ logits ]
        let k = 1 + pick (min 2 count)

        let spec = {
            TopK = k
            Groups = 1
            KeepGroups = 1
            ZeroMasked = false
            GroupScore = GroupScore.BestTwo
        }

        let route = on (Op.Route(k, count)) [ on (Op.GroupTopK spec) [ on Op.Detach [ scores ] ] ]
        let gateUp = param [ "experts"; "gate_up"; "expert_ffn"; "hidden" ]
        let down = param [ "experts"; "hidden"; "expert_ffn" ]
        let fused = pick 2 = 1

        let rows, probs =
            if fused then
                computed <- computed + 1
                let both = s.All(Op.PermuteWithProbs, [ x; scores; route ])
                both[0], both[1]
            else
                on (Op.Permute false) [ x; route ], on Op.RouteProbs [ scores; route ]

        let wide = on (Op.GroupedMatMul false) [ rows; gateUp; route ]
        let act = on Op.SwiGluProbs [ wide; probs ]
        on (Op.Unpermute fused) [ on (Op.GroupedMatMul false) [ act; down; route ]; route ]

    let embedding () = on Op.Embedding [ ids (); param [ "vocab"; "hidden" ]; vocab () ]

    /// Log-sum-exp of logits minus the label's logit.
    let crossEntropy () =
        let logits = contract (tokens ()) (param [ "vocab"; "hidden" ])
        let top = on Op.Detach [ on (Op.Max [ "vocab" ]) [ on Op.Detach [ logits ] ] ]
        let shifted = on Op.Sub [ logits; top ]
        let total = on Op.Log [ on (Op.Sum [ "vocab" ]) [ on Op.Exp [ shifted ] ] ]
        on Op.Sub [ total; on Op.Pick [ shifted; ids (); vocab () ] ]

    /// A graph of about `nodes` computed nodes and the scalar output `loss`.
    member _.Grow() : Graph =
        let nodes = 1 + pick 12
        values.Add(param [ "batch"; "seq"; "hidden" ])

        while computed < nodes do
            let v =
                match pick 16 with
                | 0
                | 1 -> unary ()
                | 2
                | 3 -> binary ()
                | 4
                | 5 -> linear ()
                | 6
                | 7 -> movement ()
                | 8 -> reduction ()
                | 9 -> norm ()
                | 10 -> gated ()
                | 11 -> rope ()
                | 12 -> attention ()
                | 13 -> experts ()
                | 14 -> embedding ()
                | _ -> crossEntropy ()

            if not (values.Contains v) then
                values.Add v

        let leaves = values |> Seq.filter (fun v -> not (used.Contains v)) |> List.ofSeq

        s.Loss(if leaves.IsEmpty then [ values[values.Count - 1] ] else leaves)

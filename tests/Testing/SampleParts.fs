/// What the samples of ops are made of: axes, operands, and one function for each family.
namespace DeepSeekGraph.Testing

open DeepSeekGraph

/// A graph that uses the op and has the scalar output `loss`, which depends on parameters through the op.
type Sample = { Name: string; Graph: Graph }

module internal SampleParts =
    let sample name (build: Sketch -> Graph) = {
        Name = name
        Graph = build (Sketch())
    }

    let bs = [ "batch", 2; "seq", 3 ]
    let hidden = bs @ [ "hidden", 4 ]
    let experts = bs @ [ "experts", 4 ]

    /// One operand, one result; `shift` moves the operand to where the op is smooth.
    let unary op shift =
        [ "wide", hidden; "scalar", []; "of one element", [ "a", 1; "b", 1 ] ]
        |> List.map (fun (name, axes) ->
            sample name (fun s ->
                let x = s.On(Op.Offset shift, [ s.Param("x", axes) ])
                s.Loss [ s.On(op, [ x ]) ]))

    let rowsOf op =
        sample "of rows" (fun s ->
            let route = s.Route("scores", experts, 2)
            let rows = s.On(Op.Permute false, [ s.Param("x", hidden); route ])
            s.LossOfRows(route, [ s.On(op, [ rows ]) ]))

    /// Two operands: alike, the second narrower, the second in another axis order, rows.
    let binary op shift =
        let dense name second =
            sample name (fun s ->
                let x, y = s.Param("x", hidden), s.Param("y", second)
                s.Loss [ s.On(op, [ x; s.On(Op.Offset shift, [ y ]) ]) ])

        [
            dense "alike" hidden
            dense "second narrower" [ "hidden", 4 ]
            dense "second a scalar" []
            dense "second in another order" [ "hidden", 4; "batch", 2 ]
            sample "one value twice" (fun s ->
                let x = s.On(Op.Offset shift, [ s.Param("x", hidden) ])
                s.Loss [ s.On(op, [ x; x ]) ])
            sample "of rows" (fun s ->
                let route = s.Route("scores", experts, 2)
                let rows = s.On(Op.Permute false, [ s.Param("x", hidden); route ])

                let probs = s.On(Op.RouteProbs, [ s.On(Op.Offset shift, [ s.Param("p", experts) ]); route ])

                s.LossOfRows(route, [ s.On(op, [ rows; probs ]) ]))
        ]

    let onHidden name op = sample name (fun s -> s.Loss [ s.On(op, [ s.Param("x", hidden) ]) ])

    let contract name spec a b =
        sample name (fun s -> s.Loss [ s.On(Op.Contract spec, [ s.Param("a", a); s.Param("b", b) ]) ])

    let rotary dim factor = {
        Dim = dim
        Theta = 100.0
        Factor = factor
        Original = 8.0
        BetaFast = 4.0
        BetaSlow = 0.5
        Mscale = 1.1
    }

    let table (s: Sketch) axis extent dim factor = s.On(Op.RotaryTable(rotary dim factor), [ s.Iota(axis, extent) ])

    let heads = bs @ [ "heads", 2 ]

    let rope name inverse factor =
        sample name (fun s ->
            s.Loss [
                s.On(Op.Rope inverse, [ s.Param("x", bs @ [ "rope", 4 ]); table s "seq" 3 4 factor ])
            ])

    let ropeQ inverse =
        sample $"inverse %b{inverse}" (fun s ->
            s.Loss [
                s.On(Op.RopeQ inverse, [ s.Param("q", heads @ [ "qk_dim", 7 ]); table s "seq" 3 4 1.0 ])
            ])

    let ropeKv (used: int list) =
        sample $"results %A{used} used" (fun s ->
            let kv, pe = s.Param("kv", heads @ [ "kv_dim", 5 ]), s.Param("pe", bs @ [ "rope", 4 ])

            let results = s.All(Op.RopeKv 3, [ kv; pe; table s "seq" 3 4 1.0 ])
            s.Loss [ for i in used -> results[i] ])

    let queries = heads @ [ "qk_dim", 4 ]

    let attention name keyAxes =
        sample name (fun s ->
            let q, k, v = s.Param("q", queries), s.Param("k", keyAxes), s.Param("v", heads @ [ "v_dim", 3 ])

            s.Loss [ s.On(Op.Attention 0.5, [ q; k; v ]) ])

    let addNorm (used: int list) =
        sample $"results %A{used} used" (fun s ->
            let x, r, w = s.Param("x", hidden), s.Param("r", hidden), s.Param("w", [ "hidden", 4 ])
            let results = s.All(Op.AddRmsNorm 1e-2, [ x; r; w ])
            s.Loss [ for i in used -> results[i] ])

    let routerSpec normalize = {
        Score = ScoreFunction.Sigmoid
        Choice = {
            TopK = 2
            Groups = 3
            KeepGroups = 2
            ZeroMasked = false
            GroupScore = GroupScore.BestTwo
        }
        Normalize = normalize
        Eps = 1e-3
        Factor = 2.5
    }

    /// As DeepSeek-V2 chooses.
    let softmaxSpec normalize =
        let sigmoid = routerSpec normalize

        {
            sigmoid with
                Score = ScoreFunction.Softmax
                Choice = {
                    sigmoid.Choice with
                        GroupScore = GroupScore.Best
                }
        }

    /// Results 0 (weights) and 2 (counts) can join a loss.
    let router (spec: RouterSpec) (used: int list) =
        sample $"results %A{used} used, normalized %b{spec.Normalize}, %A{spec.Score}" (fun s ->
            let x, bias = s.Param("x", bs @ [ "experts", 6 ]), s.In("bias", DType.Float32, [ "experts", 6 ])
            let results = s.All(Op.Router spec, [ x; bias ])
            let y = s.Param("y", [ "experts", 6 ])

            let read i = if i = 0 then results[0] else s.On(Op.Cast DType.Float32, [ results[i] ])
            s.Loss(y :: List.map read used))

    let balance (used: int list) =
        sample $"results %A{used} used" (fun s ->
            let x, w = s.Param("x", experts), s.In("w", DType.Float32, bs)
            let results = s.All(Op.Balance(2, 1e-3), [ x; w ])
            s.Loss [ for i in used -> results[i] ])

    let topK name spec =
        sample name (fun s ->
            let p, scores = s.Param("p", bs @ [ "experts", 6 ]), s.Param("scores", bs @ [ "experts", 6 ])

            let mask = s.On(Op.GroupTopK spec, [ scores ])
            s.Loss [ s.On(Op.Mul, [ p; s.On(Op.Cast DType.Float32, [ mask ]) ]) ])

    let grouped transposed (bank: (string * int) list) width =
        sample $"bank of rank %i{bank.Length}, transposed %b{transposed}" (fun s ->
            let route = s.Route("scores", experts, 2)
            let x = s.On(Op.Permute false, [ s.Param("x", bs @ [ "hidden", width ]); route ])
            s.LossOfRows(route, [ s.On(Op.GroupedMatMul transposed, [ x; s.Param("w", bank); route ]) ]))

    /// Rows with two trailing axes: x[... gate_up, ffn].
    let gateUp (s: Sketch) route =
        let x = s.On(Op.Permute false, [ s.Param("x", hidden); route ])
        let bank = s.Param("w", [ "experts", 4; "gate_up", 2; "ffn", 3; "hidden", 4 ])
        s.On(Op.GroupedMatMul false, [ x; bank; route ])

    let withProbs (used: int list) =
        sample $"results %A{used} used" (fun s ->
            let route = s.Route("scores", experts, 2)
            let x, p = s.Param("x", hidden), s.Param("p", experts)
            let rows = s.All(Op.PermuteWithProbs, [ x; p; route ])
            s.LossOfRows(route, [ for i in used -> rows[i] ]))

    let backAgain (used: int list) =
        sample $"results %A{used} used" (fun s ->
            let route = s.Route("scores", experts, 2)
            let rows = s.On(Op.Permute false, [ s.Param("x", hidden); route ])
            let probs = s.On(Op.RouteProbs, [ s.Param("p", experts); route ])

            let results = s.All(Op.UnpermuteWithProbs, [ s.On(Op.Silu, [ rows ]); probs; route ])

            s.Loss [ for i in used -> results[i] ])

    /// A head of six ids in blocks.
    let head block (used: int list) =
        sample $"blocks of %i{block}, results %A{used} used" (fun s ->
            let h, w = s.Param("h", hidden), s.Param("w", [ "vocab", 6; "hidden", 4 ])
            let labels = s.In("labels", DType.Int64, bs)
            let results = s.All(Op.LinearLogSumExp block, [ h; w; labels; s.Iota("vocab", 6) ])
            s.Loss [ for i in used -> results[i] ])

    let ids (s: Sketch) name = s.In(name, DType.Int64, bs)

    /// Ops that only backward passes and partitions hold: a loss through them has no gradient.
    let through op (operands: Sketch -> int list) = sample "no gradient" (fun s -> s.Loss [ s.On(op, operands s) ])

    let moved kind =
        let op = Op.Collective(kind, [ 0 ], TensorType.create DType.Float32 hidden)

        {
            through op (fun s -> [ s.Param("x", hidden) ]) with
                Name = $"%A{kind}"
        }

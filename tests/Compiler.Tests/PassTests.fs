/// Every pass over logical graphs preserves the evaluator's result: precision, fusion, recompute.
module DeepSeekGraph.Compiler.Tests.PassTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Ops
open DeepSeekGraph.Reference
open DeepSeekGraph.Testing

let private joint (graph: Graph) =
    match Autodiff.differentiate "loss" graph with
    | Ok joint -> joint
    | Error wrong -> failtestf "%O" wrong.Head

/// Every output of both graphs, from the same inputs and parameters.
let private same (before: Graph) (after: Graph) =
    Expect.isEmpty (Verify.check after) "legal"
    let feed = Feed.lookup 5 before
    let expected, found = Evaluator.run before feed feed, Evaluator.run after feed feed
    Expect.containsAll found.OutputNames expected.OutputNames "outputs"

    for name in expected.OutputNames do
        let apart = Dense.distance (expected.Output name) (found.Output name)

        if not (apart < 1e-9) then
            failtestf "%s differs by %g" name apart

/// The graph keeps its results, and so do its gradients.
let private preserves (pass: Graph -> Graph) (graph: Graph) =
    let after = pass graph
    same graph after
    same (joint graph) (joint after)

let private fuse (graph: Graph) = fst (Fusion.Fuse.run graph)
let private bf16 = Precision.run DType.BFloat16
let private recompute = Recompute.run (Recompute.everywhere [ "core_attn" ])

let private table (s: Sketch) axis extent =
    let spec = {
        Dim = 4
        Theta = 100.0
        Factor = 1.0
        Original = 8.0
        BetaFast = 4.0
        BetaSlow = 0.5
        Mscale = 1.0
    }

    s.On(Op.RotaryTable spec, [ s.Iota(axis, extent) ])

/// Queries of latent attention, primitive by primitive.
let private queries (order: (string * int) list) (s: Sketch) =
    let q = s.Param("q", order @ [ Position.qkDim, 6 ])
    let nope = s.On(Op.Slice(Position.qkDim, 0, 2), [ q ])
    let pe = s.On(Op.Slice(Position.qkDim, 2, 4), [ q ])

    s.Loss [
        s.On(Op.Concat Position.qkDim, [ nope; s.On(Op.Rope false, [ pe; table s "seq" 3 ]) ])
    ]

/// Its keys and values; positions count along `axis`.
let private keys axis (s: Sketch) =
    let kv = s.Param("kv", [ "batch", 3; "seq", 3; "heads", 2; Position.kvDim, 5 ])
    let pe = s.Param("pe", [ "batch", 3; "seq", 3; Position.ropeDim, 4 ])
    let turned = s.On(Op.Rope false, [ pe; table s axis 3 ])

    let wide =
        s.On(
            Op.Broadcast({ Name = "heads"; Extent = 2 }, 2),
            [ s.On(Op.Rename(Position.ropeDim, Position.qkDim), [ turned ]) ]
        )

    let nope = s.On(Op.Rename(Position.kvDim, Position.qkDim), [ s.On(Op.Slice(Position.kvDim, 0, 3), [ kv ]) ])

    let v = s.On(Op.Rename(Position.kvDim, Position.vDim), [ s.On(Op.Slice(Position.kvDim, 3, 2), [ kv ]) ])

    s.Loss [ s.On(Op.Concat Position.qkDim, [ nope; wide ]); v ]

/// How often a rule is applied; the fused graph must compute the same.
let private fusedTimes name (build: Sketch -> Graph) =
    let graph = build (Sketch())
    preserves fuse graph
    Fusion.Fuse.run graph |> snd |> List.find (fun (rule, _) -> rule = name) |> snd

/// Two sums of the residual stream, each normed; `part` is the unit of the second norm.
let private norms part (s: Sketch) =
    let axes = [ "batch", 2; "seq", 3; "hidden", 4 ]
    let anchored name = s.On(Op.Anchor "residual", [ s.Param(name, axes) ])
    let norm name x = s.On(Op.RmsNorm 1e-3, [ x; s.Param(name, [ "hidden", 4 ]) ])
    let first = s.On(Op.Add, [ anchored "x"; anchored "y" ])
    let joins = s.On(Op.Anchor "residual", [ norm "w" first ])
    let second = s.On(Op.Add, [ first; joins ])
    s.Origin <- { s.Origin with Unit = part }
    s.Loss [ norm "v" second; second ]

/// exp(x - max) over its sum along the last axis.
let private softmax (s: Sketch) x =
    let shifted = s.On(Op.Sub, [ x; s.On(Op.Max [ "experts" ], [ s.On(Op.Detach, [ x ]) ]) ])
    let e = s.On(Op.Exp, [ shifted ])
    s.On(Op.Div, [ e; s.On(Op.Sum [ "experts" ], [ e ]) ])

/// What a router is declared with: its scores by `score`, counts that tokens of weight 0 are no part of, or no counts.
let private router score byBest counted (s: Sketch) =
    let axes = [ "batch", 2; "seq", 3; "experts", 6 ]
    let scores = score s (s.Param("x", axes))

    let choice = {
        TopK = 2
        Groups = 3
        KeepGroups = 2
        ZeroMasked = false
        GroupScore = if byBest then GroupScore.Best else GroupScore.BestTwo
    }

    let zero = s.On(Op.Constant(0.0, TensorType.create DType.Float32 [ "experts", 6 ]), [])
    let mask = s.On(Op.GroupTopK choice, [ s.On(Op.Add, [ scores; zero ]) ])
    let chosen = s.On(Op.Cast DType.Float32, [ mask ])

    if counted then
        let seen = s.On(Op.Mul, [ chosen; s.In("mask", DType.Float32, [ "batch", 2; "seq", 3 ]) ])
        let routed = s.On(Op.Cast DType.Bool, [ seen ])
        s.Output("count", s.On(Op.Sum [ "batch"; "seq" ], [ s.On(Op.Cast DType.Int64, [ routed ]) ]))

    s.Loss [ s.On(Op.Scale 16.0, [ s.On(Op.Mul, [ scores; chosen ]) ]) ]

/// What a router and its balance are declared with; `normalize` and `scale` are parts that a model may leave out.
let private routing normalize scale (s: Sketch) =
    let axes = [ "batch", 2; "seq", 3; "experts", 6 ]
    let scores = s.On(Op.Sigmoid, [ s.Param("x", axes) ])
    let biased = s.On(Op.Add, [ scores; s.In("bias", DType.Float32, [ "experts", 6 ]) ])

    let choice = {
        TopK = 2
        Groups = 3
        KeepGroups = 2
        ZeroMasked = false
        GroupScore = GroupScore.BestTwo
    }

    let mask = s.On(Op.GroupTopK choice, [ biased ])
    s.Output("count", s.On(Op.Sum [ "batch"; "seq" ], [ s.On(Op.Cast DType.Int64, [ mask ]) ]))
    let floored x = s.On(Op.Offset 1e-3, [ s.On(Op.Sum [ "experts" ], [ x ]) ])
    let raw = s.On(Op.Mul, [ scores; s.On(Op.Cast DType.Float32, [ mask ]) ])
    let shares = if normalize then s.On(Op.Div, [ raw; floored raw ]) else raw
    let probs = if scale then s.On(Op.Scale 2.5, [ shares ]) else shares

    let plain = {
        choice with
            Groups = 1
            KeepGroups = 1
    }

    let w = s.In("w", DType.Float32, [ "batch", 2; "seq", 3 ])
    let chosen = s.On(Op.Cast DType.Float32, [ s.On(Op.GroupTopK plain, [ scores ]) ])
    let summed x = s.On(Op.Sum [ "seq" ], [ s.On(Op.Mul, [ x; w ]) ])
    let share = s.On(Op.Div, [ scores; floored scores ])
    s.Loss [ probs; s.On(Op.Mul, [ summed chosen; summed share ]) ]

/// Cross-entropy of a linear head, as models declare it; `observe` names the logits as an output.
let private crossEntropy observe vocab (s: Sketch) =
    let h, w = s.Param("h", [ "batch", 2; "seq", 3; "hidden", 4 ]), s.Param("w", [ "vocab", vocab; "hidden", 4 ])
    let labels = s.In("labels", DType.Int64, [ "batch", 2; "seq", 3 ])
    let product = s.On(Op.Contract "batch seq hidden+, vocab hidden+ -> batch seq vocab", [ h; w ])
    let z = s.On(Op.Cast DType.Float32, [ s.On(Op.Anchor "logits", [ product ]) ])

    if observe then
        s.Output("logits", z)

    let shifted = s.On(Op.Sub, [ z; s.On(Op.Max [ "vocab" ], [ s.On(Op.Detach, [ z ]) ]) ])
    let sum = s.On(Op.Log, [ s.On(Op.Sum [ "vocab" ], [ s.On(Op.Exp, [ shifted ]) ]) ])

    s.Loss [
        s.On(Op.Sub, [ sum; s.On(Op.Pick, [ shifted; labels; s.Iota("vocab", vocab) ]) ])
    ]

let private splitVocabulary (graph: Graph) =
    fst (Fusion.Fuse.by (Fusion.Rules.under (fun axis -> axis = "vocab")) graph)

let private counts (isKind: Op -> bool) (graph: Graph) =
    graph.Nodes |> Array.filter (fun n -> isKind n.Op) |> Array.length

/// Losses [batch seq] of the states named by `heads` over one head; `build` makes the loss of them.
let private heads (names: string list) (build: Sketch -> int list -> int) =
    let s = Sketch()
    let w = s.Param("w", [ "vocab", 7; "hidden", 4 ])
    let tokens = [ "batch", 2; "seq", 3 ]

    let losses = [
        for name in names do
            let h, labels = s.Param(name, tokens @ [ "hidden", 4 ]), s.In($"%s{name}.labels", DType.Int64, tokens)
            s.On(Op.LinearCrossEntropy, [ h; w; labels; s.Iota("vocab", 7) ])
    ]

    joint (s.Loss [ build s losses ])

/// Losses that come from the op of their gradient, of the graph's `LinearCrossEntropy`s.
let private joined (graph: Graph) =
    let after = Fusion.Losses.run graph
    same graph after
    counts _.IsLinearCrossEntropy graph - counts _.IsLinearCrossEntropy after

let private losses =
    testList "losses" [
        testCase "a weighed loss comes from the op of its gradient, in the backward pass"
        <| fun () ->
            let graph =
                heads [ "h" ] (fun s l -> s.On(Op.Mul, [ l[0]; s.In("mask", DType.Float32, [ "batch", 2; "seq", 3 ]) ]))

            Expect.equal (joined graph) 1 "joined"
            let after = Fusion.Losses.run graph
            Expect.isFalse (after.NodeOf(after.Output "loss").Origin.Pass.IsForward) "the loss is made late"
            Expect.equal (Text.print (Fusion.Losses.run after)) (Text.print after) "twice changes nothing"
        testCase "so do two losses of one head"
        <| fun () -> Expect.equal (joined (heads [ "g"; "h" ] (fun s l -> s.On(Op.Add, l)))) 2 ""
        testCase "a cotangent that depends on the loss keeps them apart"
        <| fun () -> Expect.equal (joined (heads [ "h" ] (fun s l -> s.On(Op.Mul, [ l[0]; l[0] ])))) 0 ""
        testCase "so do two losses that weigh each other"
        <| fun () -> Expect.equal (joined (heads [ "g"; "h" ] (fun s l -> s.On(Op.Mul, l)))) 0 ""
        testCase "one of two is joined where only the other's cotangent depends on losses"
        <| fun () ->
            let graph = heads [ "g"; "h" ] (fun s l -> s.On(Op.Add, [ l[0]; s.On(Op.Mul, [ l[1]; l[1] ]) ]))
            Expect.equal (joined graph) 1 ""
        testCase "a loss that another unit reads stays in the forward pass"
        <| fun () ->
            let graph =
                heads [ "h" ] (fun s l ->
                    s.Origin <- {
                        s.Origin with
                            Unit = ModelUnit.Layer 3
                    }

                    s.On(Op.Scale 2.0, l))

            Expect.equal (joined graph) 0 ""
        testCase "bf16: the head's gradient is summed in fp32 and rounded once"
        <| fun () ->
            let graph = joint (fuse (bf16 (crossEntropy false 6 (Sketch()))))
            Expect.equal (joined graph) 1 "joined"
            let after = Fusion.Losses.run graph
            let gradient = after.NodeOf(after.Output "grad:w")
            Expect.equal gradient.Op (Op.Cast DType.BFloat16) "rounded"
            Expect.isTrue (after.NodeOf(gradient.Inputs[0]).Op.IsLinearCrossEntropyGrad) "once"
    ]

let private generators = [ typeof<Generators> ]

let tests =
    testList "Passes" [
        Properties.propertyOver
            generators
            "a fused graph computes what the graph computes, gradients too"
            (fun (r: RandomGraph) -> preserves fuse r.Graph)
        Properties.propertyOver
            generators
            "a bf16 graph is legal and, unrounded, computes the same"
            (fun (r: RandomGraph) -> preserves bf16 r.Graph)
        Properties.propertyOver generators "bf16, then fused, then recomputed" (fun (r: RandomGraph) ->
            same (joint r.Graph) (recompute (joint (fuse (bf16 r.Graph)))))
        Properties.propertyOver generators "fusing twice changes nothing" (fun (r: RandomGraph) ->
            let once = fuse r.Graph
            Expect.equal (Text.print (fuse once)) (Text.print once) "")
        testCase "recomputed attention is made again for the backward pass"
        <| fun () ->
            let s = Sketch()
            let x = s.Param("x", [ "batch", 2; "seq", 3; "heads", 2; "d", 4 ])
            let graph = joint (s.Loss [ s.On(Op.Attention 0.5, [ x; x; x ]) ])
            let after = recompute graph
            same graph after
            let attentions = after.Nodes |> Array.filter (fun n -> n.Op.IsAttention)
            Expect.equal (attentions |> Array.map _.Origin.Pass) [| Pass.Forward; Pass.Recompute |] ""
        testCase "rotated queries fuse"
        <| fun () -> Expect.equal (fusedTimes "mla_rope_q" (queries [ "batch", 2; "seq", 3; "heads", 2 ])) 1 ""
        testCase "queries whose second axis is not the sequence do not fuse, even of equal extents"
        <| fun () -> Expect.equal (fusedTimes "mla_rope_q" (queries [ "batch", 2; "heads", 3; "seq", 3 ])) 0 ""
        testCase "keys and values fuse"
        <| fun () -> Expect.equal (fusedTimes "mla_rope_kv" (keys "seq")) 1 ""
        testCase "keys rotated along another axis do not fuse, even of equal extents"
        <| fun () -> Expect.equal (fusedTimes "mla_rope_kv" (keys "batch")) 0 ""
        testCase "sums of the residual stream fuse with their norms, but not across units"
        <| fun () ->
            Expect.equal (fusedTimes "add_rms_norm" (norms (ModelUnit.Layer 0))) 2 "one unit"
            Expect.equal (fusedTimes "add_rms_norm" (norms (ModelUnit.Layer 1))) 1 "two units"
        testCase "a sum that may be partial does not fuse with its norm"
        <| fun () ->
            let build (s: Sketch) =
                let x, y = s.Param("x", [ "hidden", 4 ]), s.Param("y", [ "hidden", 4 ])

                s.Loss [
                    s.On(Op.RmsNorm 1e-3, [ s.On(Op.Add, [ x; y ]); s.Param("w", [ "hidden", 4 ]) ])
                ]

            Expect.equal (fusedTimes "add_rms_norm" build) 0 ""
        testCase "routers fuse, with normalised weights or not, with a factor or not; and so does their balance"
        <| fun () ->
            for normalize in [ true; false ] do
                for scale in [ true; false ] do
                    let what = $"normalize %b{normalize}, scale %b{scale}"
                    Expect.equal (fusedTimes "router" (routing normalize scale)) 1 what
                    Expect.equal (fusedTimes "balance" (routing normalize scale)) 1 what
        testCase "routers fuse by softmax as by sigmoid, where nobody counts, and where only some tokens are counted"
        <| fun () ->
            for name, score in
                [
                    "sigmoid", (fun (s: Sketch) x -> s.On(Op.Sigmoid, [ x ]))
                    "softmax", softmax
                ] do
                for byBest in [ true; false ] do
                    for counted in [ true; false ] do
                        let what = $"%s{name}, by best %b{byBest}, counted %b{counted}"
                        Expect.equal (fusedTimes "router" (router score byBest counted)) 1 what
        testCase "a head and its cross-entropy fuse, whatever the vocabulary, unless the logits are observed"
        <| fun () ->
            for vocab in [ 1; 6; 7; 193; 384 ] do
                Expect.equal (fusedTimes "linear_cross_entropy" (crossEntropy false vocab)) 1 $"%i{vocab} ids"

            Expect.equal (fusedTimes "linear_cross_entropy" (crossEntropy true 6)) 0 "observed"
        testCase "a split vocabulary fuses by blocks, a whole one by tokens"
        <| fun () ->
            for vocab in [ 1; 6; 7; 193; 384 ] do
                let graph = crossEntropy false vocab (Sketch())
                preserves splitVocabulary graph
                Expect.equal (counts _.IsLinearLogSumExp (splitVocabulary graph)) 1 $"split, %i{vocab} ids"
                Expect.equal (counts _.IsLinearCrossEntropy (fuse graph)) 1 $"whole, %i{vocab} ids"
        losses
        testCase "a result read before the fused op stands keeps its own op"
        <| fun () ->
            let times =
                fusedTimes "permute_with_probs" (fun s ->
                    let axes = [ "batch", 2; "seq", 3 ]
                    let route = s.Route("scores", axes @ [ "experts", 4 ], 2)
                    let rows = s.On(Op.Permute false, [ s.Param("x", axes @ [ "hidden", 4 ]); route ])
                    let back = s.On(Op.Unpermute false, [ rows; route ])

                    let scores =
                        s.On(
                            Op.Contract "b s k+, n k+ -> b s n",
                            [ back; s.Param("w", [ "experts", 4; "hidden", 4 ]) ]
                        )

                    let probs = s.On(Op.RouteProbs, [ scores; route ])
                    s.LossOfRows(route, [ s.On(Op.Mul, [ rows; probs ]) ]))

            Expect.equal times 0 ""
    ]

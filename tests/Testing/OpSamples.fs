/// Sample graphs of every op: a new op without samples does not compile.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Testing.OpSamples

open Microsoft.FSharp.Reflection
open DeepSeekGraph
open DeepSeekGraph.Testing.SampleParts

let samples (op: Op) : Sample list =
    match op with
    | Op.Parameter _ -> [
        sample "trained" (fun s -> s.Loss [ s.Param("x", hidden) ])
        sample "frozen" (fun s ->
            let spec = {
                Name = "f"
                Init = Init.Ones
                Update = Update.Frozen
                KeepFloat32 = true
            }

            let f = s.Source(Op.Parameter(spec, TensorType.create DType.Float32 hidden))
            s.Loss [ s.On(Op.Mul, [ s.Param("x", hidden); f ]) ])
        sample "used in two units" (fun s ->
            let x = s.Param("x", hidden)
            let y = s.On(Op.Silu, [ x ])

            s.Origin <- {
                s.Origin with
                    Unit = ModelUnit.Layer 1
            }

            s.Loss [ s.On(Op.Mul, [ x; y ]) ])
      ]
    | Op.Input _ -> [
        sample "float" (fun s -> s.Loss [ s.On(Op.Mul, [ s.Param("x", hidden); s.In("i", DType.Float32, hidden) ]) ])
      ]
    | Op.Cache _
    | Op.CacheWrite
    | Op.CacheAttention _ -> [
        sample "two new tokens of each sequence" (fun s ->
            let rows = [ "batch", 2; "seq", 2 ]
            let cache = s.Source(Op.Cache("kv", TensorType.create DType.Float32 [ "batch", 2; "cache", 5; "kv", 3 ]))
            let positions = s.In("positions", DType.Int64, rows)
            let fresh = s.Param("rows", rows @ [ "kv", 3 ])
            let written = s.On(Op.CacheWrite, [ cache; s.On(Op.Detach, [ fresh ]); positions ])
            let q = s.On(Op.Detach, [ s.Param("q", rows @ [ "heads", 2; "kv", 3 ]) ])
            let sum = s.On(Op.CacheAttention(0.5, 2), [ q; written; positions ])
            s.Loss [ s.On(Op.Mul, [ fresh; fresh ]); s.On(Op.Detach, [ sum ]) ])
      ]
    | Op.Constant _ -> [
        sample "float" (fun s ->
            let c = s.Source(Op.Constant(0.75, TensorType.create DType.Float32 [ "hidden", 4 ]))
            s.Loss [ s.On(Op.Mul, [ s.Param("x", hidden); c ]) ])
      ]
    | Op.Iota _ -> [
        sample "cast" (fun s ->
            let i = s.On(Op.Cast DType.Float32, [ s.Iota("hidden", 4) ])
            s.Loss [ s.On(Op.Mul, [ s.Param("x", hidden); i ]) ])
      ]
    | Op.Add ->
        sample "of three" (fun s ->
            let x = s.Param("x", hidden)
            s.Loss [ s.On(Op.Add, [ x; s.Param("y", [ "seq", 3 ]); x ]) ])
        :: binary Op.Add 0.0
    | Op.Sub -> binary Op.Sub 0.0
    | Op.Mul -> binary Op.Mul 0.0
    | Op.Div -> binary Op.Div 2.5
    | Op.Neg -> rowsOf Op.Neg :: unary Op.Neg 0.0
    | Op.Exp -> rowsOf Op.Exp :: unary Op.Exp 0.0
    | Op.Log -> unary Op.Log 2.0
    | Op.Rsqrt -> unary Op.Rsqrt 2.0
    | Op.Sigmoid -> rowsOf Op.Sigmoid :: unary Op.Sigmoid 0.0
    | Op.Silu -> rowsOf Op.Silu :: unary Op.Silu 0.0
    | Op.Scale _ -> unary (Op.Scale -1.5) 0.0
    | Op.Offset _ -> rowsOf (Op.Offset 0.5) :: unary (Op.Offset 0.5) 0.0
    | Op.Cast _ -> rowsOf (Op.Cast DType.BFloat16) :: unary (Op.Cast DType.BFloat16) 0.0
    | Op.Slice _ -> [
        onHidden "inner" (Op.Slice("seq", 1, 1))
        onHidden "whole" (Op.Slice("hidden", 0, 4))
        rowsOf (Op.Slice("hidden", 1, 2))
      ]
    | Op.Pad _ -> [
        onHidden "both sides" (Op.Pad("seq", 1, 6))
        onHidden "neither side" (Op.Pad("hidden", 0, 4))
        rowsOf (Op.Pad("hidden", 2, 7))
      ]
    | Op.Concat _ -> [
        sample "of three" (fun s ->
            let x, y = s.Param("x", hidden), s.Param("y", bs @ [ "hidden", 1 ])
            s.Loss [ s.On(Op.Concat "hidden", [ x; y; x ]) ])
        onHidden "of one" (Op.Concat "seq")
      ]
    | Op.Zigzag _ -> [
        for inverse in [ false; true ] do
            onHidden $"inverse %b{inverse}" (Op.Zigzag("hidden", 2, inverse))
            onHidden $"one rank, inverse %b{inverse}" (Op.Zigzag("hidden", 1, inverse))
      ]
    | Op.Broadcast _ -> [
        for d in 0..3 do
            onHidden $"at %i{d}" (Op.Broadcast({ Name = "n"; Extent = 3 }, d))
        rowsOf (Op.Broadcast({ Name = "n"; Extent = 2 }, 3))
      ]
    | Op.Rename _ -> [
        onHidden "one axis" (Op.Rename("seq", "t"))
        rowsOf (Op.Rename("hidden", "ffn"))
      ]
    | Op.Fp8Quantize _ -> [
        through (Op.Fp8Quantize [ 1; 2; 3 ]) (fun s -> [ s.Param("x", hidden) ])
        {
            through (Op.Fp8Quantize [ 2; 1; 1 ]) (fun s -> [ s.Param("x", hidden) ]) with
                Name = "no gradient, columns"
        }
      ]
    | Op.Transpose _ -> [
        onHidden "a cycle" (Op.Transpose [ 1; 2; 0 ])
        onHidden "a swap" (Op.Transpose [ 0; 2; 1 ])
        sample "rows stay in front" (fun s ->
            let route = s.Route("scores", experts, 2)
            s.LossOfRows(route, [ s.On(Op.Transpose [ 0; 1; 2; 4; 3 ], [ gateUp s route ]) ]))
      ]
    | Op.Anchor _ -> [ onHidden "identity" (Op.Anchor "residual"); rowsOf (Op.Anchor "rows") ]
    | Op.Detach -> [
        sample "half of a product" (fun s ->
            let x = s.Param("x", hidden)
            s.Loss [ s.On(Op.Mul, [ x; s.On(Op.Detach, [ s.On(Op.Exp, [ x ]) ]) ]) ])
      ]
    | Op.Contract _ -> [
        contract "linear" "b s k+, n k+ -> b s n" hidden [ "ffn", 3; "hidden", 4 ]
        contract "inner product" "k+, k+ -> " [ "k", 4 ] [ "k", 4 ]
        contract "outer product" "a, b -> b a" [ "a", 2 ] [ "b", 3 ]
        contract "batched" "b h d+, b h d+ t -> t b h" [ "b", 2; "h", 2; "d", 3 ] [ "b", 2; "h", 2; "d", 3; "t", 2 ]
        contract "over two axes" "b s+ k+, b s+ k+ n -> n b" [ "b", 2; "s", 2; "k", 3 ] [
            "b", 2
            "s", 2
            "k", 3
            "n", 2
        ]
        contract "leading dims" "... k+, n k+ -> ... n" hidden [ "ffn", 2; "hidden", 4 ]
        sample "with itself" (fun s ->
            let x = s.Param("x", hidden)
            s.Loss [ s.On(Op.Contract "b s+ h, b s+ h -> b h", [ x; x ]) ])
      ]
    | Op.GroupedMatMul _ -> [
        grouped false [ "experts", 4; "ffn", 3; "hidden", 4 ] 4
        grouped false [ "experts", 4; "gate_up", 2; "ffn", 3; "hidden", 4 ] 4
        grouped true [ "experts", 4; "hidden", 3; "ffn", 2 ] 3
        sample "transposed, two trailing axes" (fun s ->
            let route = s.Route("scores", experts, 2)
            let bank = s.Param("v", [ "experts", 4; "gate_up", 2; "ffn", 3; "out", 2 ])
            s.LossOfRows(route, [ s.On(Op.GroupedMatMul true, [ gateUp s route; bank; route ]) ]))
      ]
    | Op.GroupedWeightGrad -> [
        sample "no gradient" (fun s ->
            let route = s.Route("scores", experts, 2)
            let rows = s.On(Op.Permute false, [ s.Param("x", hidden); route ])
            let narrow = s.On(Op.Slice("hidden", 0, 2), [ rows ])
            let renamed = s.On(Op.Rename("hidden", "ffn"), [ narrow ])
            s.Loss [ s.On(Op.GroupedWeightGrad, [ renamed; rows; route ]) ])
      ]
    | Op.Sum _ -> [
        onHidden "of the middle" (Op.Sum [ "seq" ])
        onHidden "of two" (Op.Sum [ "hidden"; "batch" ])
        onHidden "of all" (Op.Sum [ "seq"; "batch"; "hidden" ])
        onHidden "of none" (Op.Sum [])
        rowsOf (Op.Sum [ "hidden" ])
      ]
    | Op.Max _ -> [ onHidden "no gradient" (Op.Max [ "hidden" ]) ]
    | Op.RmsNorm _ -> [
        sample "alike" (fun s ->
            s.Loss [
                s.On(Op.RmsNorm 1e-2, [ s.Param("x", hidden); s.Param("w", [ "hidden", 4 ]) ])
            ])
        sample "weight of another name" (fun s ->
            s.Loss [ s.On(Op.RmsNorm 1e-2, [ s.Param("x", hidden); s.Param("w", [ "norm", 4 ]) ]) ])
        sample "of one feature" (fun s ->
            s.Loss [
                s.On(Op.RmsNorm 1e-1, [ s.Param("x", [ "seq", 3; "h", 1 ]); s.Param("w", [ "h", 1 ]) ])
            ])
      ]
    | Op.RmsNormGradX _ -> [
        through (Op.RmsNormGradX 1e-2) (fun s -> [
            s.Param("dy", hidden)
            s.Param("x", hidden)
            s.Param("w", [ "hidden", 4 ])
        ])
      ]
    | Op.RmsNormGradW _ -> [
        through (Op.RmsNormGradW 1e-2) (fun s -> [ s.Param("dy", hidden); s.Param("x", hidden) ])
      ]
    | Op.AddRmsNorm _ -> [ addNorm [ 0; 1 ]; addNorm [ 0 ]; addNorm [ 1 ] ]
    | Op.RmsNormGradXAdd _ -> [
        through (Op.RmsNormGradXAdd 1e-2) (fun s -> [
            s.Param("dy", hidden)
            s.Param("x", hidden)
            s.Param("w", [ "hidden", 4 ])
            s.Param("c", hidden)
        ])
      ]
    | Op.RotaryTable _ -> [ rope "plain" false 1.0; rope "YaRN" false 4.0 ]
    | Op.Rope _ -> [
        rope "forward" false 4.0
        rope "inverse" true 1.0
        sample "positions of each sequence" (fun s ->
            let angles = s.On(Op.RotaryTable(rotary 4 1.0), [ s.In("positions", DType.Int64, bs) ])

            s.Loss [
                s.On(Op.Rope false, [ s.Param("x", bs @ [ "heads", 2; "rope", 4 ]); angles ])
            ])
        sample "position not second" (fun s ->
            let x = s.Param("x", [ "seq", 3; "batch", 2; "heads", 2; "rope", 4 ])
            s.Loss [ s.On(Op.Rope false, [ x; table s "seq" 3 4 1.0 ]) ])
      ]
    | Op.RopeQ _ -> [ ropeQ false; ropeQ true ]
    | Op.RopeKv _ -> [ ropeKv [ 0; 1 ]; ropeKv [ 0 ]; ropeKv [ 1 ] ]
    | Op.RopeKvGrad _ -> [
        through (Op.RopeKvGrad 3) (fun s -> [
            s.Param("dk", heads @ [ "qk_dim", 7 ])
            s.Param("dv", heads @ [ "v_dim", 2 ])
            table s "seq" 3 4 1.0
        ])
      ]
    | Op.Attention _ -> [
        attention "alike" queries
        attention "keys of other names" [ "batch", 2; "key_seq", 3; "heads", 2; "key_dim", 4 ]
        sample "one value thrice" (fun s ->
            let x = s.Param("x", queries)
            s.Loss [ s.On(Op.Attention 0.5, [ x; x; x ]) ])
        sample "queries in zigzag order" (fun s ->
            let wide (last: string) n = [ "batch", 2; "seq", 4; "heads", 2; last, n ]
            let q = s.On(Op.Zigzag("seq", 2, false), [ s.Param("q", wide "qk_dim" 3) ])
            let positions = s.On(Op.Zigzag("seq", 2, false), [ s.Iota("seq", 4) ])

            s.Loss [
                s.On(Op.Attention 0.5, [ q; s.Param("k", wide "qk_dim" 3); s.Param("v", wide "v_dim" 2); positions ])
            ])
      ]
    | Op.AttentionGrad _ -> [
        through (Op.AttentionGrad 0.5) (fun s -> [
            for name in [ "dout"; "q"; "k"; "v"; "out" ] do
                s.Param(name, queries)
            s.Param("lse", [ "batch", 2; "heads", 2; "seq", 3 ])
        ])
      ]
    | Op.GroupTopK _ -> [
        topK "one group" {
            TopK = 2
            Groups = 1
            KeepGroups = 1
            ZeroMasked = false
            GroupScore = GroupScore.BestTwo
        }
        topK "two of three groups" {
            TopK = 2
            Groups = 3
            KeepGroups = 2
            ZeroMasked = false
            GroupScore = GroupScore.BestTwo
        }
        topK "unselected groups score zero" {
            TopK = 2
            Groups = 3
            KeepGroups = 1
            ZeroMasked = true
            GroupScore = GroupScore.BestTwo
        }
        topK "two of three groups, by the best of each" {
            TopK = 2
            Groups = 3
            KeepGroups = 2
            ZeroMasked = false
            GroupScore = GroupScore.Best
        }
      ]
    | Op.Router _ -> [
        router (routerSpec true) [ 0; 2 ]
        router (routerSpec false) [ 0 ]
        router (routerSpec true) [ 2 ]
        router (softmaxSpec true) [ 0; 2 ]
        router (softmaxSpec false) [ 0 ]
      ]
    | Op.RouterGrad _ -> [
        for name, spec in [ "sigmoid", routerSpec true; "softmax", softmaxSpec false ] do
            {
                through (Op.RouterGrad spec) (fun s -> [
                    s.Param("dp", bs @ [ "experts", 6 ])
                    s.Param("x", bs @ [ "experts", 6 ])
                    s.In("mask", DType.Bool, bs @ [ "experts", 6 ])
                ]) with
                    Name = $"no gradient, %s{name}"
            }
      ]
    | Op.Balance _ -> [ balance [ 0; 1 ]; balance [ 0 ]; balance [ 1 ] ]
    | Op.BalanceGrad _ -> [
        through (Op.BalanceGrad 1e-3) (fun s -> [
            s.Param("d", [ "batch", 2; "experts", 4 ])
            s.Param("x", experts)
            s.Param("w", bs)
        ])
      ]
    | Op.Route _
    | Op.RouteProbs
    | Op.UnrouteProbs -> [
        sample "there and back" (fun s ->
            let route = s.Route("scores", experts, 2)
            let probs = s.On(Op.RouteProbs, [ s.Param("p", experts); route ])
            s.Loss [ s.On(Op.UnrouteProbs, [ s.On(Op.Silu, [ probs ]); route ]) ])
      ]
    | Op.Permute _
    | Op.Unpermute _ -> [
        for fused in [ false; true ] do
            for k in [ 1; 2; 4 ] do
                sample $"top-%i{k}, fused %b{fused}" (fun s ->
                    let route = s.Route("scores", experts, k)
                    let rows = s.On(Op.Permute fused, [ s.Param("x", hidden); route ])
                    s.Loss [ s.On(Op.Unpermute fused, [ s.On(Op.Exp, [ rows ]); route ]) ])
      ]
    | Op.PermuteWithProbs -> [ withProbs [ 0; 1 ]; withProbs [ 0 ]; withProbs [ 1 ] ]
    | Op.UnpermuteWithProbs -> [ backAgain [ 0; 1 ]; backAgain [ 0 ]; backAgain [ 1 ] ]
    | Op.SwiGlu -> [
        sample "dense" (fun s -> s.Loss [ s.On(Op.SwiGlu, [ s.Param("x", bs @ [ "gate_up", 2; "ffn", 3 ]) ]) ])
        sample "of rows" (fun s ->
            let route = s.Route("scores", experts, 2)
            s.LossOfRows(route, [ s.On(Op.SwiGlu, [ gateUp s route ]) ]))
      ]
    | Op.SwiGluGrad -> [
        through Op.SwiGluGrad (fun s -> [
            s.Param("dy", bs @ [ "ffn", 3 ])
            s.Param("x", bs @ [ "gate_up", 2; "ffn", 3 ])
        ])
      ]
    | Op.SwiGluProbs -> [
        sample "dense" (fun s ->
            s.Loss [
                s.On(Op.SwiGluProbs, [ s.Param("x", bs @ [ "gate_up", 2; "ffn", 3 ]); s.Param("p", bs) ])
            ])
        sample "of rows" (fun s ->
            let route = s.Route("scores", experts, 2)
            let probs = s.On(Op.RouteProbs, [ s.Param("p", experts); route ])
            s.LossOfRows(route, [ s.On(Op.SwiGluProbs, [ gateUp s route; probs ]) ]))
      ]
    | Op.SwiGluProbsGrad -> [
        through Op.SwiGluProbsGrad (fun s -> [
            s.Param("dy", bs @ [ "ffn", 3 ])
            s.Param("x", bs @ [ "gate_up", 2; "ffn", 3 ])
            s.Param("p", bs)
        ])
      ]
    | Op.Embedding -> [
        sample "all ids" (fun s ->
            let w = s.Param("w", [ "vocab", 5; "hidden", 4 ])
            s.Loss [ s.On(Op.Embedding, [ ids s "ids"; w; s.Iota("vocab", 5) ]) ])
        sample "ids beyond the list" (fun s ->
            let w, few =
                s.Param("w", [ "vocab", 2; "hidden", 4 ]), s.On(Op.Slice("vocab", 1, 2), [ s.Iota("vocab", 5) ])

            s.Loss [ s.On(Op.Embedding, [ ids s "ids"; w; few ]) ])
      ]
    | Op.EmbeddingGrad -> [
        through Op.EmbeddingGrad (fun s -> [ ids s "ids"; s.Param("dy", hidden); s.Iota("vocab", 5) ])
      ]
    | Op.Pick -> [
        sample "all ids" (fun s ->
            let z = s.Param("z", bs @ [ "vocab", 5 ])
            s.Loss [ s.On(Op.Pick, [ z; ids s "labels"; s.Iota("vocab", 5) ]) ])
      ]
    | Op.PickGrad -> [
        sample "all ids" (fun s ->
            s.Loss [ s.On(Op.PickGrad, [ s.Param("dy", bs); ids s "labels"; s.Iota("vocab", 5) ]) ])
      ]
    | Op.LinearLogSumExp _ -> [ head 6 [ 0; 1 ]; head 2 [ 0; 1 ]; head 1 [ 0 ]; head 3 [ 1 ] ]
    | Op.LinearLogSumExpGrad _ -> [
        through (Op.LinearLogSumExpGrad 3) (fun s -> [
            s.Param("h", hidden)
            s.Param("w", [ "vocab", 6; "hidden", 4 ])
            ids s "labels"
            s.Iota("vocab", 6)
            s.Param("lse", bs @ [ "blocks", 2 ])
            s.Param("dlse", bs @ [ "blocks", 2 ])
            s.Param("dat", bs)
        ])
      ]
    | Op.LinearCrossEntropy -> [
        sample "all ids" (fun s ->
            let h, w = s.Param("h", hidden), s.Param("w", [ "vocab", 6; "hidden", 4 ])
            let loss = s.On(Op.LinearCrossEntropy, [ h; w; ids s "labels"; s.Iota("vocab", 6) ])
            s.Loss [ s.On(Op.Mul, [ loss; s.Param("mask", bs) ]) ])
        sample "one id" (fun s ->
            let h, w = s.Param("h", hidden), s.Param("w", [ "vocab", 1; "hidden", 4 ])
            s.Loss [ s.On(Op.LinearCrossEntropy, [ h; w; ids s "labels"; s.Iota("vocab", 1) ]) ])
      ]
    | Op.LinearCrossEntropyGrad -> [
        through Op.LinearCrossEntropyGrad (fun s -> [
            s.Param("h", hidden)
            s.Param("w", [ "vocab", 6; "hidden", 4 ])
            ids s "labels"
            s.Iota("vocab", 6)
            s.Param("dloss", bs)
        ])
      ]
    | Op.Collective _ -> [
        moved Collective.AllReduceSum
        moved Collective.AllReduceMax
        moved (Collective.AllGather 1)
        moved (Collective.ReduceScatter 0)
        moved (Collective.AllToAll(0, 1))
        moved Collective.RouteToExperts
        moved Collective.RowsToExperts
        moved Collective.RowsToTokens
        moved (Collective.Dispatch 8)
        moved (Collective.Combine 4)
        moved (Collective.Send 1)
        moved (Collective.Recv 0)
      ]
    | Op.LocalSlice _ -> [
        through (Op.LocalSlice(0, [ 0 ], TensorType.create DType.Float32 hidden)) (fun s -> [ s.Param("x", hidden) ])
      ]

/// Every case of Op with its samples; a case is made with blank attributes, at which `samples` does not look.
let all: (string * Sample list)[] =
    let blank (field: System.Reflection.PropertyInfo) : obj | null =
        if field.PropertyType.IsValueType then
            System.Activator.CreateInstance field.PropertyType
        else
            null

    FSharpType.GetUnionCases typeof<Op>
    |> Array.map (fun case ->
        match FSharpValue.MakeUnion(case, case.GetFields() |> Array.map blank) with
        | :? Op as op -> case.Name, samples op
        | _ -> invalidOp $"%s{case.Name} is no case of Op")

/// Case of an op, such as RmsNorm.
let caseOf (op: Op) = (fst (FSharpValue.GetUnionFields(op, typeof<Op>))).Name

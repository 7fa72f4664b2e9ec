/// Adding nodes: shared when equal, refused with both values named when illegal.
module DeepSeekGraph.Graph.Tests.BuilderTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Testing

let private x = [ "batch", 2; "seq", 3; "hidden", 4 ]

/// What adding says; parts that the text must contain.
let private refuses name (build: Sketch -> Op * int list) (parts: string list) =
    testCase name (fun () ->
        let s = Sketch()

        match s.TryAll(build s) with
        | Ok _ -> failtest "accepted"
        | Error text ->
            for part in parts do
                Expect.stringContains text part "the message")

let tests =
    testList "Builder" [
        testCase "equal nodes are one node" (fun () ->
            let s = Sketch()
            let p = s.Param("p", x)
            Expect.equal (s.On(Op.Silu, [ p ])) (s.On(Op.Silu, [ p ])) ""
            Expect.notEqual (s.On(Op.Silu, [ p ])) (s.On(Op.Neg, [ p ])) "")
        testCase "a forward node never stands for a backward one, but serves it" (fun () ->
            let s = Sketch()
            let p = s.Param("p", x)
            let backward = { s.Origin with Pass = Pass.Backward }
            let late = s.Builder.Add(Op.Neg, [ p ], backward)[0]
            Expect.notEqual (s.On(Op.Neg, [ p ])) late "backward came first"
            let early = s.On(Op.Silu, [ p ])
            Expect.equal (s.Builder.Add(Op.Silu, [ p ], backward)[0]) early "forward came first")
        refuses "extents" (fun s -> Op.Add, [ s.Param("a", x); s.Param("b", [ "hidden", 5 ]) ]) [ "hidden"; "4"; "5" ]
        refuses "unknown axis" (fun s -> Op.Mul, [ s.Param("a", x); s.Param("b", [ "ffn", 4 ]) ]) [ "ffn"; "hidden 4" ]
        refuses "element types" (fun s -> Op.Add, [ s.Param("a", x); s.In("b", DType.BFloat16, x) ]) [ "fp32"; "bf16" ]
        refuses "arity" (fun s -> Op.Sub, [ s.Param("a", x) ]) [ "2 inputs"; "not 1" ]
        refuses "no operands" (fun _ -> Op.Add, []) [ "at least one" ]
        refuses "missing axis of a sum" (fun s -> Op.Sum [ "ffn" ], [ s.Param("a", x) ]) [ "ffn"; "batch 2" ]
        refuses "slice beyond the end" (fun s -> Op.Slice("seq", 2, 2), [ s.Param("a", x) ]) [ "[2, 4)"; "seq"; "3" ]
        refuses "slice whose end overflows" (fun s -> Op.Slice("seq", System.Int32.MaxValue, 1), [ s.Param("a", x) ]) [
            "seq"
        ]
        refuses "pad that does not fit" (fun s -> Op.Pad("seq", 2, 4), [ s.Param("a", x) ]) [ "3"; "seq"; "4" ]
        refuses "concat of unlike" (fun s -> Op.Concat "seq", [ s.Param("a", x); s.Param("b", [ "seq", 3 ]) ]) [
            "input 1"
            "fp32[seq 3]"
        ]
        refuses "an axis twice" (fun s -> Op.Rename("seq", "batch"), [ s.Param("a", x) ]) [ "batch"; "twice" ]
        refuses "no permutation" (fun s -> Op.Transpose [ 0; 0; 1 ], [ s.Param("a", x) ]) [ "[0; 0; 1]" ]
        refuses "an empty axis" (fun s -> Op.Broadcast({ Name = "n"; Extent = 0 }, 0), [ s.Param("a", x) ]) [
            "'n'"
            "0"
        ]
        refuses
            "lonely contracted letter"
            (fun s -> Op.Contract "b s k+, n -> b s n", [ s.Param("a", x); s.Param("b", [ "ffn", 4 ]) ])
            [ "'k'" ]
        refuses
            "letter from nowhere"
            (fun s ->
                Op.Contract "b s k+, n k+ -> b s n z", [ s.Param("a", x); s.Param("b", [ "ffn", 2; "hidden", 4 ]) ])
            [ "'z'" ]
        refuses
            "letter twice in a term"
            (fun s -> Op.Contract "b b k+, n k+ -> b n", [ s.Param("a", x); s.Param("b", [ "ffn", 2; "hidden", 4 ]) ])
            [ "'b'" ]
        refuses
            "a mask is no row set"
            (fun s ->
                Op.Permute false,
                [
                    s.Param("a", x)
                    s.In("m", DType.Bool, [ "batch", 2; "seq", 3; "experts", 4 ])
                ])
            [ "input 1"; "must be rows" ]
        refuses
            "rows and dense values do not mix"
            (fun s ->
                let route = s.Route("scores", [ "batch", 2; "seq", 3; "experts", 4 ], 2)
                let rows = s.On(Op.Permute false, [ s.Param("a", x); route ])
                Op.Add, [ rows; s.Param("b", [ "hidden", 4 ]) ])
            [ "rows" ]
        refuses
            "more experts a token than there are"
            (fun s -> Op.Route(5, 4), [ s.In("m", DType.Bool, [ "batch", 2; "seq", 3; "experts", 4 ]) ])
            [ "5"; "4 experts" ]
        refuses
            "experts that do not fall into groups"
            (fun s ->
                let scores = s.In("m", DType.Float32, [ "batch", 2; "seq", 3; "experts", 4 ])

                Op.GroupTopK {
                    TopK = 1
                    Groups = 3
                    KeepGroups = 1
                    ZeroMasked = false
                    GroupScore = GroupScore.BestTwo
                },
                [ scores ])
            [ "4"; "3 groups" ]
        refuses
            "fewer keys than queries"
            (fun s ->
                let head name seq = s.Param(name, [ "batch", 2; "seq", seq; "heads", 1; "d", 2 ])

                Op.Attention 1.0, [ head "q" 3; head "k" 2; head "v" 2 ])
            [ "3 queries"; "2 keys" ]
        refuses
            "ids that are no integers"
            (fun s ->
                Op.Embedding,
                [
                    s.In("ids", DType.Float32, [ "batch", 2; "seq", 3 ])
                    s.Param("w", [ "vocab", 4; "h", 2 ])
                    s.Iota("vocab", 4)
                ])
            [ "input 0"; "integers" ]
        refuses "gate and up make two" (fun s -> Op.SwiGlu, [ s.Param("a", x) ]) [ "seq"; "3" ]
        refuses
            "a table of another sequence"
            (fun s ->
                let spec = {
                    Dim = 4
                    Theta = 1e4
                    Factor = 1.0
                    Original = 8.0
                    BetaFast = 32.0
                    BetaSlow = 1.0
                    Mscale = 1.0
                }

                let table = s.On(Op.RotaryTable spec, [ s.Iota("seq", 5) ])
                Op.Rope false, [ s.Param("a", x); table ])
            [ "seq"; "3"; "5" ]
    ]

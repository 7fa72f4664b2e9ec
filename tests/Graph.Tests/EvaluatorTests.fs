/// The evaluator against published numbers and hand-made examples: what all other laws rest on.
module DeepSeekGraph.Graph.Tests.EvaluatorTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Reference
open DeepSeekGraph.Testing

let private deepSeek = {
    Dim = 64
    Theta = 1e4
    Factor = 40.0
    Original = 4096.0
    BetaFast = 32.0
    BetaSlow = 1.0
    Mscale = 1.0
}

let private top spec scores = (Formulas.groupTopK spec (Dense.ofList scores)).Data |> List.ofArray

let private close (expected: float list) (actual: DenseTensor) =
    for e, a in List.zip expected (List.ofArray actual.Data) do
        Expect.floatClose Accuracy.high a e ""

let private sizes = [| 2; 3 |]

let private layouts =
    let states = [
        AxisState.Replicated
        AxisState.Split 0
        AxisState.Split 1
        AxisState.PartialSum
    ]

    [ for a, b in List.allPairs states states -> [| a; b |] ]

let tests =
    testList "Evaluator" [
        testCase "YaRN's inverse frequencies are those of DeepSeek-V3" (fun () ->
            let found = Formulas.inverseFrequencies deepSeek

            for i, expected in
                [
                    0, 1.0
                    9, 0.0749894
                    10, 0.0562341
                    11, 0.0390069
                    16, 0.0055
                    22, 1.77828e-4
                    23, 3.33380e-5
                    31, 3.33380e-6
                ] do
                Expect.floatClose { absolute = 0.0; relative = 1e-5 } found[i] expected $"frequency %i{i}")
        testCase "factor 1 is plain rotary embedding" (fun () ->
            let found = Formulas.inverseFrequencies { deepSeek with Factor = 1.0 }
            Expect.floatClose Accuracy.high found[16] 0.01 "")
        testCase "the table is cos, then sin" (fun () ->
            let table =
                Formulas.rotaryTable
                    {
                        deepSeek with
                            Dim = 2
                            Factor = 1.0
                            Mscale = 2.0
                    }
                    (Dense.ofList [ 0.0; 3.0 ])

            close [ 2.0; 0.0; 2.0 * cos 3.0; 2.0 * sin 3.0 ] table)
        testCase "rotation turns pairs, and back" (fun () ->
            let table = Formulas.rotaryTable { deepSeek with Dim = 2; Factor = 1.0 } (Dense.ofList [ 1.0 ])

            let x = {
                Extents = [| 1; 2 |]
                Data = [| 1.0; 0.0 |]
            }

            let y = Formulas.rope false 0 x table
            close [ cos 1.0; sin 1.0 ] y
            close [ 1.0; 0.0 ] (Formulas.rope true 0 y table))
        testCase "top-k: of equal scores the lower index wins" (fun () ->
            let spec = {
                TopK = 2
                Groups = 1
                KeepGroups = 1
                ZeroMasked = false
                GroupScore = GroupScore.BestTwo
            }

            Expect.equal (top spec [ 0.5; 0.5; 0.1; 0.5 ]) [ 1.0; 1.0; 0.0; 0.0 ] "")
        testCase "top-k: a group counts by the sum of its two best, or by its best" (fun () ->
            let spec = {
                TopK = 2
                Groups = 2
                KeepGroups = 1
                ZeroMasked = false
                GroupScore = GroupScore.BestTwo
            }

            let scores = [ 0.9; 0.0; 0.0; 0.5; 0.5; 0.4 ]
            Expect.equal (top spec scores) [ 0.0; 0.0; 0.0; 1.0; 1.0; 0.0 ] "sum of two"

            let byBest = {
                spec with
                    GroupScore = GroupScore.Best
            }

            Expect.equal (top byBest scores) [ 1.0; 1.0; 0.0; 0.0; 0.0; 0.0 ] "best")
        testCase "top-k: lost groups score zero only when asked" (fun () ->
            let scores = [ -0.1; -0.2; -0.3; -0.4 ]

            let spec = {
                TopK = 2
                Groups = 2
                KeepGroups = 1
                ZeroMasked = false
                GroupScore = GroupScore.BestTwo
            }

            Expect.equal (top spec scores) [ 1.0; 1.0; 0.0; 0.0 ] "minus infinity"
            Expect.equal (top { spec with ZeroMasked = true } scores) [ 0.0; 0.0; 1.0; 1.0 ] "zero")
        testCase "attention: the first query sees the first key only" (fun () ->
            let at n values = {
                Extents = [| 1; n; 1; 1 |]
                Data = Array.ofList values
            }

            let results = Formulas.attention 1.0 (at 2 [ 1.0; 0.0 ]) (at 2 [ 2.0; 5.0 ]) (at 2 [ 3.0; 7.0 ]) None

            close [ 3.0; 5.0 ] results[0]
            close [ 2.0; log 2.0 ] results[1])
        testCase "contract, sum and max by example" (fun () ->
            let s = Sketch()
            let a, b = s.Param("a", [ "m", 2; "k", 2 ]), s.Param("b", [ "n", 2; "k", 2 ])
            s.Output("ab", s.On(Op.Contract "m k+, n k+ -> m n", [ a; b ]))
            s.Output("max", s.On(Op.Max [ "m" ], [ a ]))
            s.Output("sum", s.On(Op.Sum [ "k" ], [ a ]))

            let square values = {
                Extents = [| 2; 2 |]
                Data = Array.ofList values
            }

            let given name = if name = "a" then square [ 1.0; 2.0; 3.0; 4.0 ] else square [ 5.0; 6.0; 7.0; 8.0 ]

            let run = Evaluator.run (s.ToGraph()) given given
            close [ 17.0; 23.0; 39.0; 53.0 ] (run.Output "ab")
            close [ 3.0; 4.0 ] (run.Output "max")
            close [ 3.0; 7.0 ] (run.Output "sum"))
        testCase "rows are zero where nothing is routed, whatever the op" (fun () ->
            let s = Sketch()
            let route = s.Route("scores", [ "batch", 1; "seq", 2; "experts", 4 ], 1)

            let rows = s.On(Op.RouteProbs, [ s.Param("p", [ "batch", 1; "seq", 2; "experts", 4 ]); route ])

            s.Output("exp", s.On(Op.Exp, [ rows ]))
            let graph = s.ToGraph()
            let feed = Feed.lookup 1 graph
            let found = (Evaluator.run graph feed feed).Output "exp"
            Expect.equal (found.Data |> Array.filter ((<>) 0.0) |> Array.length) 2 "one a token")
        testList "shards of every layout assemble to the whole" [
            for layout in layouts do
                testCase $"%A{layout}" (fun () ->
                    let whole = Dense.init [| 6; 6 |] (fun i -> float (10 * i[0] + i[1]))

                    let shards =
                        Array.init (Shard.ranks sizes) (fun r ->
                            Shard.shard layout sizes (Shard.coordinates sizes r) whole)

                    Expect.equal (Shard.assemble layout sizes shards) whole "")
        ]
        testCase "copies that should agree but do not are noticed" (fun () ->
            let shards = Array.init 6 (fun r -> Dense.scalar (float r))

            Expect.throwsT<System.InvalidOperationException>
                (fun () -> Shard.assemble [| AxisState.Replicated; AxisState.PartialSum |] sizes shards |> ignore)
                "")
        testCase "the slower mesh axis is major" (fun () ->
            let whole = Dense.init [| 6 |] (fun i -> float i[0])
            let layout = [| AxisState.Split 0; AxisState.Split 0 |]

            let at c = (Shard.shard layout sizes c whole).Data[0]

            Expect.equal [ at [| 1; 0 |]; at [| 0; 1 |] ] [ 1.0; 2.0 ] "")
    ]

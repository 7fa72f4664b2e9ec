/// The generators themselves: graphs are legal, shrunk ones smaller and legal.
module DeepSeekGraph.Graph.Tests.GenTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Testing

let private generators = [ typeof<Generators> ]

let tests =
    testList "Generators" [
        Properties.propertyOver generators "a random graph is legal and has a scalar loss" (fun (random: RandomGraph) ->
            Expect.isEmpty (Verify.check random.Graph) ""
            Expect.equal random.Graph.Types[random.Graph.Output "loss"].Rank 0 "")
        Properties.propertyOver generators "a shrunk graph is legal and smaller" (fun (random: RandomGraph) ->
            for smaller in Shrink.graph random.Graph |> Seq.truncate 8 do
                Expect.isEmpty (Verify.check smaller) ""
                Expect.isLessThan (Shrink.size smaller) (Shrink.size random.Graph) ""
                Expect.isTrue (smaller.TryOutput "loss").IsSome "")
        testCase "graphs shrink to one node" (fun () ->
            let rec smallest graph =
                match Seq.tryHead (Shrink.graph graph) with
                | Some smaller -> smallest smaller
                | None -> graph

            let start = Grow.graph (Array.init 160 (fun i -> i * 7919))
            Expect.isLessThan (fst (Shrink.size (smallest start))) 3 "")
        testCase "random graphs use nearly every op of models" (fun () ->
            let random = System.Random 5

            let used =
                Seq.init 400 (fun _ -> Grow.graph (Array.init 160 (fun _ -> random.Next(1 <<< 20))))
                |> Seq.collect (fun g -> g.Nodes |> Seq.map (fun n -> OpSamples.caseOf n.Op))
                |> Set.ofSeq

            for case in
                [
                    "GroupedMatMul"
                    "PermuteWithProbs"
                    "Unpermute"
                    "Attention"
                    "Rope"
                    "Pick"
                    "Embedding"
                    "RmsNorm"
                    "SwiGlu"
                ] do
                Expect.isTrue (used.Contains case) case)
    ]

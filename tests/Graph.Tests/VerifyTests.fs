/// Legal graphs verify; each broken invariant is found.
module DeepSeekGraph.Graph.Tests.VerifyTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Testing

let private graph =
    let s = Sketch()
    let p = s.Param("p", [ "hidden", 4 ])
    s.Loss [ s.On(Op.Silu, [ p ]) ]

let private changed nodes types outputs = Graph(nodes, types, outputs, Array.create (Array.length types) -1)

let private finds name (broken: Graph) (part: string) =
    testCase name (fun () ->
        let found = Verify.check broken
        Expect.isNonEmpty found "nothing found"

        for d in found do
            Expect.equal d.Code Codes.IllegalGraph ""

        Expect.exists found (fun d -> d.Message.Contains part) "the message")

let tests =
    testList "Verify" [
        testCase "a legal graph has nothing wrong" (fun () -> Expect.isEmpty (Verify.check graph) "")
        finds "wrong order" (changed (Array.rev graph.Nodes) graph.Types graph.Outputs) "before it is made"
        finds
            "wrong type"
            (changed
                graph.Nodes
                (graph.Types |> Array.mapi (fun v t -> if v = 1 then { t with DType = DType.BFloat16 } else t))
                graph.Outputs)
            "the graph says bf16[hidden 4]"
        finds "made twice" (changed [| yield! graph.Nodes; graph.Nodes[1] |] graph.Types graph.Outputs) "is made twice"
        finds "output of nothing" (changed graph.Nodes graph.Types [| "loss", 99 |]) "not made by any node"
        finds
            "a parameter declared twice"
            (let s = Sketch()
             let p, q = s.Param("p", [ "hidden", 4 ]), s.Param("p", [ "hidden", 5 ])
             s.Loss [ p; q ])
            "declared 2 times"
    ]

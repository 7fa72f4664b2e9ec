/// Bundling of collectives: what begins together becomes one, what depends stays apart, and nothing else moves.
module DeepSeekGraph.Compiler.Tests.BundleTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler.Lowering

let private launch (inputs: int list) (outputs: int list) =
    Step.Launch(KernelId.Neg, [||], Array.ofList inputs, Array.ofList outputs, "m")

let private start token kind group (inputs: int list) (outputs: int list) path =
    Step.Start(token, kind, group, Array.ofList inputs, Array.ofList outputs, path)

let private gather token inputs outputs = start token (Collective.AllGather 1) 0 inputs outputs "m"

/// As text: steps hold arrays, which compare by reference.
let private shown (steps: Step list) = [
    for step in steps do
        match step with
        | Step.Launch(_, _, inputs, outputs, _) -> $"launch %A{List.ofSeq inputs} %A{List.ofSeq outputs}"
        | Step.Start(token, kind, group, inputs, outputs, path) ->
            $"t%i{token} %O{kind} g%i{group} %A{List.ofSeq inputs} %A{List.ofSeq outputs} %s{path}"
        | Step.Wait token -> $"wait t%i{token}"
        | Step.Free slot -> $"free %i{slot}"
]

let private becomes name (before: Step list) (after: Step list) =
    testCase name <| fun () -> Expect.equal (shown (Bundle.run before)) (shown after) "steps"

let private staysAsItIs name (steps: Step list) = becomes name steps steps

let tests =
    testList "Bundle" [
        becomes "the second begins with the first, behind the launches that make its operand" [
            gather 0 [ 1 ] [ 2 ]
            Step.Wait 0
            launch [ 2 ] [ 3 ]
            launch [ 1 ] [ 4 ]
            launch [ 4 ] [ 5 ]
            gather 1 [ 5 ] [ 6 ]
            Step.Wait 1
            launch [ 6 ] [ 7 ]
        ] [
            launch [ 1 ] [ 4 ]
            launch [ 4 ] [ 5 ]
            gather 0 [ 1; 5 ] [ 2; 6 ]
            Step.Wait 0
            launch [ 2 ] [ 3 ]
            launch [ 6 ] [ 7 ]
        ]

        becomes "the first begins with the second, when its result is not read before" [
            gather 0 [ 1 ] [ 2 ]
            start 9 Collective.AllReduceSum 1 [ 1 ] [ 3 ] "other"
            Step.Wait 9
            launch [ 3 ] [ 4 ]
            gather 1 [ 4 ] [ 5 ]
            Step.Wait 1
            Step.Wait 0
            launch [ 2; 5 ] [ 6 ]
        ] [
            start 9 Collective.AllReduceSum 1 [ 1 ] [ 3 ] "other"
            Step.Wait 9
            launch [ 3 ] [ 4 ]
            gather 0 [ 1; 4 ] [ 2; 5 ]
            Step.Wait 0
            launch [ 2; 5 ] [ 6 ]
        ]

        becomes "three become one, and each operand tuple keeps its place" [
            start 0 Collective.RowsToExperts 0 [ 1; 8; 9 ] [ 2 ] "m"
            start 1 Collective.RowsToExperts 0 [ 3; 8; 9 ] [ 4 ] "m"
            start 2 Collective.RowsToExperts 0 [ 5; 8; 9 ] [ 6 ] "m"
            Step.Wait 2
            Step.Wait 0
            Step.Wait 1
        ] [
            start 0 Collective.RowsToExperts 0 [ 1; 8; 9; 3; 8; 9; 5; 8; 9 ] [ 2; 4; 6 ] "m"
            Step.Wait 0
        ]

        staysAsItIs "what needs the first's result begins behind it" [
            gather 0 [ 1 ] [ 2 ]
            Step.Wait 0
            launch [ 2 ] [ 3 ]
            gather 1 [ 3 ] [ 4 ]
            Step.Wait 1
            launch [ 4 ] [ 5 ]
        ]

        for name, other in
            [
                "another kind", start 1 (Collective.AllGather 0) 0 [ 3 ] [ 4 ] "m"
                "another group", start 1 (Collective.AllGather 1) 1 [ 3 ] [ 4 ] "m"
                "another module", start 1 (Collective.AllGather 1) 0 [ 3 ] [ 4 ] "n"
                "more operands", start 1 (Collective.AllGather 1) 0 [ 3; 5; 6 ] [ 4 ] "m"
            ] do
            staysAsItIs $"%s{name} is no neighbour" [ gather 0 [ 1 ] [ 2 ]; other; Step.Wait 0; Step.Wait 1 ]

        staysAsItIs "messages are never bundled" [
            start 0 (Collective.Recv 1) 0 [] [ 2 ] "m"
            start 1 (Collective.Recv 1) 0 [] [ 3 ] "m"
            Step.Wait 0
            Step.Wait 1
        ]
    ]

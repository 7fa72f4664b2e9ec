/// The axis language: shapes, marks, and errors that name both sides.
module DeepSeekGraph.Graph.Tests.AxesTests

open Expecto
open DeepSeekGraph

let private f32 axes = TensorType.create DType.Float32 axes

let private bind strict text types = Axes.bind strict (Axes.parse text) (Array.ofList types)

let private resultOf text types =
    match bind false text types with
    | Ok rule -> rule.ResultAxes |> Array.map (Array.map (fun a -> a.Name, a.Extent) >> List.ofArray) |> List.ofArray
    | Error text -> failtest text

let private errorOf strict text types =
    match bind strict text types with
    | Ok rule -> failtestf "binds: %A" rule
    | Error text -> text

let private x = f32 [ "batch", 2; "seq", 3; "hidden", 4 ]
let private w = f32 [ "ffn", 5; "hidden", 4 ]

let tests =
    testList "Axes" [
        testCase "a result has the axes of its letters" (fun () ->
            Expect.equal (resultOf "b s k+, n k+ -> b s n" [ x; w ]) [ [ "batch", 2; "seq", 3; "ffn", 5 ] ] "")
        testCase "... stands for any leading dims" (fun () ->
            Expect.equal (resultOf "... k+, n k+ -> n ..." [ x; w ]) [ [ "ffn", 5; "batch", 2; "seq", 3 ] ] ""

            Expect.equal (resultOf "... k+ -> ..." [ f32 [ "k", 3 ] ]) [ [] ] "")
        testCase "several results" (fun () ->
            Expect.equal (resultOf "b s h -> h, b s" [ x ]) [ [ "hidden", 4 ]; [ "batch", 2; "seq", 3 ] ] "")
        testCase "a mark holds wherever its letter stands" (fun () ->
            match bind false "b s k+, n k -> b s n" [ x; w ] with
            | Error text -> failtest text
            | Ok rule ->
                let k = rule.Factors |> Array.find (fun f -> f.Letter = "k")
                Expect.equal k.Mark Mark.Sum ""
                Expect.equal k.Operands [| 2; 1 |] ""
                Expect.equal k.Results [| -1 |] "")
        testCase "clashing extents: the error names both axes and both extents" (fun () ->
            let text = errorOf false "b s k+, n k+ -> b s n" [ x; f32 [ "ffn", 5; "width", 8 ] ]

            for part in [ "hidden"; "4"; "width"; "8"; "input 0"; "input 1" ] do
                Expect.stringContains text part "")
        testCase "clashing names where names count: the error names both" (fun () ->
            let text = errorOf true "b s k+, n k+ -> b s n" [ x; f32 [ "ffn", 5; "width", 4 ] ]

            for part in [ "hidden"; "width" ] do
                Expect.stringContains text part "")
        testCase "wrong rank: the error shows the type and the rank wanted" (fun () ->
            let text = errorOf false "b s k+, n k+ -> b s n" [ w; w ]

            for part in [ "fp32[ffn 5, hidden 4]"; "rank 2"; "rank 3" ] do
                Expect.stringContains text part "")
        testCase "wrong arity: the error has both counts" (fun () ->
            Expect.stringContains (errorOf false "b s k+, n k+ -> b s n" [ x ]) "takes 2 inputs, not 1" "")
        testCase "text that is no signature is refused" (fun () ->
            for text in [ ""; "a b"; "a -> b -> c"; "a? -> a" ] do
                Expect.throwsT<System.ArgumentException> (fun () -> Axes.parse text |> ignore) text)
    ]

/// The text form: prints what it parses, parses what it prints, and survives anything.
module DeepSeekGraph.Graph.Tests.TextTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Testing

let private parsed (text: string) =
    match Text.parse text with
    | Ok graph -> graph
    | Error found -> failtestf "%O\n%s" found.Head text

let private roundTrips (graph: Graph) =
    let text = Text.print graph
    let again = parsed text
    Expect.equal (Text.print again) text "printed again"
    Expect.equal again.Types graph.Types "types"
    Expect.equal (again.Nodes |> Array.map _.Op) (graph.Nodes |> Array.map _.Op) "ops"
    Expect.equal again.Outputs graph.Outputs "outputs"
    Expect.equal again.Primals graph.Primals "primals"

let private example =
    "graph 1\n"
    + "%0 = parameter(name=\"w\", init=ones, update=frozen, keep_fp32=true) : fp32[hidden 4] @shared forward \"w\"\n"
    + "%1 = scale(factor=0.13) %0 : fp32[hidden 4] @layer.3 forward \"model.layers.3\"\n"
    + "output \"y\" %1\n"

let private refuses name (change: string -> string) line (part: string) =
    testCase name (fun () ->
        match Text.parse (change example) with
        | Ok _ -> failtest "parsed"
        | Error found ->
            let d = found.Head
            Expect.equal d.Code Codes.GraphText ""
            Expect.equal d.At $"line %i{line}" ""
            Expect.stringContains d.Message part "")

let private replace (old: string) (by: string) (text: string) = text.Replace(old, by)

/// Text near to a graph's: parts cut out, doubled or swapped for others.
let private mangle (text: string) (edits: (int * int * int) list) =
    let pieces = [|
        "%1"
        "\""
        "["
        ")"
        "="
        "fp32"
        "99999999999"
        "-1"
        ","
        "\\u12"
        "rows"
        "nan"
        "%0, %0"
        "\n"
        "@"
        ""
    |]

    edits
    |> List.fold
        (fun (t: string) (at, length, piece) ->
            if t = "" then
                t
            else
                let start = abs (at % t.Length)
                let count = abs (length % 12) |> min (t.Length - start)
                t.Remove(start, count).Insert(start, pieces[abs (piece % pieces.Length)]))
        text

let tests =
    testList "Text" [
        testList "every op's samples round-trip" [
            for case, samples in OpSamples.all do
                testCase case (fun () ->
                    for sample in samples do
                        roundTrips sample.Graph

                        match Autodiff.differentiate "loss" sample.Graph with
                        | Ok joint -> roundTrips joint
                        | Error _ -> ())
        ]
        Properties.propertyOver [ typeof<Generators> ] "a random graph round-trips" (fun (random: RandomGraph) ->
            roundTrips random.Graph)
        testCase "a line reads as designed" (fun () -> Expect.equal (Text.print (parsed example)) example "")
        testCase "blank lines and comments do not count" (fun () ->
            Expect.equal (Text.print (parsed (example.Replace("%1 =", "\n  # a remark\n\n %1 =")))) example "")
        testCase "odd names and numbers are exact" (fun () ->
            let s = Sketch()

            s.Origin <- {
                s.Origin with
                    Path = "a \"quoted\" \\ path\n\u00e9"
            }

            let x = s.Param("tab\there", [ "rows", 2; "two words", 3; "7", 1 ])

            let y = s.On(Op.Scale(0.1 + 0.2), [ s.On(Op.Offset -0.0, [ s.On(Op.Offset infinity, [ x ]) ]) ])

            s.Output("out, %3", s.On(Op.Offset 1e-300, [ y ]))
            roundTrips (s.ToGraph()))
        refuses "an unknown op" (replace "scale" "scape") 3 "'scape' is no op"
        refuses "a missing attribute" (replace "factor=" "faktor=") 3 "'factor'"
        refuses "a wrong type" (replace "%0 : fp32[hidden 4]" "%0 : fp32[hidden 5]") 3 "makes fp32[hidden 4]"
        refuses "a value not made" (replace "%0 : fp32" "%7 : fp32") 3 "%7"
        refuses "a gap in the numbers" (replace "%1 =" "%5 =") 3 "%5"
        refuses "a value made twice" (replace "%1 =" "%0 =") 3 "made twice"
        refuses "an output of nothing" (replace "\"y\" %1" "\"y\" %9") 4 "%9"
        refuses "an open quote" (replace "\"y\"" "\"y") 4 "no end"
        refuses "another version" (replace "graph 1" "graph 2") 1 "graph 1"
        refuses "a stray character" (replace "scale" "sc\u00e9le") 3 "U+00E9"
        refuses "an unknown unit" (replace "@layer.3" "@block.3") 3 "block.3"
        refuses
            "an extent beyond all bounds"
            (replace "%0 : fp32[hidden 4]" "%0 : fp32[hidden 99999999999]")
            3
            "99999999999"
        testCase "every wrong line is told, not the first alone" (fun () ->
            match Text.parse (example.Replace("scale", "scape").Replace("output", "outpost")) with
            | Ok _ -> failtest "parsed"
            | Error found -> Expect.equal (found |> List.map _.At) [ "line 3"; "line 4" ] "")
        Properties.property "any text gives a graph or diagnostics" (fun (chars: char list) ->
            let text = System.String(Array.ofList chars)
            Text.parse text |> ignore
            Text.parse ("graph 1\n" + text) |> ignore)
        Properties.propertyOver
            [ typeof<Generators> ]
            "a mangled graph gives a legal graph or diagnostics"
            (fun (random: RandomGraph) (edits: (int * int * int) list) ->
                let joint =
                    match Autodiff.differentiate "loss" random.Graph with
                    | Ok joint -> joint
                    | Error _ -> random.Graph

                match Text.parse (mangle (Text.print joint) edits) with
                | Ok graph -> Expect.isEmpty (Verify.check graph) "legal"
                | Error found -> Expect.isNonEmpty found "told")
    ]

/// Layout strings: grammar, checks, DeepSeek-V3's table, automatic cuts.
module DeepSeekGraph.Compiler.Tests.LayoutStringTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Testing

let private parsed text =
    match LayoutString.parse text with
    | Ok stages -> stages
    | Error wrong -> failtestf "%A" wrong

let private letters text = parsed text |> List.map LayoutString.letters

/// Every cut of a list into non-empty parts.
let rec private cuts parts (costs: int64 list) : int64 list list list =
    if parts = 1 then
        [ [ costs ] ]
    else
        [
            for n in 1 .. costs.Length - parts + 1 do
                for rest in cuts (parts - 1) (List.skip n costs) -> List.take n costs :: rest
        ]

let tests =
    testList "Partition.LayoutString" [
        testCase "Megatron's examples expand"
        <| fun () ->
            Expect.equal (letters "E|(tt|)*2,(t|)*4,mL") [ "E"; "tt"; "tt"; "t"; "t"; "t"; "t"; "mL" ] ""
            let h100 = letters "Et|(tt|)*30mL"
            Expect.equal (h100.Length, h100[0], h100[1], h100[31]) (32, "Et", "tt", "mL") ""
            Expect.equal (letters "Et*3|(t|t)*2L") [ "Ettt"; "t"; "tt"; "tL" ] ""

        testCase "broken strings are refused with the place"
        <| fun () ->
            for text, what in
                [
                    "Et|x", "'x' at 3"
                    "(t|", "not closed"
                    "E((t))*2L", "do not nest"
                    "Et*", "not followed by a number"
                    "Et*0L", "repeats nothing"
                    "E()*3L", "empty"
                    "(t|)*99999999999", "more than"
                    "t*60000t*60000", "more than"
                ] do
                match LayoutString.parse text with
                | Ok stages -> failtestf "%s gives %A" text stages
                | Error wrong -> Expect.stringContains wrong.Head.Message what text

        testCase "a wrong number of layers names both values and a legal string"
        <| fun () ->
            let wrong = LayoutString.check (parsed "Ett|tmL") 5 1 2 1 |> List.exactlyOne
            Expect.equal wrong.Code Codes.LayoutUnits ""
            Expect.stringContains wrong.Message "3 layers (t) but the model has 5" ""
            Expect.stringContains wrong.Help "Ettt|ttmL" ""

        testCase "units out of order or out of place are refused"
        <| fun () ->
            let messages text layers mtp pp vp =
                LayoutString.check (parsed text) layers mtp pp vp |> List.map _.Message |> String.concat "\n"

            Expect.stringContains (messages "tE|tL" 2 0 2 1) "not the first" ""
            Expect.stringContains (messages "Et|Lt" 2 0 2 1) "not the last" ""
            Expect.stringContains (messages "Et|mtL" 2 1 2 1) "comes before a layer" ""
            Expect.stringContains (messages "Et|m|mL" 1 2 3 1) "share one" ""
            Expect.stringContains (messages "Et|t|mL|" 2 1 2 2) "rank 0" ""
            Expect.stringContains (messages "Et|tL" 2 0 4 1) "2 stages but pp is 4" ""
            Expect.equal (messages "Et|t|t|mL" 3 1 2 2) "" ""
            Expect.equal (messages "E|||tL" 1 0 4 1) "" "stages in the middle may be empty"

        testCase "DeepSeek-V3's table is legal"
        <| fun () ->
            for pp, vp in [ 1, 1; 4, 1; 8, 1; 4, 2; 16, 1; 8, 2; 4, 4 ] do
                let stages = parsed (LayoutString.deepSeekV3 pp vp).Value
                Expect.equal (LayoutString.check stages 61 1 pp vp) [] $"pp %i{pp} vp %i{vp}"

            Expect.equal (LayoutString.deepSeekV3 3 1) None ""
            Expect.equal (letters (LayoutString.deepSeekV3 16 1).Value |> List.item 15) "tmL" ""

        Properties.property "printing leads back" (fun (units: LayoutUnit list list) ->
            units.IsEmpty || LayoutString.parse (LayoutString.print units) = Ok units)

        Properties.property "any text gives stages or a diagnostic" (fun (symbols: char list) ->
            match LayoutString.parse (System.String(Array.ofList symbols)) with
            | Ok stages -> not stages.IsEmpty
            | Error wrong -> not wrong.IsEmpty)

        Properties.property
            "an automatic cut is as good as the best of all cuts"
            (fun (costs: byte list) (stages: byte) ->
                let costs = 7L :: (costs |> List.truncate 8 |> List.map int64)
                let stages = 1 + int stages % costs.Length
                let lengths = LayoutString.cut costs stages

                let parts, rest = lengths |> List.mapFold (fun rest n -> List.splitAt n rest) costs

                let dearest parts = parts |> List.map List.sum |> List.max

                rest.IsEmpty
                && lengths |> List.forall (fun n -> n > 0)
                && dearest parts = (cuts stages costs |> List.map dearest |> List.min))

        testCase "the automatic layout is a legal layout"
        <| fun () ->
            for pp in 1..7 do
                for vp in 1..3 do
                    for mtp in [ []; [ 25L ]; [ 200L; 300L ] ] do
                        match LayoutString.auto 3L [ 10L; 10L; 20L; 20L; 20L ] mtp 12L pp vp with
                        | Ok stages ->
                            Expect.equal (LayoutString.check stages 5 mtp.Length pp vp) [] (LayoutString.print stages)
                        | Error wrong ->
                            Expect.isGreaterThan (pp * vp) (if mtp.IsEmpty || pp <= 2 then 7 else 8) wrong.Head.Message

            Expect.isError (LayoutString.auto 1L [ 1L ] [] 1L 4 1) "more stages than units"
            Expect.isError (LayoutString.auto 1L [ 1L ] [] 1L 2 2) "more stages than units"
            Expect.isError (LayoutString.auto 1L [ 1L ] [] 1L 2 0) "no chunk"
    ]

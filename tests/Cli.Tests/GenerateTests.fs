/// dsg generate over token ids, and what it says of what it cannot do.
module DeepSeekGraph.Cli.Tests.GenerateTests

open System
open System.IO
open System.Text.Json
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Testing
open DeepSeekGraph.Cli.Tests

let private succeed folder arguments =
    let result = Dsg.run folder arguments
    Expect.equal result.Code 0 $"dsg %A{arguments}: %s{result.Out} %s{result.Error}"
    result

let private fails folder arguments (code: string) =
    let result = Dsg.run folder ("generate" :: arguments)
    Expect.equal result.Code 1 $"%A{arguments}: %s{result.Out}"
    Expect.stringContains result.Error code $"%A{arguments}"

let private mistakes =
    testCase "mistakes are one diagnostic each"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let golden = Path.Combine(Dsg.root, "tests", "golden", "v3_tiny_plain")
            fails folder [ "--prompt"; "x" ] Codes.OptionValue
            fails folder [ "--hf"; golden; "--checkpoint"; "y"; "--prompt"; "x" ] Codes.OptionValue
            fails folder [ "--hf"; golden ] Codes.OptionValue
            // without a tokenizer there are ids only
            fails folder [ "--hf"; golden; "--prompt"; "x" ] Codes.OptionValue
            fails folder [ "--hf"; golden; "--prompt-ids"; "1,two" ] Codes.OptionValue
            fails folder [ "--hf"; golden; "--prompt-ids"; "1,100000" ] Codes.OptionValue
            fails folder [ "--hf"; golden; "--prompt-ids"; "1"; "--max-new-tokens"; "0" ] Codes.OptionValue
            fails folder [ "--hf"; golden; "--prompt-ids"; "1"; "--top-p"; "2" ] Codes.SamplingIllegal
            fails folder [ "--hf"; golden; "--prompt-ids"; "1"; "--tp"; "3" ] Codes.NotDivisible
            fails folder [ "--hf"; folder; "--prompt-ids"; "1" ] Codes.ConfigUnreadable)

let private ids =
    testCase "token ids go in and come out, and drawn tokens are the same twice"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let golden = Path.Combine(Dsg.root, "tests", "golden", "v3_tiny_plain")

            let run more =
                (succeed
                    folder
                    ([ "generate"; "--hf"; golden; "--prompt-ids"; "1,2,3"; "--max-new-tokens"; "5" ] @ more))
                    .Out

            let greedy = run []
            Expect.equal (greedy.Trim().Split(' ').Length) 5 greedy
            let drawn = run [ "--temperature"; "2"; "--seed"; "7" ]
            Expect.equal (run [ "--temperature"; "2"; "--seed"; "7"; "--tp"; "2"; "--ep"; "2" ]) drawn "on other ranks"
            Expect.notEqual drawn greedy "not the likeliest")

let private withTokenizer =
    testCase "a model with a tokenizer: exported with what ends a text, gone on with in text"
    <| fun () ->
        Dsg.inFolder (fun folder ->
            let data = Dsg.writeText folder
            SampleTokenizer.writeTo folder SampleTokenizer.json SampleTokenizer.config

            succeed folder [
                "pretrain"
                "--tp"
                "1"
                "--steps"
                "2"
                "--save-interval"
                "2"
                "--seq-length"
                "16"
                "--global-batch"
                "2"
                "--set"
                "model.vocab_size=384"
                "--data"
                data
                "--tokenizer"
                "tokenizer.json"
                "--out"
                "run"
            ]
            |> ignore

            succeed folder [ "export"; "--checkpoint"; "run"; "--out"; "published" ] |> ignore

            let ends =
                File.ReadAllText(Path.Combine(folder, "published", "generation_config.json")) |> JsonDocument.Parse

            Expect.isTrue (fst (ends.RootElement.TryGetProperty "eos_token_id")) "eos_token_id"
            let more = [ "--prompt"; "the abc"; "--max-new-tokens"; "3"; "--json" ]
            let own = (succeed folder ([ "generate"; "--checkpoint"; "run" ] @ more)).Out
            let published = (succeed folder ([ "generate"; "--hf"; "published" ] @ more)).Out
            let json (out: string) = out.Split '\n' |> Array.find _.StartsWith('{')
            Expect.equal (json own) (json published) "the same"
            let first = SampleTokenizer.vocabulary["the"]
            Expect.stringContains (json own) $"\"prompt_ids\":[0,%i{first}," "begins as the tokenizer says")

let tests = testList "generate" [ mistakes; ids; withTokenizer ]

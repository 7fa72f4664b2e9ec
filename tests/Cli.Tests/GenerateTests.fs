/// dsg generate over token ids, and what it says of what it cannot do.
module DeepSeekGraph.Cli.Tests.GenerateTests

open System
open System.IO
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Cli.Tests

/// The repository's folder, above the test program's.
let private root =
    let rec up (folder: DirectoryInfo) =
        if File.Exists(Path.Combine(folder.FullName, "DeepSeekGraph.sln")) then
            folder.FullName
        else
            up (nonNull folder.Parent)

    up (DirectoryInfo AppContext.BaseDirectory)

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
            let golden = Path.Combine(root, "tests", "golden", "v3_tiny_plain")
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
            let golden = Path.Combine(root, "tests", "golden", "v3_tiny_plain")

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

let tests = testList "generate" [ mistakes; ids ]

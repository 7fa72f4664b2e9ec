/// dsg verify on small checkpoints of the repository: what it prints, and when it fails.
module DeepSeekGraph.Cli.Tests.VerifyTests

open System
open System.IO
open System.Text.Json
open Expecto

/// A folder of the repository's golden cases.
let private golden (case: string) =
    let rec up (folder: string) =
        if File.Exists(Path.Combine(folder, "DeepSeekGraph.sln")) then
            folder
        else
            up (nonNull (Path.GetDirectoryName folder))

    Path.Combine(up AppContext.BaseDirectory, "tests", "golden", case)

let private verify (case: string) (more: string list) =
    Dsg.inFolder (fun folder -> Dsg.run folder ([ "verify"; "--hf"; golden case ] @ more))

let tests =
    testList "verify" [
        test "a checkpoint that agrees: a table of items, exit code 0" {
            let grads = Path.Combine(golden "v3_tiny_plain", "reference_grads.safetensors")
            let result = verify "v3_tiny_plain" [ "--grads"; grads; "--tp"; "2"; "--ep"; "2"; "--strict" ]
            Expect.equal (result.Code, result.Error) (0, "") "exit code"

            for text in
                [
                    "2 ranks: TP 2 x PP 1 x DP 1, EP 2"
                    "logits"
                    "hidden_last"
                    "198 gradients, worst model."
                    "generated_ids: 24 of 24 tokens equal"
                ] do
                Expect.stringContains result.Out text text
        }

        test "beyond the tolerance: exit code 1, and the same as JSON" {
            let result = verify "v3_tiny_yarn" [ "--json"; "--tolerance"; "1e-9" ]
            Expect.equal result.Code 1 "exit code"
            Expect.stringContains result.Error "DSG0713" "diagnostic"
            use json = JsonDocument.Parse result.Out
            Expect.isFalse (json.RootElement.GetProperty("within").GetBoolean()) "within"

            for item in json.RootElement.GetProperty("items").EnumerateArray() do
                let name = item.GetProperty("name").GetString()
                let within = item.GetProperty("within").GetBoolean()
                let relative = item.GetProperty("relative").GetDouble()
                Expect.equal within (relative <= item.GetProperty("tolerance").GetDouble()) $"%s{name}"
                Expect.isLessThan relative 1e-5 $"%s{name}"
        }

        test "without multi-token prediction its items are not compared, which --strict does not take" {
            let loose = verify "v3_tiny_mtp" [ "--no-mtp" ]
            Expect.equal (loose.Code, loose.Error) (0, "") "loose"
            Expect.stringContains loose.Out "not compared: mtp_logits, mtp_loss, total_loss" "named"
            let strict = verify "v3_tiny_mtp" [ "--no-mtp"; "--strict" ]
            Expect.equal strict.Code 1 "strict"
            Expect.stringContains strict.Error "DSG0714" "diagnostic"
        }

        test "a name that is not in the cache tells how to get it" {
            Dsg.inFolder (fun folder ->
                let result = Dsg.runWith folder [ "HF_HUB_CACHE", folder ] [ "verify"; "--hf"; "tiny-org/none" ]
                Expect.equal result.Code 1 "exit code"
                Expect.stringContains result.Error "DSG0707" "diagnostic"
                Expect.stringContains result.Error "hf download tiny-org/none" "command")
        }

        test "a missing reference and a wrong dtype are told" {
            let missing = verify "v3_tiny_plain" [ "--reference"; "nowhere.safetensors" ]
            Expect.equal missing.Code 1 "reference"
            Expect.stringContains missing.Error "DSG0820" "reference"
            let dtype = verify "v3_tiny_plain" [ "--dtype"; "fp8" ]
            Expect.equal dtype.Code 1 "dtype"
            Expect.stringContains dtype.Error "DSG0902" "dtype"
        }
    ]

/// The command line: help without loading anything heavy, and mistakes that give one diagnostic.
module DeepSeekGraph.Cli.Tests.ArgumentsTests

open System
open System.IO
open Expecto
open DeepSeekGraph.Cli
open DeepSeekGraph.Cli.Tests

let private diagnostics (text: string) =
    text.Split '\n' |> Array.filter _.StartsWith("error DSG", StringComparison.Ordinal)

/// Exit code 1, one diagnostic of this code that names the words given, and an untouched folder.
let private refused name code (words: string list) (arguments: string list) = test $"%s{name} is one %s{code}" {
    Dsg.inFolder (fun folder ->
        File.WriteAllText(Path.Combine(folder, "empty.txt"), "")
        File.WriteAllText(Path.Combine(folder, "garbage.txt"), "no plan\n")
        Directory.CreateDirectory(Path.Combine(folder, "used")) |> ignore
        File.WriteAllText(Path.Combine(folder, "used", "file"), "x")
        let text = Dsg.writeText folder

        let before = Directory.GetFileSystemEntries(folder, "*", SearchOption.AllDirectories) |> Array.sort

        let result = Dsg.run folder (arguments |> List.map _.Replace("TEXT", text))

        let after = Directory.GetFileSystemEntries(folder, "*", SearchOption.AllDirectories) |> Array.sort

        let found = diagnostics result.Error
        Expect.equal (result.Code, found.Length) (1, 1) $"exit code and diagnostics in: %s{result.Error}"
        Expect.stringStarts found[0] $"error %s{code}: " "code"
        Expect.stringContains result.Error $"  see  dsg explain %s{code}" "where to read on"

        for word in words do
            Expect.stringContains result.Error word "what is said"

        Expect.equal after before "files")
}

let tests =
    testList "Arguments" [
        test "help needs nothing but the command and its parser" {
            Dsg.inFolder (fun folder ->
                for file in [ "dsg.dll"; "dsg.runtimeconfig.json"; "System.CommandLine.dll" ] do
                    File.Copy(Path.Combine(AppContext.BaseDirectory, file), Path.Combine(folder, file))

                for arguments in
                    [
                        [ "--help" ]
                        [ "pretrain"; "--help" ]
                        [ "compile"; "-h" ]
                        [ "recipes"; "show"; "-h" ]
                    ] do
                    let result = Dsg.start folder (Path.Combine(folder, "dsg.dll")) arguments |> Dsg.finish

                    Expect.equal (result.Code, result.Error) (0, "") $"dsg %A{arguments}"
                    Expect.stringContains result.Out "Usage:" "help text")
        }

        test "no command at all is wrong usage and prints the help" {
            let result = Dsg.inFolder (fun folder -> Dsg.run folder [])
            Expect.equal result.Code 2 "exit code"
            Expect.stringContains result.Out "pretrain" "the commands"
        }

        refused "an unknown command" "DSG0901" [ "'pretrian'"; "choose from pretrain" ] [ "pretrian" ]
        refused "an unknown option" "DSG0901" [ "'--stesp'"; "choose from --steps" ] [ "pretrain"; "--stesp"; "5" ]
        refused "a word too many" "DSG0901" [ "'b'" ] [ "show"; "a"; "b" ]
        refused "a word for a number" "DSG0902" [ "at   --steps" ] [ "pretrain"; "--steps"; "many" ]
        refused "no steps" "DSG0902" [ "at   --steps" ] [ "pretrain"; "--steps"; "0" ]
        refused "an executor that is none" "DSG0902" [ "at   --executor"; "interpreter" ] [
            "run"
            "plan.txt"
            "--executor"
            "interpret"
        ]

        refused "a trace without a folder" "DSG0902" [ "at   --trace\n" ] [ "pretrain"; "--trace"; "" ]
        refused "a traced step before the first" "DSG0902" [ "at   --trace-step"; "1 or more" ] [
            "run"
            "plan.txt"
            "--trace"
            "t"
            "--trace-step"
            "0"
        ]
        refused "a traced step without a trace" "DSG0902" [ "at   --trace-step"; "--trace DIR" ] [
            "pretrain"
            "--trace-step"
            "3"
        ]
        refused "a traced step behind the last" "DSG0902" [ "at   --trace-step"; "step 4 is not"; "1 to 3" ] [
            "pretrain"
            "--dtype"
            "fp32"
            "--steps"
            "3"
            "--data"
            "TEXT"
            "--trace"
            "t"
            "--trace-step"
            "4"
        ]
        refused "a folder for traces that holds something" "DSG0815" [ "at   --trace\n"; "'used' is not empty" ] [
            "pretrain"
            "--dtype"
            "fp32"
            "--steps"
            "3"
            "--data"
            "TEXT"
            "--trace"
            "used"
        ]

        refused "a device that is none" "DSG0902" [ "at   --device"; "cuda" ] [ "pretrain"; "--device"; "gpu" ]

        testCase "a GPU where there is none is one diagnostic" (fun () ->
            if IO.File.Exists "/dev/nvidia0" then
                skiptest "there is a GPU"

            let result = Dsg.inFolder (fun folder -> Dsg.run folder [ "pretrain"; "--device"; "cuda" ])
            Expect.equal result.Code 1 "exit code"
            Expect.stringContains result.Error "DSG0852" "code")

        refused "a learning rate below zero" "DSG0902" [ "at   --lr" ] [ "pretrain"; "--lr"; "-1" ]

        refused "an unknown recipe" "DSG0706" [ "'deepseek_v3_tinny'"; "choose from deepseek_v3_tiny" ] [
            "pretrain"
            "deepseek_v3_tinny"
        ]

        refused "an unknown dtype" "DSG0902" [ "at   --dtype"; "fp32" ] [ "pretrain"; "--dtype"; "fp64" ]
        refused "an unknown schedule" "DSG0503" [ "1F1B" ] [ "pretrain"; "--schedule"; "2F2B" ]
        refused "a schedule of one chunk with two" "DSG0504" [ "GPipe"; "virtual_pipeline is 2"; "Interleaved1F1B" ] [
            "pretrain"
            "--pp"
            "2"
            "--vp"
            "2"
            "--schedule"
            "GPipe"
            "--dtype"
            "fp32"
        ]

        refused "a group smaller than the pipeline" "DSG0504" [ "microbatch_group 1 is less than pipeline 2"; "2 3 4" ] [
            "pretrain"
            "--pp"
            "2"
            "--vp"
            "2"
            "--microbatch-group"
            "1"
            "--dtype"
            "fp32"
        ]

        refused "a degree of zero" "DSG0301" [ "'--tp' is 0" ] [ "pretrain"; "--tp"; "0" ]

        refused "experts that do not nest" "DSG0302" [ "choose ep from 1 2" ] [
            "pretrain"
            "--ep"
            "3"
            "--dp"
            "2"
            "--dtype"
            "fp32"
        ]

        refused "a tensor degree that does not divide" "DSG0391" [ "1 2 4" ] [
            "pretrain"
            "--tp"
            "3"
            "--dtype"
            "fp32"
        ]

        refused "a layout with too few layers" "DSG0502" [ "1 layers (t)"; "for example" ] [
            "pretrain"
            "--pp"
            "2"
            "--layout"
            "Et|mL"
            "--dtype"
            "fp32"
        ]

        refused "an unknown recomputation" "DSG0590" [ "core_attn" ] [
            "pretrain"
            "--recompute"
            "all"
            "--dtype"
            "fp32"
        ]
        refused "an unknown setting" "DSG0904" [ "model.num_layers" ] [
            "compile"
            "--out"
            "x"
            "--set"
            "model.num_layer=3"
        ]

        refused "a setting of another kind" "DSG0902" [ "a whole number" ] [
            "recipes"
            "show"
            "deepseek_v3_tiny"
            "--set"
            "recipe.global_batch_size=many"
        ]

        refused "no assignment" "DSG0902" [ "KEY=VALUE" ] [
            "recipes"
            "show"
            "deepseek_v3_tiny"
            "--set"
            "model.num_layers"
        ]

        refused "a setting that changes no plan" "DSG0904" [ "training.lr" ] [
            "compile"
            "--out"
            "x"
            "--dtype"
            "fp32"
            "--set"
            "training.lr=1e-3"
        ]

        refused "a model of impossible sizes" "DSG0701" [ "n_group" ] [
            "compile"
            "--out"
            "x"
            "--dtype"
            "fp32"
            "--set"
            "model.n_group=5"
        ]

        refused "two recipes" "DSG0902" [ "deepseek_v3_proxy" ] [
            "compile"
            "deepseek_v3_tiny"
            "--recipe"
            "deepseek_v3_proxy"
            "--out"
            "x"
        ]

        refused "an unknown fusion rule" "DSG0401" [ "permute" ] [
            "compile"
            "--out"
            "x"
            "--dtype"
            "fp32"
            "--set"
            "recipe.fusions=-permut"
        ]

        refused "an unknown plan form" "DSG0902" [ "binary" ] [
            "compile"
            "--out"
            "x"
            "--dtype"
            "fp32"
            "--format"
            "json"
        ]

        refused "comparing with what is no plan" "DSG0601" [ "garbage.txt" ] [ "diff"; "garbage.txt"; "garbage.txt" ]
        refused "explaining a missing plan" "DSG0603" [ "nowhere" ] [ "explain"; "nowhere" ]
        refused "missing data" "DSG0810" [ "nowhere" ] [ "pretrain"; "--data"; "nowhere"; "--dtype"; "fp32" ]
        refused "missing tokenizer" "DSG0830" [ "nowhere" ] [ "pretrain"; "--tokenizer"; "nowhere"; "--dtype"; "fp32" ]
        refused "empty data" "DSG0811" [ "empty.txt" ] [ "pretrain"; "--data"; "empty.txt"; "--dtype"; "fp32" ]

        refused "an output folder in use" "DSG0815" [ "'used'" ] [
            "pretrain"
            "--data"
            "TEXT"
            "--out"
            "used"
            "--dtype"
            "fp32"
        ]

        refused "an unwritable output folder" "DSG0816" [ "/dev/null/x" ] [
            "pretrain"
            "--data"
            "TEXT"
            "--out"
            "/dev/null/x"
            "--dtype"
            "fp32"
        ]

        refused "an unwritable plan file" "DSG0603" [ "/dev/null/x" ] [
            "compile"
            "--dtype"
            "fp32"
            "--out"
            "/dev/null/x"
        ]
        refused "a plan file that is none" "DSG0601" [ "garbage.txt" ] [ "run"; "garbage.txt" ]
        refused "showing a missing plan" "DSG0603" [ "nowhere" ] [ "show"; "nowhere" ]
        refused "an unknown code" "DSG0902" [ "DSG0301" ] [ "explain"; "DSG030" ]

        refused "a job for a cluster" "DSG0903" [ "1024 ranks" ] [ "pretrain"; "deepseek_v3_pretrain" ]

        test "a code is explained" {
            let result = Dsg.inFolder (fun folder -> Dsg.run folder [ "explain"; "dsg0301" ])
            Expect.equal result.Code 0 "exit code"
            Expect.stringStarts result.Out "# DSG0301" "the page"
        }

        test "recipes are listed and shown" {
            Dsg.inFolder (fun folder ->
                let all = Dsg.run folder [ "recipes" ]
                let one = Dsg.run folder [ "recipes"; "show"; "deepseek_v3_pretrain" ]
                Expect.stringContains all.Out "deepseek_v3_tiny" "list"
                Expect.stringContains one.Out "n_routed_experts" "model"
                Expect.stringContains one.Out "pipeline" "recipe")
        }

        test "a swap of neighbours is nearer than another word" {
            Expect.equal (Seq.head (Nearest.Names("--pt", [ "--ep"; "--tp"; "--pp" ]))) "--tp" "nearest"

            Expect.equal (Seq.head (Nearest.Names("pretrian", [ "run"; "check"; "pretrain" ]))) "pretrain" "nearest"
        }
    ]

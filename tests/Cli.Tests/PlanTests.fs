/// Commands on plans: both forms, dump, show, check, diff and explain.
module DeepSeekGraph.Cli.Tests.PlanTests

open System
open System.IO
open System.Text.Json
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Cli.Tests

let private succeed folder arguments =
    let result = Dsg.run folder arguments
    Expect.equal (result.Code, result.Error) (0, "") $"dsg %A{arguments}: %s{result.Out}"
    result.Out

let private small = [ "--dtype"; "fp32"; "--set"; "recipe.seq_length=32" ]
let private compile folder out more = succeed folder ([ "compile"; "--out"; out ] @ small @ more) |> ignore

let private recipes = test "settings are shown as they are set, in our words or Megatron's" {
    Dsg.inFolder (fun folder ->
        let shown =
            succeed folder [
                "recipes"
                "show"
                "deepseek_v3_pretrain"
                "--json"
                "--set"
                "model.num_layers=12"
                "--set"
                "recipe.global_batch_size=64"
                "--set"
                "optimizer.beta2=0.99"
                "--set"
                "optimizer.store_param_remainders=true"
                "--set"
                "model.rope_scaling=none"
            ]

        use json = JsonDocument.Parse shown
        let at (part: string) (key: string) = json.RootElement.GetProperty(part).GetProperty key
        Expect.equal ((at "model" "num_hidden_layers").GetInt32()) 12 "layers"
        Expect.equal ((at "recipe" "global_batch_size").GetInt32()) 64 "batch"
        Expect.equal ((at "optimizer" "beta2").GetDouble()) 0.99 "beta2"
        Expect.equal ((at "optimizer" "main_params_dtype").GetString()) "remainder" "Megatron's name of it"
        Expect.equal (at "model" "rope_scaling").ValueKind JsonValueKind.Null "no YaRN"
        Expect.equal ((at "training" "lr_warmup_iters").GetInt32()) 2000 "warm-up")
}

let private passes = test "the passes that are listed are those that a compilation writes down" {
    Dsg.inFolder (fun folder ->
        let listed = succeed folder [ "passes" ]
        compile folder "plan.txt" [ "--dump"; "dump" ]

        let dumped =
            Directory.GetFiles(Path.Combine(folder, "dump"), "*.*")
            |> Array.map (fun f -> nonNull (Path.GetFileName f))
            |> Array.filter (fun f -> Char.IsAsciiDigit f[0])
            |> Array.sort

        let names = "declared" :: (Pipeline.passes |> List.map _.Name)
        Expect.equal [ for f in dumped -> f[3 .. f.IndexOf '.' - 1] ] names "files"

        for i, pass in List.indexed Pipeline.passes do
            Expect.stringContains listed $"%i{i + 1} %s{pass.Name}" "listed"
            Expect.stringContains listed pass.Why "why"

        let last = File.ReadAllText(Path.Combine(folder, "dump", Array.last dumped))
        Expect.stringStarts (File.ReadAllText(Path.Combine(folder, "plan.txt"))) last "the last one is the plan"
        let first = File.ReadAllText(Path.Combine(folder, "dump", dumped[0]))
        Expect.isOk (Text.parse first) "a graph that parses back")
}

let private forms = test "both forms are one plan to every command; diff tells equal from different" {
    Dsg.inFolder (fun folder ->
        compile folder "a.txt" []
        compile folder "a.bin" [ "--recipe"; "deepseek_v3_tiny"; "--format"; "binary" ]
        let path name = Path.Combine(folder, name)
        Expect.equal (PlanFile.Read(path "a.bin")) (PlanFile.Read(path "a.txt")) "content"
        Expect.isLessThan (2L * FileInfo(path "a.bin").Length) (FileInfo(path "a.txt").Length) "bytes"
        Expect.stringContains (succeed folder [ "diff"; "a.txt"; "a.bin" ]) "equal" "diff"
        Expect.stringContains (succeed folder [ "check"; "a.bin" ]) "8 ranks holds" "check"
        let text = File.ReadAllText(path "a.txt")
        Expect.stringStarts text (succeed folder [ "show"; "a.bin" ]) "show"

        compile folder "b.txt" [ "--set"; "model.num_layers=5"; "--set"; "recipe.layout=Ettt|ttmL" ]
        let apart = Dsg.run folder [ "diff"; "a.bin"; "b.txt" ]
        Expect.equal (apart.Code, apart.Error) (1, "") "exit code"

        for line in
            [
                "- model.num_hidden_layers=4"
                "+ model.num_hidden_layers=5"
                "- layout Ettt|tmL"
                "+ model.layers.5."
                "stage 1, program F"
            ] do
            Expect.stringContains apart.Out line "difference"

        Expect.isFalse (apart.Out.Contains "stage 0, units") "the first stage holds the same units"

        let bytes = File.ReadAllBytes(path "a.bin")
        bytes[bytes.Length / 2] <- bytes[bytes.Length / 2] ^^^ 4uy
        File.WriteAllBytes(path "a.bin", bytes)
        let damaged = Dsg.run folder [ "run"; "a.bin" ]
        Expect.equal damaged.Code 1 "exit code"
        Expect.stringStarts damaged.Error "error DSG060" "damage is told")
}

let private explain =
    test "a plan is explained: FLOPs that add up, memory, and every collective with its cause and link" {
        Dsg.inFolder (fun folder ->
            compile folder "plan.txt" []

            let explained nodes =
                JsonDocument.Parse(succeed folder [ "explain"; "plan.txt"; "--json"; "--gpus-per-node"; nodes ])

            use json = explained "2"
            let root = json.RootElement
            let flops = root.GetProperty "flops_per_token"
            let number (e: JsonElement) (key: string) = e.GetProperty(key).GetDouble()
            let parts = [ for p in flops.GetProperty("parts").EnumerateArray() -> p ]
            let sum key = parts |> List.sumBy (fun p -> number p key)
            Expect.equal (sum "formula") (number flops "formula") "formula"
            Expect.floatClose Accuracy.high (sum "formula" + sum "difference") (number flops "plan") "differences"

            for part in parts do
                if number part "difference" <> 0.0 then
                    Expect.isGreaterThan ((nonNull (part.GetProperty("why").GetString())).Length) 10 "named"

            let plan = PlanFile.Read(Path.Combine(folder, "plan.txt"))

            let starts =
                plan.Stages
                |> Seq.sumBy (fun s ->
                    s.Programs |> Seq.sumBy (fun p -> p.Steps |> Seq.filter _.IsStart |> Seq.length))

            let lines = [ for c in root.GetProperty("collectives").EnumerateArray() -> c ]
            Expect.equal lines.Length starts "every collective"
            let text (e: JsonElement) (key: string) = nonNull (e.GetProperty(key).GetString())
            let rules = lines |> List.map (fun c -> text c "rule") |> List.distinct

            for rule in
                [
                    "gather seq for q_b_proj: split over tp"
                    "reduce partial sum of o_proj over tp, split on seq"
                    "dispatch: rows to experts over"
                    "combine: rows to tokens over"
                    "pipeline: a value that stage 1 reads"
                    "gradient sync of "
                ] do
                Expect.isTrue (rules |> List.exists _.StartsWith(rule)) $"%s{rule} in %A{rules}"

            // tp pairs fill a node of two; stages do not
            for c in lines do
                if text c "group" = "tp" then
                    Expect.equal (text c "link") "intra-node" (text c "rule")

                if text c "kind" = "send" then
                    Expect.equal (text c "link") "inter-node" (text c "rule")

            use whole = explained "8"

            for c in whole.RootElement.GetProperty("collectives").EnumerateArray() do
                Expect.equal (text c "link") "intra-node" "eight ranks are one node"

            let readable = succeed folder [ "explain"; "plan.txt" ]
            Expect.stringContains readable "attention core" "FLOPs"
            Expect.stringContains readable "memory of a rank" "memory")
    }

/// A line of the plan's text that starts so, with the number behind `key` raised by one.
let private raise' (start: string) (key: string) (text: string) =
    let at = text.IndexOf("\n" + start, StringComparison.Ordinal)
    let from = text.IndexOf(key, at, StringComparison.Ordinal) + key.Length
    let until = text.IndexOfAny([| ' '; '\n' |], from)
    let number = Int64.Parse(text.AsSpan(from, until - from)) + 1L
    text.Substring(0, from) + string number + text.Substring until

let private whole =
    test "the 671B plan: FLOPs by Megatron's formula, every difference named, and no byte count can be changed" {
        Dsg.inFolder (fun folder ->
            let out = "v3.plan"
            succeed folder [ "compile"; "--recipe"; "deepseek_v3_pretrain"; "--out"; out ] |> ignore
            use json = JsonDocument.Parse(succeed folder [ "explain"; out; "--json" ])
            let flops = json.RootElement.GetProperty "flops_per_token"
            Expect.equal (flops.GetProperty("formula").GetInt64()) 259_992_950_784L "with MTP"

            let named = [
                for part in flops.GetProperty("parts").EnumerateArray() do
                    let text (key: string) = nonNull (part.GetProperty(key).GetString())
                    let difference = part.GetProperty("difference").GetDouble()
                    Expect.equal (text "why" <> "") (difference <> 0.0) (text "part")

                    if difference <> 0.0 then
                        text "part", difference
            ]

            for part in [ "router"; "norms"; "attention core"; "logits"; "rotation" ] do
                Expect.exists named (fun (name, _) -> name = part) part

            Expect.floatClose
                Accuracy.high
                (259_992_950_784.0 + List.sumBy snd named)
                (flops.GetProperty("plan").GetDouble())
                "formula and differences are what the plan computes"

            let path = Path.Combine(folder, out)
            let text = File.ReadAllText path

            for start, key in [ "memory 7 ", " peak="; "region F I ", " stride=" ] do
                File.WriteAllText(path, raise' start key text)
                let refused = Dsg.run folder [ "check"; out ]
                Expect.equal refused.Code 1 $"%s{start}: %s{refused.Out}"
                Expect.stringStarts refused.Error "error DSG06" start)
    }

let private paths = test "which code a GPU runs: told in a table, a line and at each launch, and chosen by a setting" {
    Dsg.inFolder (fun folder ->
        let rows out settings =
            let options = settings |> List.collect (fun s -> [ "--set"; s ])

            succeed folder ([ "compile"; "--recipe"; "deepseek_v3_proxy"; "--out"; out ] @ options) |> ignore

            use json = JsonDocument.Parse(succeed folder [ "explain"; out; "--json" ])

            [
                for row in json.RootElement.GetProperty("paths").EnumerateArray() do
                    let text (key: string) = nonNull (row.GetProperty(key).GetString())
                    text "kernel", (text "path", text "why", row.GetProperty("launches").GetInt64())
            ]
            |> Map

        let auto = rows "auto.plan" []
        let exact = rows "exact.plan" [ "recipe.attention_backend=unfused" ]
        let kernels = [ "attention"; "attention_grad"; "grouped_mat_mul"; "grouped_weight_grad" ]
        Expect.equal (List.ofSeq auto.Keys) kernels "kernels"

        for kernel in kernels do
            let path, why, launches = auto[kernel]
            Expect.equal (path, why) ("library", "") kernel
            Expect.isGreaterThan launches 0L kernel
            let asked = if kernel.StartsWith "attention" then "exact", "asked for" else "library", ""
            let path, why, again = exact[kernel]
            Expect.equal ((path, why), again) (asked, launches) $"%s{kernel} when exact attention is asked for"

        let readable = succeed folder [ "explain"; "exact.plan" ]
        Expect.stringContains readable "which code a GPU runs" "table"
        let line = succeed folder [ "show"; "exact.plan"; "--summary" ]
        let launches kernel = exact[kernel] |> fun (_, _, n) -> $"%s{kernel} %i{n}"
        let asked = $"""exact (asked for): %s{launches "attention"}, %s{launches "attention_grad"}"""
        Expect.stringContains line asked "summary"

        Expect.stringContains (succeed folder [ "show"; "exact.plan" ]) "\"exact\"" "launches"
        let difference = (Dsg.run folder [ "diff"; "auto.plan"; "exact.plan" ]).Out
        Expect.stringContains difference "attention_backend" "the setting"
        Expect.stringContains difference "\"exact\"" "the launches")
}

let tests = testList "Plan" [ recipes; passes; forms; explain; paths; whole ]

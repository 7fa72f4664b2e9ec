/// Declarations: sizes, units, anchors, configurations and the weight map.
module DeepSeekGraph.Models.Tests.ModelTests

open System
open System.IO
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Models
open DeepSeekGraph.Models.HuggingFace
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Models.Tests.Golden

let private codes (action: unit -> 'T) =
    try
        action () |> ignore
        []
    with :? DiagnosticException as e -> [ for d in e.Diagnostics -> d.Code ]

let private published case = path case "config.published-style.json"

/// The example of the design page: a model of one's own in a few lines.
let tinyMoe (hidden: int) (experts: int) =
    Model.Of(fun m ids ->
        let x = m.Embedding("embed", ids, 64, hidden)

        let x = x + m.Scope("attn", fun s -> Attention.Mla(s, s.RmsNorm("norm", x), heads = 4, kvLora = 32))

        let x = x + m.Scope("moe", fun s -> Experts.Moe(s, s.RmsNorm("norm", x), experts, topK = 2, ffn = 64))

        m.Linear("head", m.RmsNorm("norm", x), struct ("vocab", 64)))

let private own =
    testCase "a model of one's own differentiates, and belongs to the embedding's unit"
    <| fun () ->
        let graph = (tinyMoe 32 8).Declare(2, 8)
        Expect.isEmpty (Verify.check graph) "legal"

        for node in graph.Nodes do
            Expect.isTrue
                (List.contains node.Origin.Unit [ ModelUnit.Shared; ModelUnit.Embed; ModelUnit.Head ])
                $"%O{node.Origin.Unit}"

        match Autodiff.differentiate "loss" graph with
        | Ok joint -> Expect.isEmpty (Verify.check joint) "legal with gradients"
        | Error e -> failtest $"%A{e}"

let private counts =
    testCase "DeepSeek-V3 has the published number of parameters"
    <| fun () ->
        let count depths =
            ParameterList.Count(DeepSeekV3(DeepSeekV3Config(NumNextnPredictLayers = depths)).Declare(1, 4096))

        Expect.equal (count 0) 671_026_419_200L "main model"
        Expect.equal (count 1) 682_636_487_424L "with multi-token prediction"

let private units =
    testCase "every node with parameters in its past belongs to a unit, in order"
    <| fun () ->
        let graph = DeepSeekV3(Presets.Tiny).Declare(2, 16)
        Expect.isEmpty (Verify.check graph) "legal"

        let part v = (graph.NodeOf v).Origin.Unit
        let source v = (graph.NodeOf v).Inputs.Length = 0

        for node in graph.Nodes do
            for v in node.Inputs do
                Expect.isTrue (source v || part v <= node.Origin.Unit) $"%s{node.Origin.Path} reads later %O{part v}"

        Expect.equal
            (graph.Nodes
             |> Array.map _.Origin.Unit
             |> Array.distinct
             |> Array.sort
             |> Array.map string
             |> List.ofArray)
            [
                "shared"
                "embed"
                "layer.0"
                "layer.1"
                "layer.2"
                "layer.3"
                "mtp.0"
                "head"
            ]
            "units"

        let final = graph.Nodes |> Array.find (fun n -> n.Origin.Path = "model" && n.Op.IsRmsNorm)

        Expect.equal final.Origin.Unit (ModelUnit.Layer 3) "the final norm is with the last layer"

        Expect.equal
            (graph.Outputs |> Array.map fst |> Array.sort |> List.ofArray)
            [
                yield! [
                    for l in 1..4 -> $"count:model.layers.%i{l}.mlp.gate.e_score_correction_bias"
                ]
                "loss"
                yield! [ for _ in 1..4 -> "metric:balance_loss" ]
                "metric:loss"
                "metric:mtp_loss"
            ]
            "outputs"

let private differentiates =
    testCase "presets differentiate: one gradient for each trained parameter"
    <| fun () ->
        for config in [ Presets.Tiny; Presets.Proxy ] do
            let graph = DeepSeekV3(config).Declare(1, 32)

            match Autodiff.differentiate "loss" graph with
            | Error e -> failtest $"%A{e}"
            | Ok joint ->
                Expect.isEmpty (Verify.check joint) "legal"

                let trained = [
                    for p in ParameterList.Of graph do
                        if p.Spec.Update.IsAdamW then
                            $"grad:%s{p.Name}"
                ]

                let gradients =
                    joint.Outputs |> Array.map fst |> Array.filter (fun n -> n.StartsWith "grad:") |> Array.distinct

                Expect.equal (List.sort (List.ofArray gradients)) (List.sort trained) "gradients"

let private scale =
    testCase "YaRN's softmax scale is the published one"
    <| fun () ->
        Expect.floatClose { absolute = 1e-10; relative = 1e-9 } Presets.V3.SoftmaxScale 0.1352337789 "V3"
        Expect.equal Presets.V3.Rotary.Mscale 1.0 "cos and sin"
        Expect.equal (DeepSeekV3Config(RopeScaling = null).SoftmaxScale) (1.0 / sqrt 192.0) "plain"

let private flops =
    testCase "FLOPs of a token are Megatron's"
    <| fun () ->
        let plain = DeepSeekV3Config(NumNextnPredictLayers = 0)
        Expect.equal (Flops.PerToken(Presets.V3, 4096)) 259_992_950_784.0 "with multi-token prediction"
        Expect.equal (Flops.PerToken(plain, 4096)) 249_812_054_016.0 "without"
        Expect.equal (Flops.PerToken(Presets.V3, 131_072)) 1_227_367_225_344.0 "long"

let private configs =
    testCase "both styles of config.json are the same model"
    <| fun () ->
        for case in [ "v3_tiny_plain"; "v3_tiny_yarn"; "v3_tiny_mtp" ] do
            Expect.equal (ConfigJson.Read(published case)) (ConfigJson.Read(path case "config.json")) case

        Expect.isNull (ConfigJson.Read(published "v3_tiny_plain").RopeScaling) "plain"

let private refused =
    testCase "a config.json that is not legal is told by code and field"
    <| fun () ->
        let text = File.ReadAllText(published "v3_tiny_yarn")

        let changed (from: string) (into: string) () = ConfigJson.Parse(text.Replace(from, into))

        Expect.equal (codes (fun () -> ConfigJson.Read "nowhere")) [ Codes.ConfigUnreadable ] "missing"
        Expect.equal (codes (fun () -> ConfigJson.Parse "[1]")) [ Codes.ConfigUnreadable ] "no object"
        Expect.equal (codes (fun () -> ConfigJson.Parse "{")) [ Codes.ConfigUnreadable ] "no JSON"

        Expect.equal (codes (changed "\"hidden_size\": 64" "\"hidden_size\": \"x\"")) [ Codes.ConfigUnreadable ] "type"

        Expect.equal (codes (changed "\"hidden_size\": 64," "")) [ Codes.ConfigUnreadable ] "absent"
        Expect.equal (codes (changed "sigmoid" "tanh")) [ Codes.ConfigUnsupported ] "scores"
        Expect.equal (codes (changed "\"yarn\"" "\"linear\"")) [ Codes.ConfigUnsupported ] "rope"
        Expect.equal (codes (changed "\"n_group\": 4" "\"n_group\": 5")) [ Codes.ConfigIllegal ] "groups"

        Expect.equal
            (codes (changed "\"num_experts_per_tok\": 4" "\"num_experts_per_tok\": 9"))
            [ Codes.ConfigIllegal ]
            "top-k"

/// Fields of a legal file, each replaced by what does not belong there.
let private hostile =
    testCase "no value in a config.json ends in anything but a diagnostic or a model"
    <| fun () ->
        let values = [
            "-1"
            "0"
            "3"
            "2147483647"
            "1e300"
            "1e999"
            "0.5"
            "\"x\""
            "null"
            "true"
            "[]"
            "{}"
        ]

        for style in [ "config.json"; "config.published-style.json" ] do
            let lines = File.ReadAllLines(path "v3_tiny_yarn" style)

            for n in 0 .. lines.Length - 1 do
                match lines[n].IndexOf "\": " with
                | -1 -> ()
                | at when lines[n].EndsWith '{' -> ignore at
                | at ->
                    for value in values do
                        let comma = if lines[n].EndsWith ',' then "," else ""
                        let changed = lines[n].Substring(0, at + 3) + value + comma
                        let text = lines |> Array.updateAt n changed |> String.concat "\n"

                        codes (fun () -> DeepSeekV3(ConfigJson.Parse text).Declare(1, 4))
                        |> List.iter (fun code -> Expect.stringStarts code "DSG" changed)

let private mistakes =
    testCase "an illegal configuration or batch is refused at the declaration, every mistake at once"
    <| fun () ->
        let declare (config: DeepSeekV3Config) b s () = DeepSeekV3(config).Declare(b, s)
        let odd = DeepSeekV3Config(QkRopeHeadDim = 63, NGroup = 7)
        Expect.equal (codes (declare odd 1 8)) [ Codes.ConfigIllegal; Codes.ConfigIllegal ] "two"
        Expect.equal (codes (declare Presets.Tiny 0 8)) [ Codes.BatchIllegal ] "batch"
        Expect.equal (codes (fun () -> Presets.Named "huge")) [ Codes.UnknownModel ] "name"

let private weights =
    testCase "the weight map meets every tensor of the checkpoint once"
    <| fun () ->
        for case in [ "v3_tiny_plain"; "v3_tiny_mtp" ] do
            let config = ConfigJson.Read(path case "config.json")
            let map = WeightMap.Of(DeepSeekV3(config).Declare(1, 8))
            use file = SafeTensorsFile.Open(path case "model.safetensors")

            let met = [
                for entry in map.Entries do
                    let mutable at = 0L

                    for piece in entry.Pieces do
                        Expect.equal piece.Offset at "no gap"
                        at <- at + piece.Elements

                        Expect.equal
                            [ for n in piece.Shape -> int64 n ]
                            (List.ofSeq (file.Info piece.Tensor).Shape)
                            piece.Tensor

                        piece.Tensor

                    Expect.equal at entry.Elements "no end left"

                for struct (copy, original) in WeightMap.Copies config do
                    Expect.equal (file.ReadFloat32 copy) (file.ReadFloat32 original) copy
                    copy
            ]

            Expect.equal (List.sort met) (List.sort (List.ofSeq file.Names)) case

let private gathers =
    testCase "gathered, then scattered weights are the checkpoint's"
    <| fun () ->
        use case = load "v3_tiny_mtp" 1 8

        for entry in case.Map.Entries do
            for struct (tensor, _, values) in case.Map.Scatter(entry.Parameter, parameter case entry.Parameter) do
                Expect.equal values (case.Weights.ReadFloat32 tensor) tensor

        let short = Func<string, float32[]>(fun _ -> Array.zeroCreate 3)

        Expect.equal (codes (fun () -> case.Map.Gather("lm_head.weight", short))) [ Codes.WeightsMismatch ] "size"

let tests =
    testList "declarations" [
        own
        counts
        units
        differentiates
        scale
        flops
        configs
        refused
        hostile
        mistakes
        weights
        gathers
    ]

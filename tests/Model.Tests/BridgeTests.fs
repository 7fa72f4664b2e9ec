/// Checkpoints in and out: what is wrong is told by name, what is right comes back bit for bit.
module DeepSeekGraph.Models.Tests.BridgeTests

open System
open System.Collections.Generic
open System.IO
open System.Runtime.InteropServices
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Models.HuggingFace
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Models.Tests.Golden

let inFolder (body: string -> 'T) : 'T =
    let folder = Directory.CreateTempSubdirectory "dsg-bridge-"

    try
        body folder.FullName
    finally
        folder.Delete true

let diagnostics (action: unit -> 'T) =
    try
        action () |> ignore
        []
    with :? DiagnosticException as e ->
        List.ofSeq e.Diagnostics

let codes action = diagnostics action |> List.map _.Code

/// A folder of the repository's golden cases, or of those beside it.
let folderOf (case: string) =
    let own = Path.Combine(root, "tests", "golden", case)
    let shared = Path.GetFullPath(Path.Combine(root, "..", "shared", "golden", case))
    [ own; shared ] |> List.tryFind Directory.Exists

let golden case = folderOf case |> Option.get

/// Tensors of a file as entries to write again.
let entries (path: string) =
    use file = SafeTensorsFile.Open path

    [
        for name in file.Names ->
            let info = file.Info name
            SafeTensorEntry(name, info.DType, info.Shape, ReadOnlyMemory(file.Bytes(name).ToArray()))
    ]

/// A copy of a golden case with other weights, for as long as the body runs.
let changed (case: string) (change: SafeTensorEntry list -> SafeTensorEntry list) (body: string -> 'T) =
    inFolder (fun folder ->
        for file in [ "config.json"; "reference.safetensors" ] do
            File.Copy(path case file, Path.Combine(folder, file))

        SafeTensorsWriter.Write(
            Path.Combine(folder, "model.safetensors"),
            change (entries (path case "model.safetensors"))
        )

        body folder)

let on name (f: SafeTensorEntry -> SafeTensorEntry) (all: SafeTensorEntry list) =
    Expect.exists all (fun e -> e.Name = name) name
    all |> List.map (fun e -> if e.Name = name then f e else e)

let without name (all: SafeTensorEntry list) = all |> List.filter (fun e -> e.Name <> name)

let setFloat i (value: float32) (e: SafeTensorEntry) =
    let bytes = e.Data.ToArray()
    MemoryMarshal.Cast<byte, float32>(bytes.AsSpan())[i] <- value
    SafeTensorEntry(e.Name, e.DType, e.Shape, ReadOnlyMemory bytes)

/// An expert bank and a copy of the head, among others.
let private spoilt =
    testCase "every problem of a checkpoint is told at once, by tensor"
    <| fun () ->
        let layer = "model.layers.2.mlp"

        let spoil =
            without $"%s{layer}.experts.3.up_proj.weight"
            >> on "model.norm.weight" (fun e -> SafeTensorEntry(e.Name, e.DType, [| 32L; 2L |], e.Data))
            >> on "model.layers.0.input_layernorm.weight" (fun e -> SafeTensorEntry(e.Name, "I32", e.Shape, e.Data))
            >> on $"%s{layer}.gate.weight" (setFloat 5 nanf)
            >> on "model.layers.3.shared_head.head.weight" (setFloat 0 0.5f)
            >> fun all ->
                SafeTensorEntry(
                    $"%s{layer}.experts.16.up_proj.weight",
                    "F32",
                    [| 1L |],
                    ReadOnlyMemory(Array.zeroCreate<byte> 4)
                )
                :: SafeTensorEntry(
                    "model.layers.1.self_attn.rotary_emb.inv_freq",
                    "F32",
                    [| 1L |],
                    ReadOnlyMemory(Array.zeroCreate<byte> 4)
                )
                :: all

        changed "v3_tiny_mtp" spoil (fun folder ->
            use bridge = AutoBridge.FromHfPretrained folder
            let found = diagnostics (fun () -> bridge.Load)

            let told = [ for d in found -> d.Code, d.At.Substring(d.At.IndexOf ", " + 2) ]

            Expect.equal
                (List.sort told)
                (List.sort [
                    Codes.WeightsMismatch, $"%s{layer}.experts.3.up_proj.weight"
                    Codes.WeightsMismatch, "model.norm.weight"
                    Codes.WeightsMismatch, "model.layers.0.input_layernorm.weight"
                    Codes.WeightsNotFinite, $"%s{layer}.gate.weight"
                    Codes.CopiesDiffer, "model.layers.3.shared_head.head.weight"
                    Codes.WeightsUnknown, $"%s{layer}.experts.16.up_proj.weight"
                ])
                "found")

let private withoutMtp =
    testCase "a checkpoint that lacks multi-token prediction says so once, and loads without"
    <| fun () ->
        let drop = List.filter (fun (e: SafeTensorEntry) -> not (e.Name.StartsWith "model.layers.3."))

        changed "v3_tiny_mtp" drop (fun folder ->
            use bridge = AutoBridge.FromHfPretrained folder
            Expect.equal (codes (fun () -> bridge.Load)) [ Codes.MtpWeightsMissing ] "with"
            use plain = AutoBridge.FromHfPretrained(folder, true)
            Expect.equal plain.Config.NumNextnPredictLayers 0 "without"
            Expect.isEmpty (codes (fun () -> plain.Load)) "without")

        // and one that has them may be loaded without
        use bridge = AutoBridge.FromHfPretrained(golden "v3_tiny_mtp", true)
        Expect.isEmpty (codes (fun () -> bridge.Load)) "not asked for"

let private hub =
    testCase "a hub name is looked up in the local cache; without it, the command that downloads it is told"
    <| fun () ->
        inFolder (fun cache ->
            let model = Path.Combine(cache, "models--tiny-org--v3.tiny")
            let revision = "0123456789abcdef0123456789abcdef01234567"
            let snapshot = Path.Combine(model, "snapshots", revision)
            let blobs = Path.Combine(model, "blobs")

            for folder in [ snapshot; blobs; Path.Combine(model, "refs") ] do
                Directory.CreateDirectory folder |> ignore

            File.WriteAllText(Path.Combine(model, "refs", "main"), revision)

            for file in [ "config.json"; "model.safetensors" ] do
                let blob = Path.Combine(blobs, file + ".blob")
                File.Copy(path "v3_tiny_plain" file, blob)

                File.CreateSymbolicLink(
                    Path.Combine(snapshot, file),
                    Path.Combine("..", "..", "blobs", file + ".blob")
                )
                |> ignore

            let before = Environment.GetEnvironmentVariable "HF_HUB_CACHE"
            Environment.SetEnvironmentVariable("HF_HUB_CACHE", cache)

            try
                use bridge = AutoBridge.FromHfPretrained "tiny-org/v3.tiny"
                Expect.equal bridge.Folder snapshot "folder"
                Expect.isEmpty (codes (fun () -> bridge.Load)) "weights"

                match diagnostics (fun () -> AutoBridge.FromHfPretrained "tiny-org/other") with
                | [ d ] ->
                    Expect.equal d.Code Codes.CheckpointMissing "code"
                    Expect.equal d.Help "hf download tiny-org/other" "command"
                | other -> failtestf "%A" other

                for odd in [ "../v3"; "a/b/c"; "/nowhere"; ""; "or..g/x" ] do
                    match diagnostics (fun () -> AutoBridge.FromHfPretrained odd) with
                    | [ d ] ->
                        Expect.equal d.Code Codes.CheckpointMissing odd
                        Expect.isFalse (d.Help.Contains "hf download") odd
                    | other -> failtestf "%s: %A" odd other
            finally
                Environment.SetEnvironmentVariable("HF_HUB_CACHE", before))

let recipe (tp, pp, ep) = Recipe.Default.WithParallelism(tp, pp, ep, 0)

/// Weights of a checkpoint in a trainer of some layout.
let private loaded (bridge: AutoBridge) (recipe: Recipe) (body: Trainer -> unit) =
    let data = (Compilation.Mesh recipe).Data
    let plan = bridge.ToModel().Compile(recipe.WithBatch(data, 1, 8))

    task {
        use! trainer = Trainer.StartAsync(plan, TrainerOptions(Weights = bridge.Load, Executor = Executor.Interpreter))
        body trainer
    }
    |> _.GetAwaiter().GetResult()

let private bytesOf (folder: string) =
    use set = SafeTensorsSet.Open folder

    Map [
        for name in set.Names ->
            name, ((set.Info name).DType, List.ofSeq (set.Info name).Shape, set.FileOf(name).Bytes(name).ToArray())
    ]

let private roundTrip =
    testList "imported, then exported, is the same bits" [
        for name, change in
            [
                "one rank", (fun (_: Recipe) -> recipe (1, 1, 1))
                "2 x 2, experts over 2", (fun _ -> recipe (2, 2, 2))
                "bf16 with fp32 masters", (fun _ -> (recipe (1, 2, 4)).WithDType DType.BFloat16)
            ] do
            testCase name
            <| fun () ->
                inFolder (fun folder ->
                    let out = Path.Combine(folder, "out")
                    use bridge = AutoBridge.FromHfPretrained(golden "v3_tiny_mtp")
                    loaded bridge (change Recipe.Default) (fun trainer -> bridge.ExportCheckpoint(trainer, out))
                    let before, after = bytesOf bridge.Folder, bytesOf out
                    Expect.equal (Map.keys after |> List.ofSeq) (Map.keys before |> List.ofSeq) "names"

                    for pair in before do
                        let dtype, shape, bytes = after[pair.Key]
                        let dtype', shape', bytes' = pair.Value
                        Expect.equal (dtype, shape) (dtype', shape') pair.Key
                        Expect.isTrue (bytes.AsSpan().SequenceEqual(bytes'.AsSpan())) pair.Key

                    Expect.equal (ConfigJson.Read out) bridge.Config "config"

                    Expect.stringContains
                        (File.ReadAllText(Path.Combine(out, "config.json")))
                        "eos_token_id"
                        "its other fields"

                    use again = AutoBridge.FromHfPretrained out
                    Expect.isEmpty (codes (fun () -> again.Load)) "it loads")
    ]

let private trained =
    testCase "a checkpoint that is loaded, trained and exported is a checkpoint, with other weights"
    <| fun () ->
        inFolder (fun folder ->
            let out = Path.Combine(folder, "out")
            use bridge = AutoBridge.FromHfPretrained(golden "v3_tiny_plain")
            let tokens = Array.init (4 * 9) (fun i -> int64 (i * i % 512))

            let batches = {
                new IBatchSource with
                    member _.Get _ = TrainingBatch(4, 9, tokens)
            }

            let plan = bridge.ToModel().Compile((recipe (2, 2, 2)).WithBatch(4, 1, 8).WithDType DType.BFloat16)

            task {
                use! trainer =
                    Trainer.StartAsync(
                        plan,
                        TrainerOptions(
                            Batches = batches,
                            Weights = bridge.Load,
                            Executor = Executor.Interpreter,
                            LearningRate = LearningRate(1e-3, 1e-3, 0L, 0L)
                        )
                    )

                let run = trainer.RunAsync(3L).GetAsyncEnumerator()
                let losses = List<float>()
                let mutable more = true

                while more do
                    let! next = run.MoveNextAsync()
                    more <- next

                    if more then
                        losses.Add run.Current.Loss

                Expect.isLessThan losses[2] losses[0] "it learns"
                bridge.ExportCheckpoint(trainer, out)
            }
            |> _.GetAwaiter().GetResult()

            use again = AutoBridge.FromHfPretrained out
            Expect.isEmpty (codes (fun () -> again.Load)) "it loads"
            let before, after = bytesOf bridge.Folder, bytesOf out

            // the bias moves by its speed, against the load
            for name in
                [
                    "model.layers.0.self_attn.o_proj.weight"
                    "model.layers.1.mlp.gate.e_score_correction_bias"
                ] do
                let _, _, was = before[name]
                let _, _, is = after[name]
                Expect.isFalse (is.AsSpan().SequenceEqual(was.AsSpan())) name)

/// Sizes beyond one block, and ragged.
let private ragged =
    DeepSeekV3Config(
        VocabSize = 16,
        HiddenSize = 136,
        NumHiddenLayers = 2,
        NumAttentionHeads = 2,
        QLoraRank = 0,
        KvLoraRank = 8,
        QkNopeHeadDim = 4,
        QkRopeHeadDim = 2,
        VHeadDim = 3,
        IntermediateSize = 150,
        FirstKDenseReplace = 1,
        MoeIntermediateSize = 130,
        NRoutedExperts = 4,
        NumExpertsPerTok = 2,
        NGroup = 2,
        TopkGroup = 1,
        NumNextnPredictLayers = 1
    )

let private fp8 =
    testCase "fp8 export: linear layers in ragged blocks, all else as it was; it reads back as what the blocks say"
    <| fun () ->
        inFolder (fun folder ->
            let map = WeightMap.Of ragged
            let values = Dictionary<string, torch.Tensor>()

            for entry in map.Entries do
                let shape = [| for n in entry.Shape -> int64 n |]
                values[entry.Parameter] <- torch.randn (shape, generator = new torch.Generator(uint64 values.Count))

            let out = Path.Combine(folder, "out")

            let given (place: WeightPlace) =
                use flat = values[place.Entry.Parameter].reshape(-1L)
                use part = flat.narrow (0L, place.Piece.Offset, place.Piece.Elements)
                part.reshape [| for n in place.Piece.Shape -> int64 n |]

            let options = ExportOptions(Type = torch.ScalarType.Float32, Fp8 = true, ShardBytes = 100_000L)
            CheckpointExport.Write(ragged, Func<_, _> given, out, options)
            Expect.isTrue (File.Exists(Path.Combine(out, "model.safetensors.index.json"))) "shards"
            use bridge = AutoBridge.FromHfPretrained out
            Expect.equal bridge.Config (ConfigJson.Parse(ConfigJson.Write ragged)) "config"
            let load = bridge.Load
            let mutable inBlocks = 0

            for entry in map.Entries do
                use read = load.Invoke entry.Parameter |> nonNull |> _.reshape(-1L)
                use flat = values[entry.Parameter].reshape(-1L)

                for piece in entry.Pieces do
                    let blocks = (map.Tensors ragged |> Seq.find (fun t -> t.Name = piece.Tensor)).Blocks
                    use mine = read.narrow (0L, piece.Offset, piece.Elements)
                    use original = flat.narrow (0L, piece.Offset, piece.Elements)

                    if blocks then
                        inBlocks <- inBlocks + 1
                        use matrix = original.reshape [| for n in piece.Shape -> int64 n |]
                        use quantised = Fp8Blocks.Quantize(matrix, piece.Tensor)

                        use expected =
                            Fp8Blocks.Dequantize(quantised.Weight, quantised.Scales, torch.ScalarType.Float32)

                        Expect.isTrue (expected.reshape(-1L).equal(mine).all().item<bool>()) piece.Tensor
                        Expect.equal (bridge.Tensors.Info piece.Tensor).DType "F8_E4M3" piece.Tensor
                    else
                        Expect.isTrue (original.equal(mine).all().item<bool>()) piece.Tensor
                        Expect.equal (bridge.Tensors.Info piece.Tensor).DType "F32" piece.Tensor

            Expect.isGreaterThan inBlocks 40 "blocks")

let private spoiltFp8 =
    testCase "fp8: a code or a scale that is NaN, and scales that are missing or of another grid, are told by weight"
    <| fun () ->
        inFolder (fun folder ->
            let source = Path.Combine(folder, "source")
            let ones (place: WeightPlace) = torch.ones [| for n in place.Piece.Shape -> int64 n |]
            CheckpointExport.Write(ragged, Func<_, _> ones, source, ExportOptions(Fp8 = true))
            let all = entries (Path.Combine(source, "model.safetensors"))
            let weight = "model.layers.1.mlp.experts.2.up_proj.weight"
            let scales = WeightMap.ScalesOf weight

            let setCode (e: SafeTensorEntry) =
                let bytes = e.Data.ToArray()
                bytes[77] <- 0xFFuy
                SafeTensorEntry(e.Name, e.DType, e.Shape, ReadOnlyMemory bytes)

            for name, code, spoil in
                [
                    "as it is", None, id
                    "code", Some Codes.WeightsNotFinite, on weight setCode
                    "scale", Some Codes.WeightsNotFinite, on scales (setFloat 1 nanf)
                    "no scales", Some Codes.Fp8Blocks, without scales
                    "grid",
                    Some Codes.Fp8Blocks,
                    on scales (fun e -> SafeTensorEntry(e.Name, e.DType, [| 4L; 1L |], e.Data))
                ] do
                let changed = Path.Combine(folder, name)
                Directory.CreateDirectory changed |> ignore
                File.Copy(Path.Combine(source, "config.json"), Path.Combine(changed, "config.json"))
                SafeTensorsWriter.Write(Path.Combine(changed, "model.safetensors"), spoil all)
                use bridge = AutoBridge.FromHfPretrained changed

                let told = [ for d in diagnostics (fun () -> bridge.Load) -> d.Code, d.At.EndsWith weight ]

                Expect.equal told [ for c in Option.toList code -> c, true ] name)

let tests = testList "bridge" [ spoilt; withoutMtp; hub; roundTrip; trained; fp8; spoiltFp8 ]

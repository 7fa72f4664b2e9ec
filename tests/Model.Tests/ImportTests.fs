/// Published weights in and out: bitwise through any plan, mistakes by name, and the small files that go along.
module DeepSeekGraph.Models.Tests.ImportTests

open System
open System.IO
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Models.HuggingFace
open DeepSeekGraph.Runtime.Checkpoints
open DeepSeekGraph.Runtime.Parameters
open DeepSeekGraph.Runtime.Training
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Models.Tests.ResumeTests

/// Type, shape and bytes by name.
let private tensors (folder: string) =
    use set = SafeTensorsSet.Open folder

    dict [
        for name in set.Names do
            let info = set.Info name
            name, (info.DType, List.ofSeq info.Shape, set.FileOf(name).Bytes(name).ToArray())
    ]

let private same (expected: string) (found: string) =
    let a, b = tensors expected, tensors found
    Expect.sequenceEqual (Seq.sort b.Keys) (Seq.sort a.Keys) "names"

    for name in a.Keys do
        if a[name] <> b[name] then
            failtest $"%s{name} differs"

/// Degrees tp, pp, ep, dp and a layout.
let private recipe (tensor, pipeline, expert, data) layout =
    Recipe.Default.WithName("imported").WithParallelism(tensor, pipeline, expert, data).WithLayout(layout)
    |> fun r -> r.WithBatch((Compilation.Mesh r).Data * pipeline, 1, 2 * tensor)

let private import (hf: string) (root: string) (recipe: Recipe) (options: ImportOptions) =
    use bridge = AutoBridge.FromHfPretrained hf
    CheckpointImport.Write(bridge, root, (fun model -> model.Compile recipe), options)

let private export (checkpoint: string) (folder: string) (options: StoredExportOptions) =
    use reader = CheckpointReader.Open checkpoint
    StoredExport.Write(reader, folder, options) |> ignore

let private grids = [
    (1, 1, 1, 1), ""
    (2, 2, 2, 2), ""
    (4, 1, 4, 1), ""
    (1, 2, 4, 4), ""
    (2, 1, 1, 2), ""
]

/// The published folder of a case.
let private golden (case: string) = Path.GetDirectoryName(Golden.path case "config.json") |> nonNull

let private shared (case: string) = Path.GetFullPath(Path.Combine(Golden.root, "..", "shared", "golden", case))

/// Weights of one case: into a checkpoint of a grid, moved to another grid by a trainer that saves, and out again.
let private through (hf: string) (compare: string -> unit) (first: Recipe) (second: Recipe) =
    inFolder (fun folder ->
        let root, moved, back = Path.Combine(folder, "in"), Path.Combine(folder, "moved"), Path.Combine(folder, "out")
        let outcome = import hf root first (ImportOptions())
        Expect.isEmpty outcome.Warnings "warnings"
        export root back (StoredExportOptions())
        compare back

        task {
            use bridge = AutoBridge.FromHfPretrained hf
            use checkpoint = CheckpointReader.Open root

            let type' =
                if (nonNull (checkpoint.Find "lm_head.weight")).Dtype = "F32" then
                    DType.Float32
                else
                    DType.BFloat16

            let plan = bridge.ToModel().Compile(second.WithDType type')
            let options = TrainerOptions(Executor = Executor.Interpreter, Checkpoint = checkpoint)
            use! trainer = Trainer.StartAsync(plan, options)
            Expect.hasLength trainer.Remarks 1 "moments start at zero"
            use saver = new CheckpointSaver(trainer, CheckpointOptions(Root = moved, Background = false))
            do! saver.SaveAsync()
        }
        |> _.GetAwaiter().GetResult()

        export moved (back + "2") (StoredExportOptions(ShardBytes = 300_000L))
        compare (back + "2"))

let private roundTrips (case: string) =
    testList case [
        for i, (degrees, layout) in List.indexed grids do
            let other, otherLayout = grids[(i + 1) % grids.Length]

            testCase $"tp, pp, ep, dp %A{degrees}, then %A{other}: bitwise"
            <| fun () -> through (golden case) (same (golden case)) (recipe degrees layout) (recipe other otherLayout)
    ]

/// What an fp8 checkpoint says in bf16, and its biases in fp32.
let private dequantised (hf: string) (found: string) =
    use set = SafeTensorsSet.Open hf
    use ours = SafeTensorsSet.Open found
    let weights = set.Names |> Seq.filter (fun name -> not (name.EndsWith "_scale_inv")) |> List.ofSeq
    Expect.sequenceEqual ours.Names weights "names"
    let mutable blocks = 0

    for name in weights do
        use stored = set.Tensor name
        use ours = ours.Tensor name

        if (set.Info name).DType = "F8_E4M3" then
            blocks <- blocks + 1
            use scales = set.Tensor(name + "_scale_inv")
            use expected = Fp8Blocks.Dequantize(stored, scales, torch.ScalarType.BFloat16)
            Expect.isTrue (expected.bytes.ToArray() = ours.bytes.ToArray()) name
        else
            use expected = stored.to_type ours.dtype
            // plans keep the gate in fp32
            if not (name.EndsWith "mlp.gate.weight") then
                Expect.equal (ours.dtype = torch.ScalarType.Float32) (name.EndsWith "e_score_correction_bias") name

            Expect.isTrue (expected.bytes.ToArray() = ours.bytes.ToArray()) name

    Expect.isGreaterThan blocks 30 "fp8 weights"

let private fp8 =
    let case = shared "v3_tiny_fp8"

    let test how (body: unit -> unit) =
        if Directory.Exists case then
            testCase how body
        else
            ptestCase $"%s{how} (needs ../shared/golden/v3_tiny_fp8)" ignore

    testList "v3_tiny_fp8" [
        for i, (degrees, layout) in List.indexed grids do
            let other, otherLayout = grids[(i + 2) % grids.Length]

            test $"tp, pp, ep, dp %A{degrees}: cuts through blocks take their scales" (fun () ->
                through case (dequantised case) (recipe degrees layout) (recipe other otherLayout))

        test "exported in fp8 again: every weight within half a step of its block" (fun () ->
            inFolder (fun folder ->
                let root, out = Path.Combine(folder, "in"), Path.Combine(folder, "out")
                import case root (recipe (2, 1, 2, 1) "") (ImportOptions()) |> ignore
                export root out (StoredExportOptions(Fp8 = true))
                use set = SafeTensorsSet.Open out
                use reader = CheckpointReader.Open root
                use first = SafeTensorsSet.Open case
                Expect.sequenceEqual set.Names first.Names "the same names, scales among them"
                Expect.equal (ConfigJson.Read out) (ConfigJson.Read case) "configuration"

                Expect.stringContains
                    (File.ReadAllText(Path.Combine(out, "config.json")))
                    "quantization_config"
                    "said"

                for name in set.Names do
                    if (set.Info name).DType = "F8_E4M3" then
                        use a =
                            Fp8Blocks.Dequantize(
                                set.Tensor name,
                                set.Tensor(name + "_scale_inv"),
                                torch.ScalarType.Float32
                            )

                        use b =
                            Fp8Blocks.Dequantize(
                                first.Tensor name,
                                first.Tensor(name + "_scale_inv"),
                                torch.ScalarType.Float32
                            )

                        let most = (a - b).abs().max().item<float32>() / b.abs().max().item<float32>()
                        Expect.isLessThan most (1.0f / 16.0f) name))
    ]

/// A copy of a golden folder whose tensors are changed: None leaves one out.
let private damaged (folder: string) (case: string) (change: string -> SafeTensorEntry -> SafeTensorEntry option) more =
    let hf = Path.Combine(folder, "hf")
    Directory.CreateDirectory hf |> ignore
    File.Copy(Path.Combine(golden case, "config.json"), Path.Combine(hf, "config.json"))
    use set = SafeTensorsSet.Open(golden case)

    let entries = [
        for name in set.Names do
            let info = set.Info name

            let entry =
                SafeTensorEntry(name, info.DType, info.Shape, ReadOnlyMemory(set.FileOf(name).Bytes(name).ToArray()))

            match change name entry with
            | Some entry -> entry
            | None -> ()
        yield! more
    ]

    SafeTensorsWriter.Write(Path.Combine(hf, "model.safetensors"), entries)
    hf

let private withNaN (entry: SafeTensorEntry) =
    let bytes = entry.Data.ToArray()
    BitConverter.GetBytes(nanf).CopyTo(bytes, bytes.Length / 8 * 4)
    SafeTensorEntry(entry.Name, entry.DType, entry.Shape, ReadOnlyMemory bytes)

let private lost, narrow, nan, copied =
    "model.layers.1.mlp.experts.3.up_proj.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.2.mlp.experts.15.down_proj.weight",
    "model.layers.3.embed_tokens.weight"

/// One of each mistake.
let private everyMistake folder =
    damaged
        folder
        "v3_tiny_mtp"
        (fun name entry ->
            if name = lost then
                None
            elif name = narrow then
                Some(SafeTensorEntry(name, entry.DType, Array.rev (Array.ofSeq entry.Shape), entry.Data))
            elif name = nan then
                Some(withNaN entry)
            elif name = copied then
                Some(
                    SafeTensorEntry(name, entry.DType, entry.Shape, ReadOnlyMemory(Array.zeroCreate entry.Data.Length))
                )
            else
                Some entry)
        [
            SafeTensorEntry("model.layers.0.extra.weight", "F32", [| 1L |], ReadOnlyMemory(Array.zeroCreate 4))
        ]

let private mistakes =
    testList "mistakes" [
        test "missing, extra, mis-shaped, NaN and unequal copies are told together, by name, and nothing is written" {
            inFolder (fun folder ->
                let root = Path.Combine(folder, "out")

                try
                    import (everyMistake folder) root (recipe (2, 1, 2, 1) "") (ImportOptions()) |> ignore
                    failtest "it imports"
                with :? DiagnosticException as e ->
                    let told = e.Message

                    for name in [ lost; narrow; nan; copied; "model.layers.0.extra.weight" ] do
                        Expect.stringContains told name "by name"

                    Expect.equal
                        (e.Diagnostics |> Seq.distinctBy _.Code |> Seq.length)
                        e.Diagnostics.Count
                        "one a code"

                Expect.isFalse (Directory.Exists root) "nothing")
        }
        test "not strict: the same as warnings; what is missing starts as in a new model" {
            inFolder (fun folder ->
                let root, out = Path.Combine(folder, "in"), Path.Combine(folder, "out")

                let outcome =
                    import (everyMistake folder) root (recipe (2, 1, 2, 1) "") (ImportOptions(Strict = false))

                let told = String.Join("\n", outcome.Warnings)

                for name in [ lost; narrow; nan; copied; "model.layers.0.extra.weight" ] do
                    Expect.stringContains told name "by name"

                export root out (StoredExportOptions())
                let expected, found = tensors (golden "v3_tiny_mtp"), tensors out

                let differ = [
                    for name in expected.Keys do
                        if expected[name] <> found[name] then
                            name
                ]

                Expect.sequenceEqual (List.sort differ) (List.sort [ lost; narrow; nan ]) "only these"
                let _, _, bytes = found[lost]
                let values = Runtime.InteropServices.MemoryMarshal.Cast<byte, float32>(ReadOnlySpan bytes).ToArray()
                let spread = values |> Array.averageBy (fun x -> x * x) |> sqrt
                Expect.isTrue (spread > 0.01f && spread < 0.1f) $"drawn anew: %f{spread}")
        }
        test "NaN alone, in a rank's slice: nothing is left of the import" {
            inFolder (fun folder ->
                let hf = damaged folder "v3_tiny_plain" (fun name e -> Some(if name = nan then withNaN e else e)) []
                let root = Path.Combine(folder, "out")

                try
                    import hf root (recipe (2, 1, 4, 2) "") (ImportOptions()) |> ignore
                    failtest "it imports"
                with :? DiagnosticException as e ->
                    Expect.equal e.Diagnostics[0].Code Codes.WeightsNotFinite "code"
                    Expect.stringContains e.Message nan "by name"

                Expect.isEmpty (Directory.GetDirectories root) "nothing")
        }
        test "a checkpoint that is of no published model is not exported" {
            inFolder (fun folder ->
                task {
                    let plan =
                        (ModelTests.tinyMoe 32 8)
                            .Compile(Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(2, 1, 8))

                    use! trainer = Trainer.StartAsync(plan, TrainerOptions(Executor = Executor.Interpreter))
                    use saver = new CheckpointSaver(trainer, CheckpointOptions(Root = folder))
                    do! saver.SaveAsync()
                    do! saver.FinishAsync()
                }
                |> _.GetAwaiter().GetResult()

                let out = Path.Combine(folder, "out")

                try
                    export folder out (StoredExportOptions())
                    failtest "it exports"
                with :? DiagnosticException as e ->
                    Expect.equal e.Diagnostics[0].Code Codes.CheckpointModel "code"

                Expect.isFalse (Directory.Exists out) "nothing")
        }
    ]

let private types = test "fp32 weights as bf16, and back as fp32: rounded once, biases as they are" {
    inFolder (fun folder ->
        let root, out = Path.Combine(folder, "in"), Path.Combine(folder, "out")

        import (golden "v3_tiny_plain") root (recipe (2, 1, 2, 1) "") (ImportOptions(DType = DType.BFloat16))
        |> ignore

        export root out (StoredExportOptions(DType = DType.Float32))
        use set = SafeTensorsSet.Open(golden "v3_tiny_plain")
        use ours = SafeTensorsSet.Open out

        for name in set.Names do
            use stored = set.Tensor name
            use found = ours.Tensor name
            use narrow = stored.to_type torch.ScalarType.BFloat16
            use rounded = narrow.to_type torch.ScalarType.Float32
            let expected = if name.EndsWith "e_score_correction_bias" then stored else rounded
            Expect.isTrue (expected.bytes.ToArray() = found.bytes.ToArray()) name)
}

let private remainders =
    test "weights alone, trained on with remainders: what the weights lack, which of bf16 is nothing" {
        inFolder (fun folder ->
            use bridge = AutoBridge.FromHfPretrained(golden "v3_tiny_plain")
            let b16 = DType.BFloat16

            let plan =
                bridge
                    .ToModel()
                    .Compile(
                        (recipe (2, 1, 2, 2) "").WithDType(b16).WithStateTypes(MainParams.Remainder, b16, b16, b16)
                    )

            for dtype in [ DType.Float32; b16 ] do
                let root = Path.Combine(folder, dtype.Name)

                import (golden "v3_tiny_plain") root (recipe (1, 1, 1, 1) "") (ImportOptions(DType = dtype))
                |> ignore

                task {
                    let! trainer = start bridge.Config plan root
                    use checkpoint = CheckpointReader.Open root
                    let sources = StateSources.Of(plan, checkpoint)
                    Expect.exists sources.Remarks (fun r -> r.Contains "weights only") "it says so"
                    let mutable found, lacking = 0, 0

                    for p in plan.Parameters do
                        if p.DType = b16 then
                            found <- found + 1
                            use master = Gathering.Master(trainer.Ranks, p.Stages[0], p.Name)
                            use remainder = Gathering.Slot(trainer.Ranks, p.Stages[0], $"remainder:%s{p.Name}")
                            let stored = nonNull (checkpoint.Find p.Name)
                            let whole = Array.zeroCreate p.Extents.Count
                            use weight = checkpoint.Tensor(stored, Shard(whole, p.Extents, p.Extents), p.Extents)
                            use wide = weight.to_type torch.ScalarType.Float32
                            Expect.isTrue (master.bytes.ToArray() = wide.bytes.ToArray()) p.Name
                            use nothing = remainder.count_nonzero ()

                            if nothing.ToInt64() > 0L then
                                lacking <- lacking + 1

                    Expect.isGreaterThan found 10 "weights"
                    Expect.equal lacking (if dtype = b16 then 0 else found) "remainders that are not zero"
                    do! trainer.DisposeAsync()
                }
                |> _.GetAwaiter().GetResult())
    }

let private files = test "small files come back as they were; none that runs" {
    inFolder (fun folder ->
        let root, out = Path.Combine(folder, "in"), Path.Combine(folder, "out")
        let config = File.ReadAllBytes(Path.Combine(golden "v3_tiny_plain", "config.json"))
        let kept = [| struct ("config.json", config); struct ("tokenizer.json", "{\"a\": 1}"B) |]
        import (golden "v3_tiny_plain") root (recipe (1, 1, 1, 1) "") (ImportOptions(Kept = kept)) |> ignore
        export root out (StoredExportOptions())
        Expect.sequenceEqual (File.ReadAllBytes(Path.Combine(out, "config.json"))) config "config.json"
        Expect.equal (File.ReadAllText(Path.Combine(out, "tokenizer.json"))) "{\"a\": 1}" "tokenizer.json"
        Expect.isFalse (CheckpointManifest.MayBeKept "modeling_deepseek.py") "code"
        Expect.isFalse (CheckpointManifest.MayBeKept "../config.json") "paths")
}

let tests =
    testList "import" [
        roundTrips "v3_tiny_plain"
        roundTrips "v3_tiny_yarn"
        roundTrips "v3_tiny_mtp"
        fp8
        mistakes
        types
        remainders
        files
    ]

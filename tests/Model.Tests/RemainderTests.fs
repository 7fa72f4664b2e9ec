/// Training with remainders is training with fp32 masters: bit for bit, and of a tie the weight alone differs; so are checkpoints.
module DeepSeekGraph.Models.Tests.RemainderTests

open System
open System.Collections.Generic
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
open DeepSeekGraph.Models.Tests.Jobs
open DeepSeekGraph.Models.Tests.ParallelTests
open DeepSeekGraph.Models.Tests.ResumeTests

let private b16 = DType.BFloat16

/// The recipe in bf16, with masters kept one way or the other.
let private kept (masters: MainParams) (recipe: Recipe) = recipe.WithDType(b16).WithStateTypes(masters, b16, b16, b16)

let private remainders, wide = kept MainParams.Remainder, kept MainParams.Float32

/// Whole states by name, as bytes; of weights with a master or remainder, `master:` is the fp32 one.
let private states (trainer: Trainer) =
    let found = Dictionary<string, byte[]>()

    for stage in trainer.Plan.Stages do
        for slot in stage.Slots do
            if slot.Kind.IsParameter || slot.Kind.IsOptimizer then
                use whole = Gathering.Slot(trainer.Ranks, stage.Stage, slot.Name)
                found[slot.Name] <- whole.bytes.ToArray()

    for p in trainer.Plan.Parameters do
        if p.DType = b16 then
            use master = Gathering.Master(trainer.Ranks, p.Stages[0], p.Name)
            Expect.equal master.dtype torch.ScalarType.Float32 p.Name
            found["master:" + p.Name] <- master.bytes.ToArray()

    found

let private words<'a when 'a: unmanaged and 'a: struct and 'a: (new: unit -> 'a) and 'a :> ValueType> (bytes: byte[]) =
    Runtime.InteropServices.MemoryMarshal.Cast<byte, 'a>(ReadOnlySpan bytes).ToArray()

/// The same masters, moments and fp32 parameters; the weights that differ, each of a tie above an even number. Counts them.
let private compare what (wide: Dictionary<string, byte[]>) (narrow: Dictionary<string, byte[]>) =
    let mutable ties = 0

    for KeyValue(name, bytes) in wide do
        if not (wide.ContainsKey("master:" + name)) then
            Expect.isTrue (bytes = narrow[name]) $"%s{what}: %s{name}"
        else
            let masters, weights, others =
                words<uint32> wide["master:" + name], words<uint16> bytes, words<uint16> narrow[name]

            for i in 0 .. masters.Length - 1 do
                let isTie = masters[i] &&& 0x1FFFFu = 0x8000u

                if isTie then
                    ties <- ties + 1

                if others[i] <> weights[i] + (if isTie then 1us else 0us) then
                    failtestf "%s: %s[%i] is %04x beside %04x of %08x" what name i others[i] weights[i] masters[i]

    ties

/// Steps of both, side by side: what each leaves, and how many weights of ties there were.
let private sideBySide (config: DeepSeekV3Config) (recipe: Recipe) steps = task {
    let plan masters = DeepSeekV3(config).Compile(kept masters recipe)
    let! wide = start config (plan MainParams.Float32) ""
    let! narrow = start config (plan MainParams.Remainder) ""
    let mutable ties = compare "as drawn" (states wide) (states narrow)

    for step in 1L .. steps do
        if ties = 0 then
            let! expected = train wide 1L nothing
            let! losses = train narrow 1L nothing
            Expect.equal losses expected $"loss of step %i{step}"
            ties <- compare $"step %i{step}" (states wide) (states narrow)

    do! wide.DisposeAsync()
    do! narrow.DisposeAsync()
    return ties
}

let private one = Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(4, 1, 8)

let private meshes = [
    "one rank", one
    "tp 2, ep 2, dp 2", Recipe.Default.WithParallelism(2, 1, 2, 2).WithBatch(4, 1, 8)
    "pp 2, dp 2", Recipe.Default.WithParallelism(1, 2, 1, 2).WithBatch(4, 1, 8)
    "dp 2, whole states", Recipe.Default.WithParallelism(1, 1, 1, 2).WithDistributedOptimizer(false).WithBatch(4, 1, 8)
]

/// A checkpoint of so many steps.
let private saved (config: DeepSeekV3Config) (recipe: Recipe) steps (root: string) = task {
    let! trainer = start config (DeepSeekV3(config).Compile recipe) ""
    let! _ = train trainer steps nothing
    let found = states trainer
    do! save trainer root false
    do! trainer.DisposeAsync()
    return found
}

let private loaded (config: DeepSeekV3Config) (recipe: Recipe) (root: string) (again: string) = task {
    let! trainer = start config (DeepSeekV3(config).Compile recipe) root
    let found = states trainer

    if again <> "" then
        do! save trainer again false

    do! trainer.DisposeAsync()
    return found
}

let private forms =
    testList "checkpoints" [
        test "of remainders into fp32 masters on another mesh, and back: bitwise" {
            inFolder (fun folder ->
                let config = Presets.Tiny
                let there, back = Path.Combine(folder, "there"), Path.Combine(folder, "back")

                task {
                    let! expected = saved config (remainders (snd meshes[1])) 2L there
                    let manifest = CheckpointReader.Open there
                    let stored = manifest.Manifest.Tensors |> Seq.filter (fun t -> t.Name.StartsWith "remainder:")
                    Expect.isGreaterThan (Seq.length stored) 10 "remainders are stored"
                    Expect.all stored (fun t -> t.Dtype = "I16") "as I16"
                    manifest.Dispose()
                    let! full = loaded config one there ""

                    for KeyValue(name, values) in expected do
                        if name.StartsWith "master:" && full.ContainsKey(name.Substring 7) then
                            Expect.isTrue (full[name.Substring 7] = values) $"%s{name} of an fp32 model"

                    let! moved = loaded config (wide one) there back
                    // here the weights are the masters' nearest even ones
                    let ties = compare "fp32 masters" moved expected
                    let! again = loaded config (remainders (snd meshes[2])) back ""

                    for KeyValue(name, bytes) in again do
                        Expect.isTrue (bytes = expected[name]) $"%s{name} there and back"

                    Expect.equal again.Count expected.Count "states"
                    Expect.isGreaterThan ties 0 "ties among them"
                }
                |> _.GetAwaiter().GetResult())
        }

        test "of an fp32 model: masters are its values, in halves" {
            inFolder (fun root ->
                let config = Presets.Tiny

                task {
                    let! expected = saved config one 2L root
                    let! moved = loaded config (remainders one) root ""
                    let masters = moved.Keys |> Seq.filter (fun name -> name.StartsWith "master:") |> List.ofSeq
                    Expect.isGreaterThan masters.Length 10 "masters"

                    for name in masters do
                        Expect.isTrue (moved[name] = expected[name.Substring 7]) name

                    let! back = loaded config one root ""

                    for KeyValue(name, bytes) in back do
                        Expect.isTrue (bytes = expected[name]) name
                }
                |> _.GetAwaiter().GetResult())
        }

        test "an fp32 export has the masters, a bf16 one the weights" {
            inFolder (fun folder ->
                let root = Path.Combine(folder, "root")
                let config = Presets.Tiny

                task {
                    let! expected = saved config (remainders one) 1L root
                    use checkpoint = CheckpointReader.Open root
                    let name = "lm_head.weight"

                    for dtype, values in [ DType.Float32, expected["master:" + name]; b16, expected[name] ] do
                        let target = Path.Combine(folder, dtype.Name)
                        StoredExport.Write(checkpoint, target, StoredExportOptions(DType = dtype)) |> ignore
                        use bridge = AutoBridge.FromHfPretrained target
                        use tensor = bridge.Tensors.Tensor name
                        Expect.isTrue (tensor.bytes.ToArray() = values) dtype.Name
                }
                |> _.GetAwaiter().GetResult())
        }
    ]

let tests =
    testList "remainders" [
        for name, recipe in meshes do
            testCase $"%s{name}: losses, weights, masters and moments of fp32 masters, bit for bit"
            <| fun () ->
                let ties = (sideBySide plain.Config recipe 6L).GetAwaiter().GetResult()

                Expect.equal
                    ties
                    0
                    "no master of this run is a tie above an even weight: all of six steps were compared"

        test "a model of which some masters are ties: they are the places where weights differ" {
            let ties = (sideBySide Presets.Tiny one 1L).GetAwaiter().GetResult()

            let numbers =
                DeepSeekV3(Presets.Tiny).Compile(one).Parameters |> Seq.sumBy (fun p -> p.Extents |> Seq.fold (*) 1)

            Expect.isTrue (ties > 0 && ties < numbers / 10_000) $"%i{ties} ties of %i{numbers} numbers"
        }

        testCase "8 ranks: resumed = uninterrupted, bitwise"
        <| fun () -> resumes Presets.Tiny (remainders (Recipe.Default.WithParallelism(2, 2, 2, 2).WithBatch(8, 1, 16)))

        forms
    ]

/// Checkpoints as files: the grid of blocks, manifests from an enemy, damaged files, and the folder that holds several.
module DeepSeekGraph.Runtime.Tests.CheckpointTests

open System
open System.Collections.Generic
open System.IO
open System.Text
open System.Text.RegularExpressions
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Checkpoints
open DeepSeekGraph.Runtime.Parameters
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Runtime.Tests.DataTests

let private ints (xs: int seq) = Array.ofSeq xs :> IReadOnlyList<int>

/// Row-major places of the elements of a box in a tensor of some shape.
let private places (shape: int[]) (start: int[]) (extents: int[]) =
    let rec walk dim place =
        if dim = shape.Length then
            [ place ]
        else
            [
                for i in 0 .. extents[dim] - 1 do
                    yield! walk (dim + 1) (place * shape[dim] + start[dim] + i)
            ]

    walk 0 0

let private grid = test "200 random boxes: the runs of the blocks they meet are their elements, each once" {
    for seed in 1..200 do
        let random = Random seed
        let rank = random.Next 5
        let block = Array.init rank (fun _ -> 1 + random.Next 4)
        let shape = block |> Array.map (fun b -> b * (1 + random.Next 3))
        let start = shape |> Array.map random.Next
        let extents = Array.map2 (fun e s -> 1 + random.Next(e - s)) shape start
        let grid = BlockGrid(ints shape, ints block)
        let box = Shard(ints start, ints extents, ints shape)
        let found = Array.create (Array.fold (*) 1 extents) -1

        for struct (index, from, common) in grid.Overlapping box do
            Expect.equal (grid.IndexOf from.Start) index "blocks are counted in order"
            let source = places shape (Array.ofSeq from.Start) block |> Array.ofList

            BlockGrid.ForEachRun(
                common,
                from,
                box,
                fun a b n ->
                    for i in 0 .. int n - 1 do
                        Expect.equal found[int b + i] -1 "once"
                        found[int b + i] <- source[int a + i]
            )

        Expect.sequenceEqual found (places shape start extents) $"seed %d{seed}"
}

let private bytesOf (name: string) count width = Array.init (count * width) (fun i -> byte (i * 7 + name.Length))

/// Blocks of two tensors by two ranks: "a" [4, 6] of bf16 split along both dims, and "m:a" whole.
let private write (root: string) (step: int64) (keep: int) =
    use claim = CheckpointRoot.Claim root
    use writer = CheckpointWriter.Create(root, step)

    let file rank (tensors: (string * string * int64[]) list) =
        let specs = [ for name, dtype, shape in tensors -> SafeTensorSpec(name, dtype, shape) ]
        use file = writer.Begin(rank, specs)

        for info in file.Tensors do
            file.Append(
                ReadOnlySpan(bytesOf $"%s{info.Name}%d{rank}" (int info.Elements) (SafeTensorTypes.BytesOf info.DType))
            )

        file.Finish()

    let files = [|
        file 0 [ "a", "BF16", [| 2L; 6L |]; "m:a", "F32", [| 4L; 6L |] ]
        file 3 [ "a", "BF16", [| 2L; 6L |] ]
    |]

    let kept = [| writer.Keep("config.json", "{}"B) |]

    let manifest =
        CheckpointManifest(
            Version = 1,
            Step = step,
            Sequences = step * 8L,
            Seed = 1234UL,
            Data = CheckpointData("bytes", 1000L, String('0', 32), 16),
            Recipe = [| "name=\"test\""; "model.hidden_size=6" |],
            Training = [| "lr=0.001" |],
            Files = files,
            Kept = kept,
            Tensors = [|
                StoredTensor("a", "parameter", "BF16", ints [ 4; 6 ], ints [ 2; 6 ], ints [ 0; 1 ])
                StoredTensor("m:a", "optimizer", "F32", ints [ 4; 6 ], ints [ 4; 6 ], ints [ 0 ])
            |]
        )

    writer.Commit(manifest, keep)
    manifest

let private code (action: unit -> unit) = (diagnosticOf action).Code

let private opens (path: string) () = CheckpointReader.Open(path).Dispose()

let private manifestOf root step = Path.Combine(root, CheckpointRoot.NameOf step, CheckpointManifest.FileName)

/// The text of a manifest without its seal.
let private unsealed (path: string) =
    let text = File.ReadAllText path
    text[.. text.LastIndexOf("\n\"checksum\"", StringComparison.Ordinal) - 1]

let private pick (random: Random) (from: 'a[]) = from[random.Next from.Length]

let private hostile = [|
    "-1"
    "0"
    "1"
    "3"
    "0.5"
    "1e99"
    "2147483647"
    "2147483648"
    "9223372036854775807"
    "99999999999999999999"
    "null"
    "[]"
    "{}"
    "\"x\""
    "[null]"
    String('[', 100) + String(']', 100)
|]

let private words = [|
    "../a"
    "/etc/passwd"
    "\\u0000"
    "\\ud800"
    ""
    "rank_00000.safetensors"
    "a"
    "x.py"
    "manifest.json"
    "F64"
|]

/// One thing wrong in a manifest's JSON, or in its bytes.
let private damaged (random: Random) (text: string) : byte[] =
    let edit (pattern: string) (change: string -> string) =
        match Regex.Matches(text, pattern) with
        | found when found.Count = 0 -> text
        | found ->
            let at = found[random.Next found.Count]
            text[.. at.Index - 1] + change at.Value + text[at.Index + at.Length ..]

    match random.Next 9 with
    | 0 -> edit @"\d+" (fun _ -> pick random hostile)
    | 1 -> edit "\"[^\"]*\"" (fun _ -> "\"" + pick random words + "\"")
    | 2 -> edit @"\[[\d, ]*\]" (fun _ -> pick random hostile)
    | 3 -> edit @"\{[^{}]*\}" (fun one -> one + "," + one)
    | 4 -> edit @"\{[^{}]*\},?" (fun _ -> "")
    | 5 -> edit "\"[a-z]+\":" (fun field -> field + "1,\"other\":")
    | 6 -> edit @"[\d,]" (fun c -> if c = "," then "" else string (random.Next 10))
    | 7 -> text[.. random.Next text.Length]
    | _ -> text.Insert(random.Next text.Length, pick random [| "{"; "]"; ","; "\u0000"; "\"" |])
    |> ManifestText.Sealed

let private manifests =
    testList "manifest" [
        test "what is written is read, and the same again" {
            inFolder (fun root ->
                let manifest = write root 100L 0
                let bytes = File.ReadAllBytes(manifestOf root 100L)
                let read = ManifestText.Read(bytes, "m")
                Expect.sequenceEqual (ManifestText.Write read) bytes "bytes"
                Expect.equal (read.Step, read.Sequences, read.Seed) (100L, 800L, 1234UL) "numbers"
                Expect.equal read.Data manifest.Data "data"
                Expect.sequenceEqual read.Recipe manifest.Recipe "recipe"
                Expect.sequenceEqual read.Tensors[0].Files [ 0; 1 ] "files")
        }
        test "an unknown version is refused, whatever else it has" {
            Expect.equal
                (code (fun () -> ManifestText.Read("{\"version\": 2, \"new\": [1]}"B, "m") |> ignore))
                Codes.CheckpointVersion
                "code"
        }
        test "500 damaged manifests with a fitting checksum: a diagnostic, or a checkpoint that reads in bounds" {
            inFolder (fun root ->
                write root 7L 0 |> ignore
                let path = manifestOf root 7L
                let text = unsealed path
                let mutable read = 0

                for seed in 1..500 do
                    let random = Random seed
                    File.WriteAllBytes(path, damaged random text)

                    try
                        use reader = CheckpointReader.Open root
                        read <- read + 1

                        for tensor in reader.Manifest.Tensors do
                            let box = Shard(ints (Seq.map (fun _ -> 0) tensor.Shape), tensor.Shape, tensor.Shape)
                            reader.Box(tensor, box) |> ignore

                        for kept in reader.Manifest.Kept do
                            reader.Kept kept.Name |> ignore
                    with
                    | :? DiagnosticException as e ->
                        Expect.isTrue (e.Diagnostics[0].Code.StartsWith "DSG084") $"%d{seed}: %O{e.Diagnostics[0]}"
                        Expect.isLessThan (string e.Diagnostics[0]).Length 3000 "nobody reads more"
                    | e when not (e :? AssertException) -> failtest $"seed %d{seed}: %O{e}"

                Expect.isTrue (read > 10 && read < 250) $"%d{read} read")
        }
        test "any other byte is seen" {
            inFolder (fun root ->
                write root 7L 0 |> ignore
                let path = manifestOf root 7L
                let bytes = File.ReadAllBytes path

                for at in 0..13 .. bytes.Length - 5 do
                    let changed = Array.copy bytes
                    changed[at] <- changed[at] ^^^ 1uy
                    let code = code (fun () -> ManifestText.Read(changed, "m") |> ignore)
                    Expect.isTrue (code = Codes.CheckpointMalformed || code = Codes.CheckpointVersion) $"byte %d{at}")
        }
    ]

let private files =
    testList "files" [
        test "a box across blocks of two files" {
            inFolder (fun root ->
                write root 7L 0 |> ignore
                use reader = CheckpointReader.Open root
                let tensor = reader.Find "a" |> nonNull
                let memory = reader.Box(tensor, Shard(ints [ 1; 2 ], ints [ 2; 3 ], ints [ 4; 6 ]))
                let row rank r = (bytesOf $"a%d{rank}" 12 2)[(r * 6 + 2) * 2 .. (r * 6 + 5) * 2 - 1]

                Expect.sequenceEqual
                    memory
                    (Array.append (row 0 1) (row 3 0))
                    "last row of the first, first of the second")
        }
        test "a flipped bit, a missing, a shorter and a linked file are DSG0843, by name" {
            for damage in [ "flip"; "delete"; "cut"; "link" ] do
                inFolder (fun root ->
                    write root 7L 0 |> ignore
                    let path = Path.Combine(root, "iter_0000007", "rank_00003.safetensors")
                    let bytes = File.ReadAllBytes path

                    match damage with
                    | "flip" ->
                        bytes[bytes.Length - 3] <- bytes[bytes.Length - 3] ^^^ 16uy
                        File.WriteAllBytes(path, bytes)
                    | "delete" -> File.Delete path
                    | "cut" -> File.WriteAllBytes(path, bytes[.. bytes.Length - 2])
                    | _ ->
                        File.Move(path, Path.Combine(root, "elsewhere"))
                        File.CreateSymbolicLink(path, Path.Combine(root, "elsewhere")) |> ignore

                    let d = diagnosticOf (opens root)
                    Expect.equal d.Code Codes.CheckpointDamaged damage
                    Expect.stringContains d.Message "rank_00003.safetensors" damage)
        }
        test "files of two checkpoints mixed are seen" {
            inFolder (fun root ->
                write root 7L 0 |> ignore
                write root 8L 0 |> ignore
                let path step rank = Path.Combine(root, CheckpointRoot.NameOf step, $"rank_0000%d{rank}.safetensors")
                File.Copy(path 7L 0, path 8L 3, true)
                Expect.equal (code (opens root)) Codes.CheckpointDamaged "code")
        }
    ]

let private steps root = List.ofSeq (CheckpointRoot.Steps root)

let private roots =
    testList "root" [
        test "latest names the one to go on from; without it, or where it names none, the newest" {
            inFolder (fun run ->
                let root = Path.Combine(run, "checkpoints")

                for step in [ 5L; 10L; 15L ] do
                    write root step 0 |> ignore

                let latest = Path.Combine(root, "latest")
                let resolved path = Path.GetFileName(CheckpointRoot.Resolve path)
                Expect.equal (File.ReadAllText latest) "iter_0000015\n" "text"
                Expect.equal (resolved root) "iter_0000015" "root"
                Expect.equal (resolved run) "iter_0000015" "run folder"
                Expect.equal (resolved (Path.Combine(root, "iter_0000005"))) "iter_0000005" "one of them"
                // a crash between the folder's rename and this file
                File.WriteAllText(latest, "iter_0000010\n")
                Expect.equal (resolved root) "iter_0000010" "older"

                for text in [ ""; "iter_0000099"; "../iter_0000005"; "iter_5"; String('x', 1000) ] do
                    File.WriteAllText(latest, text)
                    Expect.equal (resolved root) "iter_0000015" text

                File.Delete latest
                Expect.equal (resolved root) "iter_0000015" "none"
                // no manifest: not whole
                File.Delete(Path.Combine(root, "iter_0000015", "manifest.json"))
                Expect.equal (resolved root) "iter_0000010" "whole ones only")
        }
        test "an empty folder, a file and a path that is not there are DSG0840" {
            inFolder (fun root ->
                File.WriteAllText(Path.Combine(root, "file"), "")

                for path in [ root; Path.Combine(root, "file"); Path.Combine(root, "none") ] do
                    Expect.equal (code (opens path)) Codes.NoCheckpoint path)
        }
        test "keep 2: older ones go, newer ones of another run stay until they are replaced" {
            inFolder (fun root ->
                for step in [ 1L; 2L; 3L ] do
                    write root step 2 |> ignore

                Expect.equal (steps root) [ 2L; 3L ] "two"
                write root 9L 0 |> ignore
                write root 4L 2 |> ignore
                Expect.equal (steps root) [ 3L; 4L; 9L ] "not what is newer"
                Expect.equal (File.ReadAllText(Path.Combine(root, "latest"))) "iter_0000004\n" "latest"
                let before = File.ReadAllBytes(manifestOf root 9L)
                write root 9L 2 |> ignore
                Expect.sequenceEqual (File.ReadAllBytes(manifestOf root 9L)) before "replaced by its equal"
                Expect.equal (steps root) [ 4L; 9L ] "two again")
        }
        test "what a killed save left is taken away, what stood aside comes back" {
            inFolder (fun root ->
                write root 1L 0 |> ignore
                write root 2L 0 |> ignore
                let id = String('a', 32)
                let half = Path.Combine(root, $"iter_0000003.%s{id}.tmp")
                Directory.CreateDirectory half |> ignore
                File.WriteAllText(Path.Combine(half, "rank_00000.safetensors"), "half")
                let other = Directory.CreateDirectory(Path.Combine(root, "iter_mine.tmp"))
                Directory.Move(Path.Combine(root, "iter_0000002"), Path.Combine(root, $"iter_0000002.%s{id}.tmp.old"))
                use reader = CheckpointReader.Open root
                Expect.equal reader.Manifest.Step 2L "back"
                Expect.isFalse (Directory.Exists half) "away"
                Expect.isTrue other.Exists "what is not ours stays")
        }
        test "two processes do not save to one folder, and none that reads disturbs one that saves" {
            inFolder (fun root ->
                write root 1L 0 |> ignore
                let half = Directory.CreateDirectory(Path.Combine(root, "iter_0000003." + String('a', 32) + ".tmp"))
                Directory.Delete half.FullName
                use claim = CheckpointRoot.Claim root
                Expect.equal (code (fun () -> (CheckpointRoot.Claim root).Dispose())) Codes.CheckpointBusy "refused"
                half.Create()
                opens root ()
                Expect.isTrue (Directory.Exists half.FullName) "its folder stays")
        }
        test "a writer that is dropped leaves nothing" {
            inFolder (fun root ->
                write root 1L 0 |> ignore
                let before = Directory.GetFileSystemEntries root |> Array.sort

                do
                    use claim = CheckpointRoot.Claim root
                    use writer = CheckpointWriter.Create(root, 2L)
                    use file = writer.Begin(0, [ SafeTensorSpec("a", "U8", [| 3L |]) ])
                    file.Append(ReadOnlySpan [| 1uy |])
                    Expect.throwsT<InvalidOperationException> (fun () -> file.Finish() |> ignore) "not whole"

                Expect.sequenceEqual (Directory.GetFileSystemEntries root |> Array.sort) before "as before"
                Expect.equal (steps root) [ 1L ] "the old one")
        }
    ]

let tests = testList "Checkpoints" [ grid; manifests; files; roots ]

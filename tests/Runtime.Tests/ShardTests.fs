/// Tensors on mapped files, sharded checkpoints and their writer.
module DeepSeekGraph.Runtime.Tests.ShardTests

open System
open System.Collections.Generic
open System.IO
open System.Runtime.CompilerServices
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Testing

let private bytesOf (tensor: torch.Tensor) = tensor.bytes.ToArray()

let private mapped =
    testList "Tensor" [
        test "every element type maps to its tensor, byte by byte" {
            inFolder (fun folder ->
                use file = SafeTensorsFile.Open(SafeTensorsFuzz.allTypes folder)

                for name in file.Names do
                    let info = file.Info name
                    use tensor = file.Tensor name
                    Expect.sequenceEqual tensor.shape info.Shape name
                    Expect.equal tensor.dtype (SafeTensorTypes.ScalarTypeOf info.DType) name
                    Expect.sequenceEqual (bytesOf tensor) (file.Bytes(name).ToArray()) name

                use wide = (file.Tensor "layers.3.F32").to_type torch.ScalarType.Float64

                Expect.sequenceEqual
                    (wide.data<double>().ToArray())
                    (file.ReadFloat32 "layers.3.F32" |> Array.map float)
                    "F32")
        }
        test "a tensor outlives its file, and nothing written to it reaches the file" {
            inFolder (fun folder ->
                let path = SafeTensorsFuzz.allTypes folder
                let before = File.ReadAllBytes path
                let file = SafeTensorsFile.Open path
                let name = "layers.3.F32"
                let expected = file.Bytes(name).ToArray()
                let tensor = file.Tensor name
                let part = tensor.narrow (0L, 1L, 1L)
                file.Dispose()
                Expect.throwsT<ObjectDisposedException> (fun () -> file.Tensor name |> ignore) "closed"
                GC.Collect()
                GC.WaitForPendingFinalizers()
                Expect.sequenceEqual (bytesOf tensor) expected "still mapped"
                tensor.zero_ () |> ignore
                tensor.Dispose()
                use sum = part.sum ()
                Expect.equal (sum.item<float32>()) 0f "a view keeps the mapping too"
                part.Dispose()
                Expect.sequenceEqual (File.ReadAllBytes path) before "the file is what it was")
        }
        test "a mapping ends with its file and its last tensor" {
            inFolder (fun folder ->
                let path = SafeTensorsFuzz.allTypes folder
                let isMapped () = (File.ReadAllText "/proc/self/maps").Contains path
                let file = SafeTensorsFile.Open path
                let tensors = [ for name in file.Names -> file.Tensor name ]
                Expect.isTrue (isMapped ()) "in use"
                file.Dispose()
                Expect.isTrue (isMapped ()) "by tensors"

                for tensor in tensors do
                    tensor.Dispose()

                Expect.isFalse (isMapped ()) "gone"
                let again = SafeTensorsFile.Open path
                (again.Tensor "scalar").Dispose()
                Expect.isTrue (isMapped ()) "by its file"
                again.Dispose()
                Expect.isFalse (isMapped ()) "gone again")
        }
        test "bytes that are not aligned are copied" {
            inFolder (fun folder ->
                let path = Path.Combine(folder, "a.safetensors")

                let header =
                    """{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"""B

                File.WriteAllBytes(
                    path,
                    Array.concat [
                        BitConverter.GetBytes(int64 header.Length)
                        header
                        [| 9uy |]
                        BitConverter.GetBytes 1.5f
                    ]
                )

                use file = SafeTensorsFile.Open path
                use tensor = file.Tensor "b"
                Expect.equal (tensor.item<float32>()) 1.5f "value")
        }
        test "pipes and devices are told, not waited for" {
            for path in [ "/dev/zero"; "/dev/stdin" ] do
                if not (File.Exists path && Console.IsInputRedirected && path = "/dev/stdin") then
                    let d = diagnosticOf (fun () -> SafeTensorsFile.Open(path).Dispose())
                    Expect.equal d.Code Codes.SafeTensorsUnreadable path
        }
    ]

let private spec (name: string, dtype: string, shape: int64 list) = SafeTensorSpec(name, dtype, List.toArray shape)

/// Bytes that depend on the name.
let private contents (spec: SafeTensorSpec) =
    Array.init (int spec.Bytes) (fun i -> byte (i * 31 + (Seq.sumBy int spec.Name)))

let private specs = [|
    spec ("model.embed", "BF16", [ 8L; 4L ])
    spec ("model.a", "F32", [ 5L ])
    spec ("model.a_scale_inv", "F32", [])
    spec ("model.b", "F8_E4M3", [ 7L; 9L ])
    spec ("model.empty", "F32", [ 0L; 3L ])
    spec ("model.z", "U8", [ 3L ])
|]

let private writeAll (folder: string) (most: int64) (specs: SafeTensorSpec[]) =
    use writer = ShardedWriter.Create(folder, specs, most)

    for spec in specs do
        writer.Write(spec.Name, ReadOnlySpan(contents spec))

    writer.Commit()

let private snapshot (folder: string) = [
    for path in Directory.GetFileSystemEntries folder |> Array.sort ->
        Path.GetFileName path, (if File.Exists path then File.ReadAllBytes path else [||])
]

let private fails code (text: string) (action: unit -> unit) =
    let d = diagnosticOf action
    Expect.equal d.Code code (string d)
    Expect.stringContains (d.Message + d.At) text "the words"

let private openFails code text (path: string) = fails code text (fun () -> SafeTensorsSet.Open(path).Dispose())

let private writing =
    testList "ShardedWriter" [
        Properties.property "what is written comes back, whatever the size of a shard"
        <| fun (most: uint8) ->
            inFolder (fun folder ->
                let folder = Path.Combine(folder, "out")
                writeAll folder (int64 most + 1L) specs
                use set = SafeTensorsSet.Open folder

                Expect.sequenceEqual
                    set.Names
                    (specs |> Array.map _.Name |> Array.sortWith (fun a b -> String.CompareOrdinal(a, b)))
                    "names"

                for spec in specs do
                    Expect.sequenceEqual (set.Info spec.Name).Shape spec.Shape spec.Name
                    Expect.sequenceEqual (set.FileOf(spec.Name).Bytes(spec.Name).ToArray()) (contents spec) spec.Name

                for file in set.Files do
                    let data = file.Names |> Seq.sumBy (fun name -> (file.Info name).Bytes)
                    Expect.isTrue (data <= int64 most + 1L || Seq.length file.Names = 1) "size of a shard")
        test "one shard has the plain name and no index, more are numbered" {
            inFolder (fun folder ->
                writeAll (Path.Combine(folder, "one")) 1000L specs
                writeAll (Path.Combine(folder, "two")) 70L specs
                Expect.equal (List.map fst (snapshot (Path.Combine(folder, "one")))) [ "model.safetensors" ] "one"

                Expect.equal
                    (List.map fst (snapshot (Path.Combine(folder, "two"))))
                    [
                        "model-00001-of-000003.safetensors"
                        "model-00002-of-000003.safetensors"
                        "model-00003-of-000003.safetensors"
                        "model.safetensors.index.json"
                    ]
                    "three")
        }
        test "slices in any order and mapped slices fill one tensor" {
            inFolder (fun folder ->
                let out = Path.Combine(folder, "out")
                let bank = spec ("experts", "BF16", [ 4L; 2L; 3L ])
                let bytes = contents bank
                use writer = ShardedWriter.Create(out, [| bank; spec ("mapped", "BF16", [ 4L; 2L; 3L ]) |], 8L)

                for expert in [ 2; 0; 3; 1 ] do
                    writer.WriteSlice("experts", int64 (expert * 12), ReadOnlySpan(bytes, expert * 12, 12))

                using (writer.Map "mapped") (fun target ->
                    Expect.throwsT<InvalidOperationException> (fun () -> writer.Commit()) "the tensor is in use"

                    for expert in 0L .. 3L do
                        use slice = target.select (0L, expert)
                        slice.fill_ ((float32 expert).ToScalar()) |> ignore)

                writer.Commit()
                use set = SafeTensorsSet.Open out
                Expect.sequenceEqual (set.FileOf("experts").Bytes("experts").ToArray()) bytes "slices"

                Expect.sequenceEqual
                    (set.FileOf("mapped").ReadFloat32 "mapped")
                    [ for e in 0..23 -> float32 (e / 6) ]
                    "mapped")
        }
        test "parts that are missing, given twice or too long are refused" {
            inFolder (fun folder ->
                use writer = ShardedWriter.Create(Path.Combine(folder, "out"), specs)
                let some (n: int) = Array.zeroCreate<byte> n
                writer.WriteSlice("model.b", 10L, ReadOnlySpan(some 10))

                Expect.throwsT<InvalidOperationException>
                    (fun () -> writer.WriteSlice("model.b", 19L, ReadOnlySpan(some 2)))
                    "twice"

                Expect.throwsT<ArgumentException>
                    (fun () -> writer.WriteSlice("model.b", 60L, ReadOnlySpan(some 4)))
                    "long"

                Expect.throwsT<ArgumentException> (fun () -> writer.Write("model.b", ReadOnlySpan(some 62))) "short"
                Expect.throwsT<ArgumentException> (fun () -> writer.Write("model.c", ReadOnlySpan(some 1))) "unknown"
                Expect.throwsT<ArgumentException> (fun () -> writer.AddFile("../a", ReadOnlySpan(some 1))) "a path"
                Expect.throwsT<InvalidOperationException> (fun () -> writer.Commit()) "not whole"
                writer.Dispose()
                Expect.isEmpty (Directory.GetFileSystemEntries folder) "nothing is left")
        }
        test "the folder changes in one step: as before without a commit, whole after it" {
            inFolder (fun folder ->
                let out = Path.Combine(folder, "out")
                writeAll out 70L specs
                File.WriteAllText(Path.Combine(out, "config.json"), "{}")
                File.WriteAllText(Path.Combine(out, "tokenizer.json"), "old")
                let before = snapshot out

                try
                    use writer = ShardedWriter.Create(out, specs)
                    writer.Write("model.a", ReadOnlySpan(contents specs[1]))
                    failwith "the disk is on fire"
                with Failure _ ->
                    ()

                Expect.equal (snapshot out) before "an exception"

                fails Codes.OutputUnwritable "the disk has" (fun () ->
                    ShardedWriter.Create(out, [| spec ("huge", "U8", [ 1L <<< 60 ]) |]).Dispose())

                Expect.equal (snapshot out) before "a full disk"
                Expect.hasLength (Directory.GetFileSystemEntries folder) 1 "nothing beside it"

                using (ShardedWriter.Create(out, specs)) (fun writer ->
                    for spec in specs do
                        writer.Write(spec.Name, ReadOnlySpan(contents spec))

                    writer.AddFile("tokenizer.json", ReadOnlySpan "new"B)
                    Expect.equal (snapshot out) before "before the commit"
                    writer.Commit())

                Expect.equal
                    (snapshot out |> List.map fst)
                    [ "config.json"; "model.safetensors"; "tokenizer.json" ]
                    "old weights are gone, other files stay"

                Expect.equal (File.ReadAllText(Path.Combine(out, "tokenizer.json"))) "new" "a file of the same name"
                Expect.hasLength (Directory.GetFileSystemEntries folder) 1 "nothing beside it")
        }
        test "a folder that is more than plain files is not replaced" {
            inFolder (fun folder ->
                Directory.CreateDirectory(Path.Combine(folder, "a", "b")) |> ignore
                File.WriteAllText(Path.Combine(folder, "f"), "")
                Directory.CreateDirectory(Path.Combine(folder, "l")) |> ignore
                File.CreateSymbolicLink(Path.Combine(folder, "l", "x"), "/etc/hostname") |> ignore

                for path, word in [ "a", "'b'"; "f", "is a file"; "l", "'x'" ] do
                    fails Codes.OutputTaken word (fun () ->
                        ShardedWriter.Create(Path.Combine(folder, path), specs).Dispose())

                Expect.hasLength (Directory.GetFileSystemEntries folder) 3 "nothing else")
        }
    ]

let private reading =
    /// A sharded checkpoint, changed by `change`, must fail with this.
    let broken name code text (change: string -> unit) = test name {
        inFolder (fun folder ->
            let out = Path.Combine(folder, "out")
            writeAll out 70L specs
            change out
            openFails code text out)
    }

    let shard (folder: string) i = Path.Combine(folder, $"model-0000%d{i}-of-000003.safetensors")

    let editIndex (from: string) (into: string) (folder: string) =
        let path = Path.Combine(folder, "model.safetensors.index.json")
        let text = File.ReadAllText path
        Expect.stringContains text from "there is something to change"
        File.WriteAllText(path, text.Replace(from, into))

    testList "SafeTensorsSet" [
        broken "a missing shard" Codes.SafeTensorsShards "model-00002-of-000003.safetensors" (fun folder ->
            File.Delete(shard folder 2))
        broken "a damaged shard" Codes.SafeTensorsMalformed "model-00002" (fun folder ->
            File.WriteAllText(shard folder 2, "x"))
        broken "a tensor in no shard" Codes.SafeTensorsShards "in no file" (editIndex "\"model.z\"" "\"model.y\"")
        broken
            "a tensor in another shard"
            Codes.SafeTensorsShards
            "it is in 'model-00002"
            (editIndex "\"model.a\": \"model-00002" "\"model.a\": \"model-00003")
        broken
            "a tensor that the index leaves out"
            Codes.SafeTensorsShards
            "does not name"
            (editIndex "\"model.a_scale_inv\": \"model-00002-of-000003.safetensors\"," "")
        broken "a tensor in two shards" Codes.SafeTensorsShards "is in both" (fun folder ->
            File.Delete(shard folder 3)

            SafeTensorsWriter.Write(
                shard folder 3,
                [
                    for name in [ "model.a"; "model.z" ] ->
                        SafeTensorEntry(name, "U8", [| 1L |], ReadOnlyMemory [| 1uy |])
                ]
            ))
        broken "a file twice" Codes.SafeTensorsShards "both" (fun folder ->
            File.Copy(shard folder 1, Path.Combine(folder, "model.safetensors")))
        for name in
            [
                "../model-00001-of-000003.safetensors"
                "/etc/a.safetensors"
                "a/b.safetensors"
                "c:\\\\a.safetensors"
                ".."
                "model.bin"
            ] do
            broken
                $"the index leads to %s{name}"
                Codes.SafeTensorsIndex
                "no plain name"
                (editIndex "\"model.z\": \"model-00003-of-000003.safetensors\"" $"\"model.z\": \"%s{name}\"")
        broken "a link out of the folder" Codes.SafeTensorsShards "outside its folder" (fun folder ->
            File.Move(shard folder 2, folder + ".away")
            File.CreateSymbolicLink(shard folder 2, folder + ".away") |> ignore)
        broken "a link that leads nowhere" Codes.SafeTensorsShards "is a link to" (fun folder ->
            File.Delete(shard folder 2)
            File.CreateSymbolicLink(shard folder 2, folder + ".nowhere") |> ignore)
        test "the layout of Hugging Face's cache is followed" {
            inFolder (fun folder ->
                let snapshot = Path.Combine(folder, "models--x", "snapshots", "0123")
                let blobs = Directory.CreateDirectory(Path.Combine(folder, "models--x", "blobs")).FullName
                writeAll snapshot 70L specs

                for i in 1..3 do
                    File.Move(shard snapshot i, Path.Combine(blobs, string i))
                    File.CreateSymbolicLink(shard snapshot i, $"../../blobs/%d{i}") |> ignore

                let link = Path.Combine(folder, "link")
                Directory.CreateSymbolicLink(link, snapshot) |> ignore

                for path in
                    [
                        snapshot
                        link
                        Path.Combine(link, "model.safetensors.index.json")
                        link + "/"
                    ] do
                    use set = SafeTensorsSet.Open path
                    Expect.hasLength set.Names specs.Length "all tensors")
        }
        test "a single file that is a link out of its folder" {
            inFolder (fun folder ->
                let out = Path.Combine(folder, "out")
                writeAll out 1000L specs
                File.Move(Path.Combine(out, "model.safetensors"), Path.Combine(folder, "away"))
                File.CreateSymbolicLink(Path.Combine(out, "model.safetensors"), "../away") |> ignore
                openFails Codes.SafeTensorsShards "outside its folder" out)
        }
        test "an index, a single file and nothing" {
            inFolder (fun folder ->
                let out = Path.Combine(folder, "out")
                writeAll out 70L specs

                for path, count in
                    [
                        Path.Combine(out, "model.safetensors.index.json"), specs.Length
                        shard out 3, 3
                    ] do
                    use set = SafeTensorsSet.Open path
                    Expect.hasLength set.Names count path
                    fails Codes.SafeTensorsNoTensor "no.such" (fun () -> set.Info "no.such" |> ignore)

                openFails Codes.SafeTensorsUnreadable "has no model.safetensors" folder
                openFails Codes.SafeTensorsUnreadable "missing" (Path.Combine(folder, "missing.safetensors"))
                openFails Codes.SafeTensorsUnreadable "missing" (Path.Combine(folder, "missing.json")))
        }
        Shared.testOn "the sharded fp8 checkpoint of Hugging Face opens" "golden/v3_tiny_fp8" (fun folder ->
            use set = SafeTensorsSet.Open folder
            Expect.hasLength set.Files 2 "shards"
            let fp8 = set.Names |> Seq.filter (fun name -> (set.Info name).DType = "F8_E4M3") |> Seq.toList
            Expect.isNonEmpty fp8 "fp8 weights"

            for name in fp8 do
                Expect.isTrue (set.Contains(name + Fp8Blocks.ScaleSuffix)) name)
    ]

let tests = testList "Shards" [ mapped; writing; reading ]

/// The safetensors reader and writer: what is written comes back, and no damaged file does worse than a diagnostic.
module DeepSeekGraph.Runtime.Tests.SafeTensorsTests

open System
open System.Collections.Generic
open System.IO
open System.Text
open Expecto
open FsCheck
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Testing

let private dtypes = [ "F32"; "BF16"; "F16"; "F64"; "I64"; "I32"; "U8"; "BOOL"; "F8_E4M3" ]

/// Tensors with distinct names, any type, up to three extents of 0..4, and random bytes.
type Entries =
    static member Arb() =
        let entry name = gen {
            let! dtype = Gen.elements dtypes
            let! rank = Gen.choose (0, 3)
            let! shape = Gen.listOfLength rank (Gen.choose (0, 4))
            let size = List.fold (*) (SafeTensorTypes.BytesOf dtype) shape
            let! data = Gen.arrayOfLength size (Gen.choose (0, 255))
            let shape = shape |> List.map int64 |> List.toArray
            return SafeTensorEntry(name, dtype, shape, ReadOnlyMemory(Array.map byte data))
        }

        let entries = gen {
            let! count = Gen.choose (0, 6)

            let names = List.take count [ "a"; "model.b"; "\u00e9 \"quoted\""; "z\n"; "__meta"; "" ]

            return! names |> List.map entry |> Gen.sequenceToList
        }

        let shrink (entries: SafeTensorEntry list) = seq { for i in 0 .. entries.Length - 1 -> List.removeAt i entries }

        Arb.fromGenShrink (entries, shrink)

let private golden =
    let rec up (folder: string) =
        let here = Path.Combine(folder, "tests", "golden")

        if Directory.Exists here then here else up (Path.GetDirectoryName folder |> nonNull)

    up AppContext.BaseDirectory

let private sample = Path.Combine(golden, "v3_tiny_plain", "reference.safetensors")

/// A file made of a header and so many bytes of data.
let private raw folder (header: string) dataBytes =
    let path = Path.Combine(folder, "raw.safetensors")
    let json = Encoding.UTF8.GetBytes header

    File.WriteAllBytes(
        path,
        Array.concat [ BitConverter.GetBytes(int64 json.Length); json; Array.zeroCreate dataBytes ]
    )

    path

let private openFails code path =
    let d = diagnosticOf (fun () -> SafeTensorsFile.Open(path).Dispose())
    Expect.equal d.Code code (string d)
    d

let private roundTrips =
    testList "SafeTensorsWriter" [
        Properties.propertyOver [ typeof<Entries> ] "what is written comes back"
        <| fun (entries: SafeTensorEntry list) ->
            inFolder (fun folder ->
                let path = Path.Combine(folder, "a.safetensors")
                SafeTensorsWriter.Write(path, entries)
                use file = SafeTensorsFile.Open path
                Expect.equal (Set file.Names) (Set [ for e in entries -> e.Name ]) "names"

                for entry in entries do
                    let info = file.Info entry.Name
                    Expect.equal info.DType entry.DType "type"
                    Expect.sequenceEqual info.Shape entry.Shape "shape"
                    Expect.sequenceEqual (file.Bytes(entry.Name).ToArray()) (entry.Data.ToArray()) "bytes")

        Properties.propertyOver [ typeof<Entries> ] "the file does not depend on the order of the tensors"
        <| fun (entries: SafeTensorEntry list) ->
            inFolder (fun folder ->
                let bytes entries =
                    let path = Path.Combine(folder, "a.safetensors")
                    SafeTensorsWriter.Write(path, entries)
                    File.ReadAllBytes path

                let written = bytes entries
                Expect.equal (bytes (List.rev entries)) written "same bytes"
                Expect.equal (BitConverter.ToInt64(written, 0) % 8L) 0L "the data part is aligned")

        test "a file is replaced whole, and a failure leaves nothing behind" {
            inFolder (fun folder ->
                let entry name = SafeTensorEntry(name, "U8", [| 1L |], ReadOnlyMemory [| 1uy |])

                let path = Path.Combine(folder, "a.safetensors")
                SafeTensorsWriter.Write(path, [ entry "old" ])
                SafeTensorsWriter.Write(path, [ entry "new" ], dict [ "step", "7" ] |> Dictionary)
                use file = SafeTensorsFile.Open path
                Expect.sequenceEqual file.Names [ "new" ] "the new tensors"
                Expect.equal file.Metadata["step"] "7" "notes"
                let missing = Path.Combine(folder, "no", "a.safetensors")
                let d = diagnosticOf (fun () -> SafeTensorsWriter.Write(missing, [ entry "a" ]))
                Expect.equal d.Code Codes.OutputUnwritable "code"
                // A folder cannot be replaced by a file, so this fails after all bytes are written.
                Directory.CreateDirectory(Path.Combine(folder, "b", "c")) |> ignore

                diagnosticOf (fun () -> SafeTensorsWriter.Write(Path.Combine(folder, "b"), [ entry "a" ])) |> ignore

                Expect.hasLength (Directory.GetFileSystemEntries folder) 2 "no temporary file")
        }
        test "numbers widen to float and long" {
            inFolder (fun folder ->
                let path = Path.Combine(folder, "a.safetensors")

                let bytes (values: 't[]) (convert: 't -> byte[]) = ReadOnlyMemory(Array.collect convert values)

                let entry name dtype count data = SafeTensorEntry(name, dtype, [| count |], data)

                SafeTensorsWriter.Write(
                    path,
                    [
                        entry "f32" "F32" 2L (bytes [| 1.5f; nanf |] BitConverter.GetBytes)
                        entry "bf16" "BF16" 2L (bytes [| 0x3FC0us; 0xFF80us |] BitConverter.GetBytes)
                        entry "f16" "F16" 2L (bytes [| Half.op_Explicit 1.5f; Half.MaxValue |] BitConverter.GetBytes)
                        entry "f64" "F64" 2L (bytes [| 1.5; -0.1 |] BitConverter.GetBytes)
                        entry "i64" "I64" 2L (bytes [| Int64.MinValue; 7L |] BitConverter.GetBytes)
                        entry "i32" "I32" 2L (bytes [| Int32.MinValue; 7 |] BitConverter.GetBytes)
                        entry "bool" "BOOL" 2L (bytes [| true; false |] BitConverter.GetBytes)
                        entry "f8" "F8_E4M3" 2L (ReadOnlyMemory [| 1uy; 2uy |])
                    ]
                )

                use file = SafeTensorsFile.Open path
                let f32 = file.ReadFloat32 "f32"
                Expect.isTrue (f32[0] = 1.5f && Single.IsNaN f32[1]) "F32"
                Expect.sequenceEqual (file.ReadFloat32 "bf16") [ 1.5f; -infinityf ] "BF16"
                Expect.sequenceEqual (file.ReadFloat32 "f16") [ 1.5f; 65504f ] "F16"
                Expect.sequenceEqual (file.ReadFloat32 "f64") [ 1.5f; -0.1f ] "F64"
                Expect.sequenceEqual (file.ReadInt64 "i64") [ Int64.MinValue; 7L ] "I64"
                Expect.sequenceEqual (file.ReadInt64 "i32") [ int64 Int32.MinValue; 7L ] "I32"
                Expect.sequenceEqual (file.ReadInt64 "bool") [ 1L; 0L ] "BOOL"

                for action in
                    [
                        (fun () -> file.ReadFloat32 "f8" |> ignore)
                        (fun () -> file.ReadInt64 "f32" |> ignore)
                    ] do
                    Expect.equal (diagnosticOf action).Code Codes.SafeTensorsType "other types"

                let d = diagnosticOf (fun () -> file.Info "f33" |> ignore)
                Expect.equal d.Code Codes.SafeTensorsNoTensor "unknown name")
        }
    ]

let private damage =
    testList "SafeTensorsFile" [
        test "the reference files of Hugging Face read" {
            use file = SafeTensorsFile.Open sample
            Expect.sequenceEqual (file.Info "input_ids").Shape [ 2L; 96L ] "shape"
            Expect.equal (file.Info "logits").DType "F32" "type"
            Expect.isTrue (file.ReadInt64 "input_ids" |> Array.forall (fun id -> id >= 0L && id < 512L)) "ids"
            let loss = file.ReadFloat32 "loss"

            Expect.isTrue (loss.Length = 1 && loss[0] > 5f && loss[0] < 8f) "near the logarithm of the vocabulary"
        }
        testTheory "a header that breaks a rule is told" [
            "", 0, "JSON"
            "[]", 0, "not an object"
            "{", 0, ""
            """{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}""", 4, "needs 8 bytes"
            """{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", 3, "3 after its header"
            """{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", 5, "5 after its header"
            """{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}""", 4, "differ"
            """{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}""", 4, "from 0 up"
            """{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}""", 4, "from 0 up"
            """{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}""", 4, "from 0 up"
            """{"a":{"dtype":"F32","shape":[1e99],"data_offsets":[0,4]}}""", 4, "from 0 up"
            """{"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}}""", 4, "from 0 up"
            """{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}""", 4, "not known"
            """{"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}}""", 4, "not a string"
            """{"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}""", 4, "not an array"
            """{"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}}""", 4, "two data_offsets"
            """{"a":{"dtype":"F32","shape":[1]}}""", 4, "needs dtype"
            """{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}}""", 4, "unknown or occurs twice"
            """{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", 4, "occurs twice"
            """{"a":{"dtype":"F32","shape":{"b":[[1]]},"data_offsets":[0,4]}}""", 4, "not an array"
            """{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}""",
            1,
            "more than 64"
            """{"__metadata__":{"a":"b","a":"b"}}""", 0, "twice"
            """{}{}""", 0, ""
            """{"a":3}""", 0, "not an object"
            """{"__metadata__":{"a":3}}""", 0, "not a string"
            """{"a":{"dtype":"F32","shape":[[[[1]]]],"data_offsets":[0,4]}}""", 4, "from 0 up"
            """{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}""",
            2,
            "twice"
            """{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}""",
            3,
            "overlaps"
            """{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}""",
            3,
            "gap"
            """{"a":{"dtype":"F64","shape":[4611686018427387904,4],"data_offsets":[0,0]}}""", 0, "overflow"
            """{"a":{"dtype":"U8","shape":[1],"data_offsets":[9223372036854775806,9223372036854775807]}}""", 1, "gap"
        ]
        <| fun (header, data, message) ->
            inFolder (fun folder ->
                let d = openFails Codes.SafeTensorsMalformed (raw folder header data)
                Expect.stringContains (d.Message.ToLowerInvariant()) (message.ToLowerInvariant()) "the rule")
        test "a length that cannot be is told" {
            inFolder (fun folder ->
                for length in [ -1L; Int64.MaxValue; Int64.MinValue; 100_000_001L; 3L ] do
                    let path = Path.Combine(folder, "a.safetensors")

                    File.WriteAllBytes(path, Array.append (BitConverter.GetBytes length) [| 0x7Buy; 0x7Duy |])

                    openFails Codes.SafeTensorsMalformed path |> ignore)
        }
        test "missing files, folders and empty names are told" {
            inFolder (fun folder ->
                for path in [ Path.Combine(folder, "missing"); folder; "" ] do
                    openFails Codes.SafeTensorsUnreadable path |> ignore)
        }
        test "a file cut anywhere is told" {
            inFolder (fun folder ->
                let whole = File.ReadAllBytes sample
                let path = Path.Combine(folder, "a.safetensors")
                let random = Random 1

                for cut in [ 0; 1; 7; 8; 9; 500; whole.Length - 1 ] @ [ for _ in 1..50 -> random.Next whole.Length ] do
                    File.WriteAllBytes(path, whole[.. cut - 1])
                    openFails Codes.SafeTensorsMalformed path |> ignore)
        }
    ]

let tests = testList "Weights" [ roundTrips; damage ]

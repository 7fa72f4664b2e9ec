/// Damaged safetensors files: each gives a diagnostic, or reads with every byte in bounds.
module DeepSeekGraph.Runtime.Tests.SafeTensorsFuzz

open System
open System.Diagnostics
open System.IO
open System.Text
open System.Text.RegularExpressions
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Runtime.Tests.DataTests

/// A file's header as text, and its data.
type private Parts = { Header: string; Data: byte[] }

let private latin = Encoding.Latin1

/// Latin-1 keeps every byte of a header what it is.
let private partsOf (bytes: byte[]) =
    let length = int (BitConverter.ToInt64(bytes, 0))

    {
        Header = latin.GetString(bytes, 8, length)
        Data = bytes[8 + length ..]
    }

let private fileOf (parts: Parts) =
    let header = latin.GetBytes parts.Header
    Array.concat [ BitConverter.GetBytes(int64 header.Length); header; parts.Data ]

/// Every element type, an empty tensor and a scalar.
let allTypes folder =
    let path = Path.Combine(folder, "types.safetensors")

    let entry (i: int) (dtype: string) =
        let bytes = Array.init (6 * SafeTensorTypes.BytesOf dtype) (fun b -> byte (b * 7 + i))
        SafeTensorEntry($"layers.%d{i}.%s{dtype}", dtype, [| 2L; 3L |], ReadOnlyMemory bytes)

    let entries = [
        yield! Seq.mapi entry SafeTensorTypes.All
        SafeTensorEntry("empty", "F32", [| 0L; 5L |], ReadOnlyMemory [||])
        SafeTensorEntry("scalar", "BF16", [||], ReadOnlyMemory [| 1uy; 2uy |])
    ]

    SafeTensorsWriter.Write(path, entries, dict [ "format", "pt" ] |> System.Collections.Generic.Dictionary)
    path

let private pick (random: Random) (from: 'a[]) = from[random.Next from.Length]

let private numbers = [|
    "-1"
    "0"
    "1"
    "0.5"
    "1.0"
    "-0"
    "1e99"
    "1E2"
    "NaN"
    "Infinity"
    "9223372036854775807"
    "9223372036854775808"
    "-9223372036854775808"
    "18446744073709551616"
    "4611686018427387904"
    String('9', 400)
    "\"1\""
    "null"
    "true"
    "[]"
    "{}"
|]

let private strings = [|
    "\\u0041"
    "\\ud800"
    "\\u0000"
    "\\"
    "\""
    "\u0000"
    "\u00ff"
    "\\udc00\\ud800"
    "\\uZZZZ"
    "\n"
|]

/// One match of a pattern in the header, chosen at random, replaced.
let private edit (random: Random) (pattern: string) (change: string -> string) (parts: Parts) =
    let found = Regex.Matches(parts.Header, pattern)

    if found.Count = 0 then
        parts
    else
        let at = found[random.Next found.Count]

        {
            parts with
                Header = parts.Header[.. at.Index - 1] + change at.Value + parts.Header[at.Index + at.Length ..]
        }

let private nested (random: Random) =
    let depth = pick random [| 3; 10; 100; 3000 |]

    if random.Next 2 = 0 then
        String('[', depth) + "1" + String(']', depth)
    else
        String.replicate depth "{\"a\":" + "1" + String('}', depth)

/// What can be wrong in the JSON of a header.
let private jsonEdits: (Random -> Parts -> Parts)[] = [|
    fun r -> edit r @"\d+" (fun _ -> pick r numbers)
    fun r ->
        edit r @"\d+" (fun n ->
            (match Int64.TryParse n with
             | true, value -> string (value + int64 (r.Next(-9, 10)))
             | _ -> n))
    fun r -> edit r @"\[[\d,]*\]" (fun _ -> nested r)
    fun r -> edit r "\"[^\"]*\":\\{[^}]*\\}" (fun entry -> entry + "," + entry)
    fun r -> edit r "\"[^\"]*\":\\{[^}]*\\}" (fun _ -> "")
    fun r -> edit r "\"data_offsets\":\\[[^]]*\\]" (fun offsets -> offsets + "," + offsets)
    fun r -> edit r "[A-Za-z_.]" (fun _ -> pick r strings)
    fun r -> edit r "\"dtype\":\"[^\"]*\"" (fun _ -> $"\"dtype\":\"%s{pick r (Seq.toArray SafeTensorTypes.All)}\"")
    fun r ->
        edit r "\"shape\":\\[[^]]*\\]" (fun _ -> "\"shape\":[" + String.Join(",", Array.create (r.Next 70) "1") + "]")
    fun r -> edit r "\"shape\":\\[[^]]*\\]" (fun _ -> "\"shape\":[0,9223372036854775807,9223372036854775807]")
    fun r parts ->
        // the places of two tensors change hands
        let found = Regex.Matches(parts.Header, "\"data_offsets\":\\[[^]]*\\]")

        if found.Count = 0 then
            parts
        else
            let a, b = found[r.Next found.Count].Value, found[r.Next found.Count].Value

            {
                parts with
                    Header = parts.Header.Replace(a, "@").Replace(b, a).Replace("@", b)
            }
    fun r parts -> {
        parts with
            Header = parts.Header[.. r.Next parts.Header.Length]
    }
    fun r parts -> {
        parts with
            Header = parts.Header + pick r [| "{}"; " "; "x"; "\u0000"; "\t\n" |]
    }
|]

/// What can be wrong in the bytes of a file.
let private byteEdits: (Random -> byte[] -> byte[])[] = [|
    fun r bytes ->
        for _ in 0 .. r.Next 8 do
            let at = r.Next(if r.Next 4 = 0 then bytes.Length else min bytes.Length 4096)
            bytes[at] <- bytes[at] ^^^ (1uy <<< r.Next 8)

        bytes
    fun r bytes -> bytes[.. r.Next bytes.Length - 1]
    fun r bytes -> Array.append bytes (Array.zeroCreate (1 + r.Next 64))
    fun r bytes ->
        let length = BitConverter.ToInt64(bytes, 0)

        let lie =
            pick r [|
                0L
                length - 1L
                length + 1L
                length + 8L
                int64 bytes.Length - 8L
                int64 bytes.Length - 7L
                100_000_000L
                100_000_001L
                Int64.MaxValue
                Int64.MinValue
                -1L
                r.NextInt64 length
            |]

        Array.append (BitConverter.GetBytes lie) bytes[8..]
|]

let private mutated (random: Random) (seed: byte[]) =
    let json (bytes: byte[]) = bytes |> partsOf |> pick random jsonEdits random |> fileOf
    let bytes (bytes: byte[]) = pick random byteEdits random (Array.copy bytes)

    match random.Next 5 with
    | 0
    | 1 -> json seed
    | 2 -> json (json seed)
    | 3 -> bytes seed
    | _ -> bytes (json seed)

/// Touches every byte of every tensor, and makes each a tensor of LibTorch. True: the file reads.
let private readsInBounds (path: string) =
    try
        use file = SafeTensorsFile.Open path
        let mutable touched = 0L
        let mutable sum = 0L

        for name in file.Names do
            let info = file.Info name
            let at = int64 (file.Pointer name - file.Start)
            Expect.isTrue (at >= 8L && at + info.Bytes <= FileInfo(path).Length) $"'%s{name}' lies in the file"

            for b in file.Bytes name do
                sum <- sum + int64 b

            touched <- touched + info.Bytes

            try
                use tensor = file.Tensor name
                Expect.equal (tensor.numel ()) info.Elements "elements"
            with :? DiagnosticException as e ->
                Expect.equal e.Diagnostics[0].Code Codes.SafeTensorsType "a shape that no tensor has"

        Expect.isTrue (sum >= 0L && touched < FileInfo(path).Length) "the data is less than the file"
        true
    with :? DiagnosticException as e ->
        Expect.isTrue (e.Diagnostics[0].Code.StartsWith "DSG082") (string e.Diagnostics[0])
        Expect.isLessThan (string e.Diagnostics[0]).Length 4000 "nobody reads more"
        false

/// Real files: shards of fp8 where they are at hand, else the reference cases; and one with every type.
let private seeds folder =
    let real =
        match Shared.folder "golden/v3_tiny_fp8" with
        | Some golden -> Directory.GetFiles(golden, "*.safetensors")
        | None -> Directory.GetFiles(Shared.inRepository "tests/golden/v3_tiny_plain", "reference.safetensors")

    let types = allTypes folder
    [| yield! real; types; types; types |] |> Array.map File.ReadAllBytes

let private inputs = Shared.count "DSG_FUZZ_FILES" 2000

let tests =
    testList "SafeTensorsFuzz" [
        test $"%d{inputs} damaged files give a diagnostic or read in bounds" {
            inFolder (fun folder ->
                let seeds = seeds folder
                let path = Path.Combine(folder, "a.safetensors")
                let watch = Stopwatch.StartNew()
                let mutable read = 0

                for input in 1..inputs do
                    let random = Random input
                    File.WriteAllBytes(path, mutated random (pick random seeds))

                    try
                        if readsInBounds path then
                            read <- read + 1
                    with e when not (e :? AssertException) ->
                        failtest $"input %d{input}: %O{e}"

                if inputs > 2000 then
                    printfn
                        $"%d{inputs} damaged files: %d{read} read, the others are told; %.0f{watch.Elapsed.TotalSeconds} s"

                Expect.isGreaterThan read (inputs / 50) "some damage is harmless"
                Expect.isGreaterThan (inputs - read) (inputs / 2) "most damage is seen")
        }
        test "600 damaged indices give a diagnostic or name files beside them" {
            inFolder (fun folder ->
                let file = allTypes folder
                let one = Path.Combine(folder, "model-00001-of-000002.safetensors")
                File.Move(file, one)

                SafeTensorsWriter.Write(
                    Path.Combine(folder, "model-00002-of-000002.safetensors"),
                    [ SafeTensorEntry("other", "U8", [| 1L |], ReadOnlyMemory [| 1uy |]) ]
                )

                let names =
                    use opened = SafeTensorsFile.Open one

                    [
                        yield! opened.Names |> Seq.map (fun name -> name, "model-00001-of-000002.safetensors")
                    ]

                let whole =
                    SafeTensorsIndex.Write(
                        dict (("other", "model-00002-of-000002.safetensors") :: names)
                        |> System.Collections.Generic.Dictionary,
                        1L
                    )
                    |> latin.GetString

                let path = Path.Combine(folder, "model.safetensors.index.json")
                let mutable read = 0

                for input in 1..600 do
                    let random = Random input
                    let parts = { Header = whole; Data = [||] }

                    let edits: (Random -> Parts -> Parts)[] = [|
                        fun r -> edit r "[A-Za-z_.]" (fun _ -> pick r strings)
                        fun r ->
                            edit r "model-[^\"]*" (fun f ->
                                pick r [|
                                    "/etc/passwd"
                                    "../" + f
                                    "a/" + f
                                    ""
                                    ".safetensors"
                                    "no.safetensors"
                                    f + "\\u0000.safetensors"
                                |])
                        fun r -> edit r "model-0000[12]" (fun _ -> "model-0000" + string (r.Next 4))
                        fun r -> edit r "\"[^\"]*\": \"[^\"]*\"" (fun entry -> entry + "," + entry)
                        fun r -> edit r "\"[^\"]*\": \"[^\"]*\",?" (fun _ -> "")
                        fun r -> edit r "\"model[^\"]*\"" (fun _ -> nested r)
                        fun r p -> {
                            p with
                                Header = p.Header[.. r.Next p.Header.Length]
                        }
                        fun r p -> {
                            p with
                                Header = p.Header.Insert(r.Next p.Header.Length, pick r [| " "; "\n"; "{"; "x" |])
                        }
                    |]

                    File.WriteAllBytes(path, latin.GetBytes (pick random edits random parts).Header)

                    try
                        use set = SafeTensorsSet.Open folder
                        // an index that leaves a whole file out is one of fewer tensors
                        Expect.isTrue
                            (set.Names.Count = names.Length + 1 || set.Names.Count = names.Length)
                            "all tensors"

                        read <- read + 1
                    with
                    | :? DiagnosticException as e ->
                        Expect.isTrue (e.Diagnostics[0].Code.StartsWith "DSG082") (string e.Diagnostics[0])
                    | e when not (e :? AssertException) -> failtest $"input %d{input}: %O{e}"

                Expect.isTrue (read > 10 && read < 300) $"%d{read} read")
        }
    ]

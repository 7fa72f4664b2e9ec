/// The training data: corpus, byte tokenizer, and the order in which steps take sequences.
module DeepSeekGraph.Runtime.Tests.DataTests

open System
open System.Collections.Generic
open System.IO
open System.Text
open Expecto
open FsCheck
open DeepSeekGraph
open DeepSeekGraph.Runtime.Data
open DeepSeekGraph.Testing

/// Runs `test` on a new folder that is gone afterwards.
let inFolder (test: string -> unit) =
    let folder = Directory.CreateTempSubdirectory("dsg-data-").FullName

    try
        test folder
    finally
        Directory.Delete(folder, true)

/// The one diagnostic that `action` must end in.
let diagnosticOf (action: unit -> unit) =
    try
        action ()
        failtest "there was no diagnostic"
    with :? DiagnosticException as e ->
        Expect.hasLength e.Diagnostics 1 "one diagnostic"
        e.Diagnostics[0]

let private write folder name (text: string) =
    let path = Path.Combine(folder, name)
    Directory.CreateDirectory(Path.GetDirectoryName path |> nonNull) |> ignore
    File.WriteAllText(path, text)
    path

let private mentionsData (d: Diagnostic) = Expect.stringContains (d.At + d.Help) "--data" "names the option"

let private streamOf texts = TokenStream.Of(Corpus.FromTexts("a test", texts))

/// 2,000 different tokens: byte values 1..250 in turn, then the separator.
let private counting = streamOf [ String(Array.init 1999 (fun i -> char (1 + i % 127))) ]

let private corpus =
    testList "Corpus" [
        test "a text file is one document" {
            inFolder (fun folder ->
                let path = write folder "a.txt" "One line.\nAnd another.\n"
                let corpus = Corpus.Open path
                Expect.sequenceEqual corpus.Documents [ "One line.\nAnd another.\n" ] "the text"
                Expect.equal corpus.Bytes 23L "its size")
        }
        test "every line of a jsonl file is a document, blank lines are not" {
            inFolder (fun folder ->
                let path = write folder "a.jsonl" "{\"text\": \"one\"}\n\n{\"id\": 7, \"text\": \"two\\u00e9\"}"

                Expect.sequenceEqual (Corpus.Open path).Documents [ "one"; "two\u00e9" ] "the texts")
        }
        test "a folder is read recursively, in ordinal order of paths" {
            inFolder (fun folder ->
                for name in [ "b.txt"; "a/z.nvjsonl"; "B.txt"; "a/b/c.jsonl"; "a.txt"; "ignored.bin" ] do
                    let text = if name.EndsWith "l" then $"{{\"text\": \"%s{name}\"}}" else name

                    write folder name text |> ignore

                let expected = [ "B.txt"; "a.txt"; "a/b/c.jsonl"; "a/z.nvjsonl"; "b.txt" ]
                Expect.sequenceEqual (Corpus.Open folder).Documents expected "the order")
        }
        testTheory "a malformed line is told with its file and number" [
            "not json"
            "{\"text\": \"cut sho"
            "{\"txt\": \"no such name\"}"
            "{\"text\": 12}"
            "[\"text\"]"
            "{\"text\": \"\\ud800\"}"
            String('[', 5000)
        ]
        <| fun line ->
            inFolder (fun folder ->
                let path = write folder "a.jsonl" $"{{\"text\": \"good\"}}\n%s{line}\n"
                let d = diagnosticOf (fun () -> Corpus.Open path |> ignore)
                Expect.equal d.Code Codes.DataMalformed "code"
                Expect.stringContains d.At "a.jsonl:2" "file and line"
                mentionsData d)
        test "text that is not UTF-8 is told" {
            inFolder (fun folder ->
                for name in [ "a.txt"; "a.jsonl" ] do
                    let path = Path.Combine(folder, name)
                    File.WriteAllBytes(path, [| 0x61uy; 0xFFuy; 0x62uy |])
                    let d = diagnosticOf (fun () -> Corpus.Open path |> ignore)
                    Expect.equal d.Code Codes.DataMalformed "code"
                    mentionsData d)
        }
        test "a missing path, an unknown kind and a folder without data are told" {
            inFolder (fun folder ->
                let other = write folder "sub/a.bin" "x"

                for path in [ Path.Combine(folder, "missing"); other; folder; "" ] do
                    let d = diagnosticOf (fun () -> Corpus.Open path |> ignore)
                    Expect.equal d.Code Codes.DataUnavailable path
                    mentionsData d)
        }
        test "data without text is told" {
            inFolder (fun folder ->
                for name, text in [ "a.txt", ""; "b.txt", " \n"; "c.jsonl", "{\"text\": \"\"}\n" ] do
                    let path = write folder name text
                    let d = diagnosticOf (fun () -> Corpus.Open path |> ignore)
                    Expect.equal d.Code Codes.DataTooSmall name
                    mentionsData d)
        }
        test "links that form a loop do not hang" {
            inFolder (fun folder ->
                write folder "a/a.txt" "x" |> ignore

                Directory.CreateSymbolicLink(Path.Combine(folder, "a", "loop"), folder) |> ignore

                Expect.hasLength (Corpus.Open folder).Documents 1 "once")
        }
        test "the default corpus is found, readable and the same every time" {
            let first, second = Corpus.Default(), Corpus.Default()
            Expect.isGreaterThan first.Bytes 1_000_000L "more than a megabyte"
            Expect.isGreaterThan first.Documents.Count 1000 "many documents"
            Expect.equal first.Documents.Count (HashSet first.Documents).Count "no document twice"
            Expect.isTrue (Seq.forall2 (=) first.Documents second.Documents) "the same order"

            let dictionary =
                first.Documents
                |> Seq.find _.StartsWith("System.Collections.Generic.Dictionary\n", StringComparison.Ordinal)

            Expect.stringContains dictionary "Represents a collection of keys and values." "summary"
            Expect.stringContains dictionary "Throws ArgumentNullException: key is null." "references by name"
            Expect.isFalse (dictionary.Contains '<') "no markup"
        }
    ]

let private docs =
    testList "DocXml" [
        test "markup becomes readable English" {
            inFolder (fun folder ->
                let xml =
                    """<?xml version="1.0"?><doc><members>
                    <member name="T:A.B.List`1"><summary>Holds <c>items</c>,
                       see <see cref="M:A.B.List`1.Add(`0,System.Int32)"/>.</summary>
                      <remarks><para>One.</para><para>Two is <see langword="true" />.</para></remarks>
                      <example><code>
                        var a = 1;
                          var b = 2;
                      </code></example></member>
                    <member name="M:A.B.List`1.#ctor(System.Int32)"><summary>Makes it.</summary>
                      <param name="size">At least <paramref name="least"/>.</param>
                      <exception cref="T:System.ArgumentException">No <b>room</b>.</exception>
                      <returns>Nothing.</returns></member>
                    <member name="P:A.B.List`1.Empty"><inheritdoc/></member>
                    <member name="F:A.B.Color.Red"><summary>Red.</summary></member>
                    </members></doc>"""

                let types = write folder "a.xml" xml |> DocXml.Read
                Expect.sequenceEqual [ for t in types -> t.Name ] [ "A.B.List"; "A.B.Color" ] "types"

                Expect.sequenceEqual
                    types[0].Members
                    [
                        "Holds items, see List.Add.\nOne.\nTwo is true.\nvar a = 1;\n  var b = 2;"
                        "new List(size)\nMakes it.\nsize: At least least.\n"
                        + "Throws ArgumentException: No room.\nReturns: Nothing."
                    ]
                    "members"

                Expect.sequenceEqual types[1].Members [ "Color.Red\nRed." ] "a member alone")
        }
        test "a malformed or hostile file says no more than what came before" {
            inFolder (fun folder ->
                let good = "<doc><members><member name=\"T:A\"><summary>Fine.</summary></member>"

                for text, count in
                    [
                        good + "<member", 1
                        "<!DOCTYPE d [<!ENTITY e SYSTEM \"file:///etc/hostname\">]>" + good, 0
                        "", 0
                        "no xml", 0
                        "<a><b/></a>", 0
                    ] do
                    Expect.hasLength (write folder "a.xml" text |> DocXml.Read) count text)
        }
    ]

let private tokenizer =
    testList "ByteTokenizer" [
        Properties.property "text without zeros comes back"
        <| fun (text: string) ->
            let text = Encoding.UTF8.GetString(Encoding.UTF8.GetBytes(string text)).Replace("\000", "")

            let tokens = ByteTokenizer.Instance.EncodeText text |> Array.map int64
            ByteTokenizer.Instance.Decode(ReadOnlySpan tokens) = text

        Properties.property "the separator occurs behind each document and nowhere else"
        <| fun (NonEmptyArray texts: NonEmptyArray<NonEmptyString>) ->
            let texts = [ for NonEmptyString t in texts -> t + "." ]
            let stream = streamOf texts
            let tokens = Array.zeroCreate<int64>(int stream.Length)
            stream.CopyTo(0L, Span tokens)

            Seq.length (Seq.filter ((=) 0L) tokens) = texts.Length
            && Array.last tokens = 0L
            && tokens |> Array.forall (fun t -> t >= 0L && t < int64 stream.Vocabulary)

        test "tokens are bytes, separators read as line ends" {
            Expect.sequenceEqual (ByteTokenizer.Instance.EncodeText "a\000\u00e9") [ 97; 0xC3; 0xA9 ] "bytes"

            Expect.equal
                (ByteTokenizer.Instance.Decode(ReadOnlySpan [| 97L; 0L; 98L; 300L; -1L |]))
                "a\nb\uFFFD\uFFFD"
                "text"
        }
    ]

let private order =
    testList "BatchSampler" [
        Properties.property "the order of every epoch holds each sequence once"
        <| fun (count: uint16) (seed: uint64) (epoch: byte) ->
            let count = int64 count % 3000L + 1L
            let permutation = Permutation(count, seed, int64 epoch)
            let hit = [| for i in 0L .. count - 1L -> permutation[i] |]
            Array.sort hit = [| 0L .. count - 1L |]

        test "orders differ by seed and by epoch, and are far from sorted" {
            let order seed epoch = [| for i in 0L .. 999L -> Permutation(1000L, seed, epoch).[i] |]
            let first = order 1UL 0L
            Expect.notEqual first (order 2UL 0L) "seed"
            Expect.notEqual first (order 1UL 1L) "epoch"

            let ascents = first |> Seq.pairwise |> Seq.filter (fun (a, b) -> a < b) |> Seq.length

            Expect.isTrue (ascents > 400 && ascents < 600) $"%i{ascents} of 999 neighbours ascend"
        }
        test "the order never changes: resumed runs and other machines depend on it" {
            let order = [ for i in 0L .. 7L -> Permutation(1000L, 42UL, 3L).[i] ]
            Expect.sequenceEqual order [ 986L; 192L; 85L; 227L; 9L; 810L; 563L; 370L ] "pinned"
        }
        test "rows are runs of S tokens and read on for their labels" {
            let sampler = BatchSampler(counting, 4, 100, 2, 7UL)
            Expect.equal sampler.Sequences 19L "19 begin where 102 tokens are left"
            let batch = sampler.Get 3L
            Expect.equal (batch.Rows, batch.Columns, batch.Tokens.Length) (4, 102, 408) "shape"
            let all = Array.zeroCreate<int64>(int counting.Length)
            counting.CopyTo(0L, Span all)

            for row in 0..3 do
                let start = int (sampler.SequenceAt(12L + int64 row)) * 100
                Expect.sequenceEqual (batch.Row(row).ToArray()) all[start .. start + 101] "the tokens"
        }
        Properties.property "rows that ranks ask for make up the global batch"
        <| fun (seed: uint64) (step: byte) (cut: byte) ->
            let sampler = BatchSampler(counting, 6, 30, 1, seed)
            let step, cut = int64 step, int cut % 7
            let parts = [ sampler.Get(step, 0, cut); sampler.Get(step, cut, 6 - cut) ]
            Array.concat [ for part in parts -> part.Tokens ] = sampler.Get(step).Tokens

        test "the same seed gives the same batches; an epoch is used up before the next" {
            let make () = BatchSampler(counting, 5, 100, 1, 11UL)
            let a, b = make (), make ()

            for step in [ 0L; 1L; 17L; 1_000_000_007L ] do
                Expect.sequenceEqual (a.Get(step).Tokens) (b.Get(step).Tokens) "same"

            let places = [ for place in 0L .. 2L * a.Sequences - 1L -> a.SequenceAt place ]
            let counts = places |> List.countBy id
            Expect.hasLength counts (int a.Sequences) "all sequences"
            Expect.isTrue (counts |> List.forall (fun (_, n) -> n = 2)) "twice in two epochs"
        }
        test "a batch may be larger than the corpus" {
            let sampler = BatchSampler(streamOf [ "ten bytes." ], 8, 4, 1, 0UL)
            Expect.equal sampler.Sequences 2L "sequences"
            Expect.hasLength (sampler.Get(0L).Tokens) 40 "tokens"
        }
        test "less than one sequence is told; exactly one is enough" {
            let stream = streamOf [ "123456789" ]
            Expect.equal (BatchSampler(stream, 1, 9, 1, 0UL).Sequences) 1L "nine, and the separator as label"
            let d = diagnosticOf (fun () -> BatchSampler(stream, 1, 10, 1, 0UL) |> ignore)
            Expect.equal d.Code Codes.DataTooSmall "code"
            Expect.stringContains d.Message "10 tokens, a sequence needs 11" "both values"
            mentionsData d
        }
    ]

let tests = testList "Data" [ corpus; docs; tokenizer; order ]

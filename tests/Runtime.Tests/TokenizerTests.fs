/// Tokenizers of Hugging Face: the definition on a small one, the reference implementation's ids on DeepSeek-V3's.
module DeepSeekGraph.Runtime.Tests.TokenizerTests

open System
open System.IO
open System.Linq
open System.Text
open System.Text.Json
open System.Text.RegularExpressions
open Expecto
open FsCheck
open DeepSeekGraph
open DeepSeekGraph.Runtime.Data
open DeepSeekGraph.Runtime.Data.Tokenizers
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Testing

/// The tokenizer of these two files.
let load json config =
    let folder = Directory.CreateTempSubdirectory("dsg-tokenizer-").FullName

    try
        SampleTokenizer.writeTo folder json config
        HuggingFaceTokenizer.Load folder
    finally
        Directory.Delete(folder, true)

let private sample = lazy (load SampleTokenizer.json SampleTokenizer.config)

let private ids (text: string) = sample.Value.Encode(text, false) |> List.ofArray

let private text (ids: int seq) = sample.Value.Decode(ReadOnlySpan(Seq.toArray ids))

let private idOf (token: string) = SampleTokenizer.vocabulary[token]

/// Text that is whole: halves of surrogate pairs do not come back.
let private whole (text: string | null) = Encoding.UTF8.GetString(Encoding.UTF8.GetBytes(string text))

let private streamed (tokenizer: HuggingFaceTokenizer) (ids: int seq) =
    let stream = tokenizer.Stream()
    let parts = [ for id in ids -> stream.Next id ]
    String.concat "" parts + stream.Flush()

let private small =
    testList "HuggingFaceTokenizer" [
        testTheory "text is cut into pieces as DeepSeek-V3's patterns say" [
            "", []
            "the the", [ "the"; " the" ]
            "a  b", [ "a"; " "; " b" ]
            "x12345", [ "x"; "123"; "45" ]
            "f(abc);\n\nend", [ "f"; "(abc"; ");\n\n"; "end" ]
            "日本語abc", [ "日本語"; "abc" ]
            "a\u4e00b \u3042", [ "a"; "\u4e00"; "b"; " "; "\u3042" ]
            "e\u0301\u0301 x", [ "e\u0301\u0301"; " x" ]
            "tab\tx \n y", [ "tab"; "\tx"; " \n"; " y" ]
            "a👍🏽b", [ "a"; "👍🏽"; "b" ]
            "𝒳𝒴 1²", [ "𝒳𝒴"; " "; "1²" ]
            "\u0001\u0002", [ "\u0001\u0002" ]
            "\u200d", [ "\u200d" ]
            "end   ", [ "end"; "   " ]
        ]
        <| fun (text, pieces) ->
            let ends = DeepSeekPieces.Ends(text.AsSpan()) |> List.ofSeq
            let starts = 0 :: ends |> List.take ends.Length
            Expect.equal [ for a, b in List.zip starts ends -> text[a .. b - 1] ] pieces "pieces"

        Properties.property "ids are those of the definition, piece by piece"
        <| fun (text: string) ->
            let text = whole text
            let ends = 0 :: List.ofSeq (DeepSeekPieces.Ends(text.AsSpan()))

            let wanted = List.pairwise ends |> List.collect (fun (a, b) -> SampleTokenizer.encodePiece text[a .. b - 1])

            List.ofArray (sample.Value.EncodeText text) = wanted

        Properties.property "words of few letters merge as the definition says"
        <| fun (letters: byte list) ->
            let text = String([| for b in letters -> "abcthe 12"[int b % 9] |])
            let ends = 0 :: List.ofSeq (DeepSeekPieces.Ends(text.AsSpan()))

            let wanted = List.pairwise ends |> List.collect (fun (a, b) -> SampleTokenizer.encodePiece text[a .. b - 1])

            List.ofArray (sample.Value.EncodeText text) = wanted

        test "long pieces merge as short ones do, and in no time" {
            let random = Random 4

            for length in [ 513; 600; 1024 ] do
                let piece = String(Array.init length (fun _ -> "abc"[random.Next 3]))
                Expect.equal (ids piece) (SampleTokenizer.encodePiece piece) $"%d{length} letters"

            let watch = Diagnostics.Stopwatch.StartNew()
            let long = String('a', 1_000_000)
            let tokens = ids long
            Expect.isTrue (tokens.Length = 250_000 && text tokens = long) "a million letters"
            Expect.isLessThan watch.Elapsed.TotalSeconds 60.0 "the package's loop would take minutes"
        }
        Properties.property "text comes back, at once and streamed"
        <| fun (text: string) ->
            let text = whole text
            let tokenizer = sample.Value
            let some = tokenizer.EncodeText text
            let all = tokenizer.Encode(text, false)

            tokenizer.Decode(ReadOnlySpan some) = text
            && tokenizer.Decode(ReadOnlySpan all) = text
            && streamed tokenizer all = text

        Properties.property "any ids decode, streamed as at once"
        <| fun (ids: int[]) ->
            let ids = ids |> Array.map (fun id -> id % 300)
            streamed sample.Value ids = sample.Value.Decode(ReadOnlySpan ids)

        test "added tokens: the longest at a place, those that are not normalized first" {
            let user, less = idOf "<|User|>", ids "<"
            Expect.equal (ids "<|User|>") [ user ] "whole"
            Expect.equal (ids "a<|User|><|Userx") (ids "a" @ [ user; idOf "<|User" ] @ ids "x") "the longer one"

            Expect.equal
                (ids "<|Use")
                (SampleTokenizer.encodePiece "<|" @ SampleTokenizer.encodePiece "Use")
                "part of one"

            Expect.equal (ids "<s></s>") [ idOf "<s>"; idOf "</s>" ] "from left to right"
            Expect.equal (ids "<<s><") (less @ [ idOf "<s>" ] @ less) "taken where it begins"
            Expect.isFalse (Array.contains (idOf "</s>") (sample.Value.EncodeText "a</s>")) "plain text"
            Expect.equal (text [ idOf "<s>"; idOf "a" ]) "<s>a" "by name"

            Expect.equal
                (sample.Value.Decode(ReadOnlySpan [| idOf "<s>"; idOf "a"; user |], true))
                "a<|User|>"
                "skipped"
        }
        test "bos, eos and ends come from the configuration" {
            let tokenizer = sample.Value
            Expect.equal (List.ofArray (tokenizer.Encode "a")) [ idOf "<s>"; idOf "a" ] "bos before"
            Expect.equal tokenizer.Separator (idOf "</s>") "separator"
            Expect.sequenceEqual tokenizer.Ends [ idOf "</s>" ] "ends"
            Expect.isFalse tokenizer.Pad.HasValue "no pad"
            Expect.equal tokenizer.Vocabulary SampleTokenizer.vocabulary.Count "size"
            let both = load SampleTokenizer.json """{"add_eos_token": true, "eos_token": "</s>"}"""
            Expect.equal (List.ofArray (both.Encode "a")) [ idOf "a"; idOf "</s>" ] "eos behind"
            Expect.isFalse both.Bos.HasValue "no bos"

            inFolder (fun folder ->
                SampleTokenizer.writeTo folder SampleTokenizer.json SampleTokenizer.config
                File.WriteAllText(Path.Combine(folder, "generation_config.json"), """{"eos_token_id": [1, 7]}""")
                Expect.sequenceEqual (HuggingFaceTokenizer.Load(folder).Ends) [ 1; 7 ] "of generation, too"
                File.Delete(Path.Combine(folder, "tokenizer_config.json"))
                let bare = HuggingFaceTokenizer.Load(Path.Combine(folder, "tokenizer.json"))
                let d = diagnosticOf (fun () -> bare.Separator |> ignore)
                Expect.equal d.Code Codes.TokenizerMalformed "no separator")
        }
        test "half of a character waits, half of a surrogate pair is U+FFFD" {
            let stream = sample.Value.Stream()
            let bytes = sample.Value.EncodeText "é👍"
            Expect.equal [ for id in bytes -> stream.Next id ] [ ""; "é"; ""; ""; ""; "👍" ] "streamed"
            Expect.equal (stream.Next bytes[2]) "" "the first byte of four"
            Expect.equal (stream.Flush()) "\uFFFD" "cut off"
            Expect.equal (stream.Next bytes[0] + stream.Next bytes[1]) "é" "begins anew"

            for half in [ "\ud800"; "a\udc00b"; "\udc00\ud800"; "👍\ud83d" ] do
                let replaced = Regex.Replace(half.Replace("👍", "@"), "[\ud800-\udfff]", "\uFFFD").Replace("@", "👍")
                Expect.equal (ids half) (ids replaced) "as U+FFFD"
        }
        test "a token stream of documents ends each with eos, and ids above a byte are kept" {
            let stream = TokenStream.Of(Corpus.FromTexts("a test", [ "the the"; "abc</s>" ]), sample.Value)
            let tokens = Array.zeroCreate<int64>(int stream.Length)
            stream.CopyTo(0L, Span tokens)
            let eos = idOf "</s>"

            let wanted = [
                yield! sample.Value.EncodeText "the the"
                eos
                yield! sample.Value.EncodeText "abc</s>"
                eos
            ]

            Expect.sequenceEqual tokens (List.map int64 wanted) "tokens"
            Expect.equal (tokens |> Seq.filter ((=) (int64 eos)) |> Seq.length) 2 "text forges no end"
            Expect.equal (sample.Value.Decode(ReadOnlySpan tokens)) "the the</s>abc</s></s>" "and back"
        }
    ]

let private fails code (word: string) json config =
    let d = diagnosticOf (fun () -> load json config |> ignore)
    Expect.equal d.Code code (string d)
    Expect.stringContains (d.At + " " + d.Message) word "the words"

/// The file with one text changed.
let private changed (from: string) (into: string) =
    Expect.stringContains SampleTokenizer.json from "there is something to change"
    let at = SampleTokenizer.json.IndexOf(from, StringComparison.Ordinal)
    SampleTokenizer.json.Remove(at, from.Length).Insert(at, into)

let private damaged =
    testList "damaged tokenizers" [
        testTheory "what is malformed is told by its place" [
            "\"type\":\"BPE\",", "", Codes.TokenizerUnsupported, "model.type"
            "\"merges\":[\"t h\"", "\"merges\":[\"t\"", Codes.TokenizerMalformed, "model.merges[0]"
            "\"merges\":[\"t h\"", "\"merges\":[7", Codes.TokenizerMalformed, "model.merges[0]"
            "\"merges\":[\"t h\"", "\"merges\":[\"h t\"", Codes.TokenizerMalformed, "in the vocabulary"
            "\"merges\":[\"t h\"", "\"merges\":[\"th e\"", Codes.TokenizerMalformed, "came before"
            "\"!\":", "\"!!!\":", Codes.TokenizerMalformed, "no token for the byte 33"
            "\"!\":38", "\"!\":39", Codes.TokenizerMalformed, "the id 39"
            "\"!\":38", "\"!\":-1", Codes.TokenizerMalformed, "model.vocab"
            "\"!\":38", "\"!\":99999999", Codes.TokenizerMalformed, "whole number"
            "\"!\":38", "\"!\":38.5", Codes.TokenizerMalformed, "whole number"
            "\"!\":38", "\"!\":38,\"!\":38", Codes.TokenizerMalformed, "no JSON"
            "\"id\":1", "\"id\":0", Codes.TokenizerMalformed, "id 0"
            "\"content\":\"<s>\"", "\"content\":\"\"", Codes.TokenizerMalformed, "added_tokens[0].content"
            "\"content\":\"<s>\"", "\"content\":\"</s>\"", Codes.TokenizerMalformed, "added_tokens"
            "\"special\":true", "\"special\":1", Codes.TokenizerMalformed, "added_tokens[0].special"
            "\"single_word\":false", "\"single_word\":true", Codes.TokenizerUnsupported, "single_word"
            "\"dropout\":null", "\"dropout\":0.1", Codes.TokenizerUnsupported, "model.dropout"
            "\"byte_fallback\":false", "\"byte_fallback\":true", Codes.TokenizerUnsupported, "byte_fallback"
            "\"normalizers\":[]", "\"normalizers\":[{\"type\":\"NFC\"}]", Codes.TokenizerUnsupported, "normalizer"
            "\\\\p{N}{1,3}", "(a+)+b", Codes.TokenizerUnsupported, "pre_tokenizer"
            "Isolated", "Removed", Codes.TokenizerUnsupported, "pre_tokenizer"
            "\"use_regex\":false", "\"use_regex\":true", Codes.TokenizerUnsupported, "use_regex"
            "\"model\":{", "\"model\":[],\"x\":{", Codes.TokenizerMalformed, "not an object"
            "{\"version\"", "[{\"version\"", Codes.TokenizerMalformed, "no JSON"
        ]
        <| fun (from, into, code, word) -> fails code word (changed from into) SampleTokenizer.config

        testTheory "so is what is wrong beside it" [
            "{", "no JSON"
            """{"bos_token": "<s>", "add_bos_token": "yes"}""", "add_bos_token"
            """{"add_bos_token": true}""", "no bos_token"
            """{"add_eos_token": true}""", "no eos_token"
            """{"bos_token": "<none>"}""", "bos_token"
            """{"bos_token": {"text": "<s>"}}""", "bos_token.content"
            """{"chat_template": 3}""", "chat_template"
        ]
        <| fun (config, word) -> fails Codes.TokenizerMalformed word SampleTokenizer.json config

        test "missing, special and huge files are told" {
            inFolder (fun folder ->
                for path in [ Path.Combine(folder, "no.json"); folder; "/dev/zero"; "" ] do
                    let d = diagnosticOf (fun () -> HuggingFaceTokenizer.Load path |> ignore)
                    Expect.equal d.Code Codes.TokenizerUnreadable path

                let path = Path.Combine(folder, "tokenizer.json")
                use file = File.Create path
                file.SetLength(33L <<< 20)
                file.Close()
                let d = diagnosticOf (fun () -> HuggingFaceTokenizer.Load path |> ignore)
                Expect.equal d.Code Codes.TokenizerMalformed "too large")
        }
        test "400 damaged files give a diagnostic or a tokenizer that brings text back" {
            inFolder (fun folder ->
                let mutable loaded = 0
                let text = "the <s> 123 日本語 👍 abcabc"

                for input in 1..400 do
                    let random = Random input
                    let json = StringBuilder SampleTokenizer.json

                    let fragments = [|
                        "{"
                        "}"
                        "["
                        "]"
                        "\""
                        ","
                        ":"
                        "0"
                        "-1"
                        "1e99"
                        "null"
                        "true"
                        "\\ud800"
                        "\u0000"
                        "\\"
                        "a"
                        "\u0120"
                    |]

                    for _ in 0 .. random.Next 2 do
                        let at = random.Next json.Length

                        match random.Next 4 with
                        | 0 -> json.Insert(at, fragments[random.Next fragments.Length]) |> ignore
                        | 1 -> json.Remove(at, min (random.Next 12) (json.Length - at)) |> ignore
                        | 2 -> json.Length <- at + 1
                        | _ -> json[at] <- fragments[random.Next fragments.Length][0]

                    SampleTokenizer.writeTo folder (json.ToString()) SampleTokenizer.config

                    try
                        let tokenizer = HuggingFaceTokenizer.Load folder
                        Expect.equal (tokenizer.Decode(ReadOnlySpan(tokenizer.Encode(text, false)))) text "comes back"
                        loaded <- loaded + 1
                    with
                    | :? DiagnosticException as e ->
                        Expect.stringStarts e.Diagnostics[0].Code "DSG083" (string e.Diagnostics[0])
                    | e when not (e :? AssertException) -> failtest $"input %d{input}: %O{e}"

                Expect.isTrue (loaded > 5 && loaded < 300) $"%d{loaded} load")
        }
    ]

/// Text, ids and decoded text, as the reference implementation has them.
let private pairs folder = [
    use json = JsonDocument.Parse(File.ReadAllBytes(Path.Combine(folder, "oracle_pairs.json")))

    for pair in json.RootElement.EnumerateArray() do
        let text (name: string) = pair.GetProperty(name).GetString() |> nonNull
        text "text", [| for id in pair.GetProperty("ids").EnumerateArray() -> id.GetInt32() |], text "decoded"
]

let private real =
    testList "DeepSeek-V3's tokenizer" [
        Shared.testOn "all 276 texts encode and decode as in the reference implementation" "tokenizer" (fun folder ->
            let tokenizer = HuggingFaceTokenizer.Load folder
            let pairs = pairs folder
            Expect.hasLength pairs 276 "texts"

            for text, ids, decoded in pairs do
                Expect.sequenceEqual (tokenizer.Encode(text, false)) ids text
                Expect.equal (tokenizer.Decode(ReadOnlySpan ids)) decoded text
                Expect.equal (streamed tokenizer ids) decoded "streamed"
                Expect.sequenceEqual (tokenizer.Encode text) (Array.append [| 0 |] ids) "with bos"
                Expect.equal (tokenizer.Decode(ReadOnlySpan(tokenizer.EncodeText text))) decoded "as plain text"

            Expect.equal
                (tokenizer.Vocabulary, tokenizer.Separator, tokenizer.Bos.Value)
                (128815, 1, 0)
                "sizes and ends"

            Expect.sequenceEqual tokenizer.Ends [ 1 ] "ends")

        Shared.testOn "pieces merge alike by the package and by LongPieces" "tokenizer" (fun folder ->
            let tokenizer = HuggingFaceTokenizer.Load folder
            let json = TokenizerJson.Read(Path.Combine(folder, "tokenizer.json"))
            let long = LongPieces(json.Vocabulary, json.Merges)
            let random = Random 6
            let letters = "etaoin shrdlu日本語の人äéœ".Replace(" ", "")

            for _ in 1..300 do
                let piece = String(Array.init (1 + random.Next 500) (fun _ -> letters[random.Next 12]))
                let found = System.Collections.Generic.List<int>()
                long.Encode(ByteAlphabet.Spell(piece.AsSpan()), found)
                Expect.sequenceEqual found (tokenizer.EncodeText piece) piece)

        Shared.testOn "its chat template is known" "tokenizer" (fun folder ->
            let tokenizer = HuggingFaceTokenizer.Load folder
            let chat = tokenizer.RenderChat [| ChatMessage("user", "Hi") |]
            Expect.equal chat "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>" "rendered"
            Expect.sequenceEqual (tokenizer.Encode(chat, false)) [ 0; 128803; 23166; 128804 ] "tokens")
    ]

let private bytes =
    testList "bytes" [
        test "the byte-level tokenizer as files of Hugging Face encodes and decodes as it does itself" {
            inFolder (fun folder ->
                for struct (name, bytes) in ByteTokenizerFiles.All do
                    File.WriteAllBytes(Path.Combine(folder, name), bytes)

                let files = HuggingFaceTokenizer.Load folder
                Expect.equal files.Vocabulary 256 "ids"

                for text in
                    [
                        ""
                        "plans are data"
                        "  two spaces,\n\n a tab\t and 1234567"
                        "\u00e4\u4e2d\u6587\U0001F600"
                        "\u0001\u001f\u007f\u00ad"
                        "<s></s>"
                    ] do
                    let ids = (ByteTokenizer.Instance :> ITokenizer).EncodeText text
                    Expect.sequenceEqual (files.Encode(text, false)) ids text
                    Expect.sequenceEqual (files.Encode text) ids "nothing is added"
                    Expect.equal (files.Decode(ReadOnlySpan ids)) text text)
        }
    ]

let tests = testList "Tokenizers" [ small; damaged; real; bytes ]

/// A small tokenizer in the files of Hugging Face, and byte-pair encoding written down as its definition says.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Testing.SampleTokenizer

open System.Collections.Generic
open System.IO
open System.Text
open System.Text.Json

/// GPT-2's alphabet of bytes: printable ones stand for themselves, the others for U+0100 and on.
let alphabet =
    let printable b = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE
    let mutable next = 0x100

    [|
        for b in 0..255 do
            if printable b then
                char b
            else
                char next
                next <- next + 1
    |]

let spell (text: string) = Encoding.UTF8.GetBytes text |> Array.map (fun b -> alphabet[int b]) |> System.String

/// In the order of their ranks; each part is a byte or made before.
let merges =
    [
        "t", "h"
        "th", "e"
        " ", "the"
        "a", "b"
        "b", "c"
        "ab", "c"
        "a", "a"
        "aa", "aa"
        "abc", "abc"
        "1", "2"
        "12", "3"
        " ", " "
        "  ", "  "
        "\n", "\n"
        "c", "a"
        "e", "r"
    ]
    |> List.map (fun (left, right) -> spell left, spell right)

/// Text, special, normalized; ids from 0 on.
let added = [
    "<s>", true, false
    "</s>", true, false
    "<|User|>", false, true
    "<|User", false, true
    "s><", true, false
]

let vocabulary =
    let tokens = [
        for content, _, _ in added -> content
        yield! alphabet |> Array.map string
        for left, right in merges -> left + right
    ]

    tokens |> List.mapi (fun id token -> KeyValuePair(token, id)) |> Dictionary

let private patterns = [
    "\\p{N}{1,3}"
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
]

/// tokenizer.json.
let json =
    let split pattern =
        dict [
            "type", box "Split"
            "pattern", box (dict [ "Regex", pattern ])
            "behavior", box "Isolated"
            "invert", box false
        ]

    let byteLevel =
        dict [
            "type", box "ByteLevel"
            "add_prefix_space", box false
            "use_regex", box false
        ]

    JsonSerializer.Serialize(
        dict [
            "version", box "1.0"
            "added_tokens",
            box [
                for id, (content, special, normalized) in List.indexed added ->
                    dict [
                        "id", box id
                        "content", box content
                        "single_word", box false
                        "lstrip", box false
                        "rstrip", box false
                        "normalized", box normalized
                        "special", box special
                    ]
            ]
            "normalizer", box (dict [ "type", box "Sequence"; "normalizers", box [] ])
            "pre_tokenizer",
            box (
                dict [
                    "type", box "Sequence"
                    "pretokenizers", box ((patterns |> List.map (split >> box)) @ [ box byteLevel ])
                ]
            )
            "post_processor", box byteLevel
            "decoder", box byteLevel
            "model",
            box (
                dict [
                    "type", box "BPE"
                    "dropout", null
                    "byte_fallback", box false
                    "vocab", box vocabulary
                    "merges", box [ for left, right in merges -> left + " " + right ]
                ]
            )
        ],
        JsonSerializerOptions(Encoder = System.Text.Encodings.Web.JavaScriptEncoder.UnsafeRelaxedJsonEscaping)
    )

let config =
    """{"add_bos_token": true, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null}"""

/// The folder of a checkpoint with these files.
let writeTo (folder: string) (json: string) (config: string) =
    File.WriteAllText(Path.Combine(folder, "tokenizer.json"), json)
    File.WriteAllText(Path.Combine(folder, "tokenizer_config.json"), config)

/// By the definition: as long as some pair of neighbours is a merge, the first one of the lowest rank is joined.
let encodePiece (piece: string) =
    let rank = Dictionary(List.mapi (fun rank pair -> KeyValuePair(pair, rank)) merges)

    let rec go (symbols: string list) =
        let best =
            List.pairwise symbols
            |> List.indexed
            |> List.choose (fun (at, pair) ->
                match rank.TryGetValue pair with
                | true, rank -> Some(rank, at)
                | _ -> None)

        match best with
        | [] -> symbols
        | pairs ->
            let _, at = List.min pairs
            let before, behind = List.splitAt at symbols
            go (before @ (behind[0] + behind[1]) :: List.skip 2 behind)

    go [ for c in spell piece -> string c ] |> List.map (fun token -> vocabulary[token])

/// Amounts of memory as people write them: 40GiB, 512MB, 1000000.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.ByteSize

open System
open System.Globalization

let private units = [|
    "KiB", 1L <<< 10
    "MiB", 1L <<< 20
    "GiB", 1L <<< 30
    "TiB", 1L <<< 40
    "KB", 1_000L
    "MB", 1_000_000L
    "GB", 1_000_000_000L
    "TB", 1_000_000_000_000L
    "B", 1L
    "", 1L
|]

/// What may be given, in words.
let forms = "a number of bytes such as 40GiB, 1.5GiB, 512MB or 1000000"

/// Bytes, at least 1; ValueNone where the text is no amount.
let tryParse (text: string) : int64 voption =
    let unit' = units |> Array.find (fun (name, _) -> text.EndsWith(name, StringComparison.OrdinalIgnoreCase))

    let number = text.Substring(0, text.Length - (fst unit').Length).TrimEnd()

    match Decimal.TryParse(number, NumberStyles.AllowDecimalPoint, CultureInfo.InvariantCulture) with
    | true, n when n * decimal (snd unit') >= 1m && n <= decimal Int64.MaxValue / decimal (snd unit') ->
        ValueSome(int64 (n * decimal (snd unit')))
    | _notAnAmount -> ValueNone

/// 39.8 GiB, 512.0 MiB, 17 bytes.
let show (bytes: int64) : string =
    let scaled (power: int) (name: string) =
        (float bytes / float (1L <<< power)).ToString("F1", CultureInfo.InvariantCulture) + " " + name

    if bytes >= (1L <<< 30) then scaled 30 "GiB"
    elif bytes >= (1L <<< 20) then scaled 20 "MiB"
    elif bytes >= (1L <<< 10) then scaled 10 "KiB"
    else $"%i{bytes} bytes"

/// Megatron's pipeline layout strings: parse, check, print, DeepSeek-V3's table, and an automatic cut by cost.
namespace DeepSeekGraph.Compiler

open System
open DeepSeekGraph

/// A symbol of the layout grammar: E, t, m, L.
[<RequireQualifiedAccess>]
type LayoutUnit =
    | Embedding
    | Layer
    | Mtp
    | Loss

    /// Its letter.
    member this.Letter =
        match this with
        | Embedding -> 'E'
        | Layer -> 't'
        | Mtp -> 'm'
        | Loss -> 'L'

/// "E|(tt|)*2,(t|)*4,mL": `|` ends a stage, commas mean nothing, (X)*n and x*n repeat; groups do not nest.
[<RequireQualifiedAccess>]
module LayoutString =
    let private longest = 100_000

    let private wrong code message help = {
        Code = code
        At = "recipe layout"
        Message = message
        Help = help
    }

    let private grammar = "symbols are E t m L, '|' ends a stage, (X)*n and x*n repeat: Et|(tt|)*30mL"

    /// Letters and bars with all repetitions written out; `grouped`: inside a group, where no other may open.
    let rec private expand (grouped: bool) (text: string) : Result<string, string> =
        let out = Text.StringBuilder()

        let rec number i n =
            if i < text.Length && Char.IsAsciiDigit text[i] && n < longest then
                number (i + 1) (n * 10 + int text[i] - int '0')
            else
                i, n

        // appends `piece` as often as a following *n says; gives the place after it
        let repeat (piece: string) i =
            if i < text.Length && text[i] = '*' then
                match number (i + 1) 0 with
                | after, _ when after = i + 1 -> Error $"'*' at %i{i} is not followed by a number"
                | _, 0 -> Error $"'*0' at %i{i} repeats nothing"
                | after, n when int64 n * int64 piece.Length + int64 out.Length <= int64 longest ->
                    out.Insert(out.Length, piece, n) |> ignore
                    Ok after
                | _, n -> Error $"'*%i{n}' at %i{i} makes more than %i{longest} symbols"
            else
                out.Append piece |> ignore
                Ok i

        let rec loop i =
            if i >= text.Length then
                Ok(out.ToString())
            else
                match text[i] with
                | ','
                | ' ' -> loop (i + 1)
                | 'E'
                | 't'
                | 'm'
                | 'L'
                | '|' -> repeat (string text[i]) (i + 1) |> Result.bind loop
                | '(' when grouped -> Error "it holds another '('; groups do not nest"
                | '(' ->
                    match text.IndexOf(')', i) with
                    | -1 -> Error $"'(' at %i{i} is not closed"
                    | close ->
                        match expand true (text.Substring(i + 1, close - i - 1)) with
                        | Error what -> Error $"in the group at %i{i}: %s{what}"
                        | Ok "" -> Error $"the group at %i{i} is empty"
                        | Ok inner -> repeat inner (close + 1) |> Result.bind loop
                | c -> Error $"'%c{c}' at %i{i} is no symbol"

        if text.Length > longest then Error $"it has %i{text.Length} characters" else loop 0

    let private unitOf c =
        match c with
        | 'E' -> LayoutUnit.Embedding
        | 't' -> LayoutUnit.Layer
        | 'm' -> LayoutUnit.Mtp
        | _layer -> LayoutUnit.Loss

    /// Stages as written, not checked against a model.
    let parse (text: string) : Result<LayoutUnit list list, Diagnostic list> =
        match expand false text with
        | Error what ->
            Error [
                wrong Codes.LayoutSyntax $"layout '%s{text}' does not parse: %s{what}" grammar
            ]
        | Ok flat -> flat.Split '|' |> Array.map (Seq.map unitOf >> List.ofSeq) |> List.ofArray |> Ok

    /// Letters of one stage, such as "Ett".
    let letters (units: LayoutUnit list) = units |> List.map _.Letter |> Array.ofList |> String

    /// The stages in the shortest notation of one level: runs of equal stages and of equal symbols are folded.
    let print (stages: LayoutUnit list list) : string =
        let runs same items =
            List.foldBack
                (fun item runs ->
                    match runs with
                    | (first, n) :: rest when same first item -> (item, n + 1) :: rest
                    | runs -> (item, 1) :: runs)
                items
                []

        let fold (text: string) =
            runs (=) (List.ofSeq text)
            |> List.map (fun (c, n) -> if n > 3 then $"%c{c}*%i{n}" else String(c, n))
            |> String.concat ""

        let texts = stages |> List.map letters
        let count = List.length texts
        // the last stage has no bar after it
        let barred, last = List.splitAt (max 0 (count - 1)) texts

        let body =
            runs (=) barred
            |> List.map (fun (text, n) ->
                if text = "" then String('|', n)
                elif n > 1 then $"(%s{fold text}|)*%i{n}"
                else fold text + "|")
            |> String.concat ""

        body + (last |> List.map fold |> String.concat "")

    /// Spreads units evenly: `stages` parts whose lengths differ by at most one, longer ones first.
    let even (stages: int) (layers: int) (mtp: int) : LayoutUnit list list =
        List.init stages (fun i -> [
            if i = 0 then
                LayoutUnit.Embedding

            for _ in 1 .. layers / stages + (if i < layers % stages then 1 else 0) do
                LayoutUnit.Layer

            if i = stages - 1 then
                for _ in 1..mtp do
                    LayoutUnit.Mtp

                LayoutUnit.Loss
        ])

    /// What keeps stages from being a layout of a model with so many layers on pp ranks of vp chunks; empty when legal.
    let check (stages: LayoutUnit list list) (layers: int) (mtp: int) (pp: int) (vp: int) : Diagnostic list =
        let flat = List.concat stages
        let count u = flat |> List.filter ((=) u) |> List.length
        let legal () = $"for example '%s{print (even (pp * vp) layers mtp)}'"
        let report message = wrong Codes.LayoutUnits message (legal ())
        let holders u = stages |> List.indexed |> List.filter (snd >> List.contains u) |> List.map fst
        let lastOf u = flat |> List.tryFindIndexBack ((=) u) |> Option.defaultValue -1

        [
            if stages.Length <> pp * vp then
                let asked = if vp = 1 then $"pp is %i{pp}" else $"pp x vp is %i{pp} x %i{vp}"
                report $"the layout has %i{stages.Length} stages but %s{asked}"

            for u, name, n in
                [
                    LayoutUnit.Embedding, "embeddings (E)", 1
                    LayoutUnit.Layer, "layers (t)", layers
                    LayoutUnit.Mtp, "MTP layers (m)", mtp
                    LayoutUnit.Loss, "losses (L)", 1
                ] do
                if count u <> n then
                    report $"the layout has %i{count u} %s{name} but the model has %i{n}"

            if count LayoutUnit.Embedding = 1 && List.head flat <> LayoutUnit.Embedding then
                report "the embedding (E) is not the first unit"

            if List.tryHead stages = Some [] then
                report "the first stage is empty; it holds the embedding (E)"

            if count LayoutUnit.Loss = 1 && List.last flat <> LayoutUnit.Loss then
                report "the loss (L) is not the last unit"

            if List.tryLast stages = Some [] then
                report "the last stage is empty; it holds the loss (L)"

            if mtp > 0 && count LayoutUnit.Mtp = mtp then
                let first = List.findIndex ((=) LayoutUnit.Mtp) flat

                if first < lastOf LayoutUnit.Layer then
                    report "an MTP layer (m) comes before a layer (t); MTP follows every layer"

                match holders LayoutUnit.Mtp with
                | [ stage ] ->
                    if pp > 1 && stages.Length = pp * vp && stage % pp = 0 then
                        report $"MTP is in stage %i{stage}, on pipeline rank 0; it cannot be there"
                    elif stage / pp < vp - 1 then
                        report $"MTP is in chunk %i{stage / pp} of its rank; it belongs to the last, %i{vp - 1}"
                | many -> report $"MTP layers lie in stages %A{many}; they share one"
        ]

    /// DeepSeek-V3's own layouts by (pp, vp), with its MTP layer.
    let deepSeekV3 (pp: int) (vp: int) : string option =
        match pp, vp with
        | 1, 1 -> Some "Et*61mL"
        | 4, 1 -> Some "Et*16|(t*16|)*2t*13mL"
        | 8, 1
        | 4, 2 -> Some "Et*8|(t*8|)*6t*5mL"
        | 16, 1
        | 8, 2
        | 4, 4 -> Some "Et*4|(t*4|)*14tmL"
        | _other -> None

    /// Cuts units into `stages` non-empty parts in order so that the dearest is as cheap as can be; ties: cuts lie as early as they can.
    let cut (costs: int64 list) (stages: int) : int list =
        let costs = Array.ofList costs
        let n = costs.Length
        let sums = Array.scan (+) 0L costs
        // best[k][i]: dearest part when units i.. make k parts
        let best = Array.init (stages + 1) (fun _ -> Array.create (n + 1) Int64.MaxValue)
        let next = Array.init (stages + 1) (fun _ -> Array.create (n + 1) n)
        best[0][n] <- 0L

        for k in 1..stages do
            for i in n - k .. -1 .. 0 do
                for j in i + 1 .. n - k + 1 do
                    let rest = best[k - 1][j]
                    let worst = max (sums[j] - sums[i]) rest

                    if rest < Int64.MaxValue && worst < best[k][i] then
                        best[k][i] <- worst
                        next[k][i] <- j

        let rec lengths k i =
            if k = 0 then
                []
            else
                let j = next[k][i]
                j - i :: lengths (k - 1) j

        lengths stages 0

    /// The layout that balances costs best: E, each t, each m and L in order, pp x vp stages; MTP layers stay together, and with the loss
    /// where a stage of their own would be on rank 0 or in another chunk than the last.
    let auto
        (embedding: int64)
        (layers: int64 list)
        (mtp: int64 list)
        (loss: int64)
        (pp: int)
        (vp: int)
        : Result<LayoutUnit list list, Diagnostic list> =
        let predictors = List.replicate mtp.Length LayoutUnit.Mtp

        let tail = [
            if mtp.IsEmpty || pp <= 2 then
                predictors @ [ LayoutUnit.Loss ], List.sum mtp + loss
            else
                predictors, List.sum mtp
                [ LayoutUnit.Loss ], loss
        ]

        let units =
            ([ LayoutUnit.Embedding ], embedding)
            :: (layers |> List.map (fun cost -> [ LayoutUnit.Layer ], cost))
            @ tail

        let stages = int64 pp * int64 vp

        if pp < 1 || vp < 1 || int64 units.Length < stages then
            Error [
                wrong
                    Codes.LayoutUnits
                    $"%i{units.Length} units (E, t, m, L) do not fill %i{stages} stages"
                    (if vp = 1 then
                         $"choose pp from 1 to %i{units.Length}"
                     else
                         $"choose pp and vp whose product is from 1 to %i{units.Length}")
            ]
        else
            cut (List.map snd units) (int stages)
            |> List.mapFold (fun rest n -> List.splitAt n rest) (List.map fst units)
            |> fst
            |> List.map List.concat
            |> Ok

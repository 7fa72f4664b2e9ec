/// The axis language "b s k+, n k+ -> b s n": parse, print, infer shapes, read off which axes may be split.
namespace DeepSeekGraph

open System.Collections.Concurrent

/// What splitting a letter's axis means.
[<RequireQualifiedAccess>]
type Mark =
    /// Splits freely: operands and results that have the letter are split.
    | Plain
    /// `+`: results without the letter are a partial sum.
    | Sum
    /// `>`: results without the letter are a partial maximum.
    | Max
    /// `^`: stays whole.
    | Whole

type Letter = { Name: string; Mark: Mark }

/// Letters of each operand and each result; "..." stands for any leading dims.
type Signature = {
    Operands: Letter[][]
    Results: Letter[][]
}

/// One letter bound to dims: position in each operand and result, -1 where absent.
type Factor = {
    Letter: string
    Mark: Mark
    Extent: int
    Operands: int[]
    Results: int[]
}

/// What an op says of its axes for given operands: factors and the results' axes.
type Rule = {
    Factors: Factor[]
    ResultAxes: Axis[][]
}

[<RequireQualifiedAccess>]
module Axes =
    let private parseLetter (word: string) =
        let marked mark = {
            Name = word.TrimEnd('+', '>', '^')
            Mark = mark
        }

        match word[word.Length - 1] with
        | '+' -> marked Mark.Sum
        | '>' -> marked Mark.Max
        | '^' -> marked Mark.Whole
        | c when System.Char.IsAsciiLetterOrDigit c || c = '.' -> marked Mark.Plain
        | c -> invalidArg "word" $"'%c{c}' in '%s{word}' is no axis mark (+, > or ^)"

    let private parseTerm (text: string) =
        text.Split(' ', System.StringSplitOptions.RemoveEmptyEntries) |> Array.map parseLetter

    let private read (text: string) : Signature =
        match text.Split "->" with
        | [| operands; results |] -> {
            Operands = operands.Split ',' |> Array.map parseTerm
            Results = results.Split ',' |> Array.map parseTerm
          }
        | _ -> invalidArg "text" $"'%s{text}' is no axis signature: one '->' is needed"

    // ops share a few dozen signatures, and every pass asks for them again
    let private signatures = ConcurrentDictionary<string, Signature>()

    /// Reads "b s k+, n k+ -> b s n". Raises ArgumentException for text that is no signature.
    let parse (text: string) : Signature = signatures.GetOrAdd(text, read)

    let private markOf (signature: Signature) name =
        Array.append signature.Operands signature.Results
        |> Array.concat
        |> Array.tryPick (fun l -> if l.Name = name && l.Mark <> Mark.Plain then Some l.Mark else None)
        |> Option.defaultValue Mark.Plain

    /// Replaces "..." by as many letters as the operand's rank needs.
    let private expand width (letters: Letter[]) =
        letters
        |> Array.collect (fun l ->
            if l.Name = "..." then
                Array.init width (fun i -> { l with Name = $"..%i{i}" })
            else
                [| l |])

    /// Factors from letters bound to dims; `strict` asks for equal axis names where a letter occurs twice.
    let private factorsOf strict signature (operands: Letter[][]) (results: Letter[][]) (types: TensorType[]) =
        let letters = Array.append operands results |> Array.concat |> Array.map _.Name |> Array.distinct

        let positions (terms: Letter[][]) name =
            terms |> Array.map (Array.tryFindIndex (fun l -> l.Name = name) >> Option.defaultValue -1)

        let mutable error = None

        let factors =
            letters
            |> Array.map (fun name ->
                let at = positions operands name

                let axes =
                    Array.mapi (fun i d -> if d >= 0 then Some(i, types[i].Axes[d]) else None) at |> Array.choose id

                let _, (first: Axis) = axes[0]

                for i, axis in axes do
                    if axis.Extent <> first.Extent && error.IsNone then
                        error <-
                            Some
                                $"axis '%s{first.Name}' is %i{first.Extent} in input %i{fst axes[0]} but '%s{axis.Name}' is %i{axis.Extent} in input %i{i}"
                    elif strict && axis.Name <> first.Name && error.IsNone then
                        error <-
                            Some
                                $"axis '%s{first.Name}' of input %i{fst axes[0]} meets axis '%s{axis.Name}' of input %i{i}"

                let mark = if name.StartsWith ".." then markOf signature "..." else markOf signature name

                {
                    Letter = name
                    Mark = mark
                    Extent = first.Extent
                    Operands = at
                    Results = positions results name
                })

        match error with
        | Some text -> Error text
        | None -> Ok factors

    /// Binds a signature to operand types; the error names roles and both values.
    let bind strict (signature: Signature) (types: TensorType[]) : Result<Rule, string> =
        if signature.Operands.Length <> types.Length then
            Error $"takes %i{signature.Operands.Length} inputs, not %i{types.Length}"
        else
            let hasDots (letters: Letter[]) = letters |> Array.exists (fun l -> l.Name = "...")

            let widths =
                Array.zip signature.Operands types
                |> Array.choose (fun (letters, t) ->
                    if hasDots letters then Some(t.Rank - (letters.Length - 1)) else None)

            let width = if widths.Length = 0 then 0 else widths[0]
            let operands = signature.Operands |> Array.map (expand (max width 0))
            let results = signature.Results |> Array.map (expand (max width 0))

            let wrongRank =
                Array.zip operands types |> Array.tryFindIndex (fun (letters, t) -> letters.Length <> t.Rank)

            match wrongRank with
            | Some i ->
                Error
                    $"input %i{i} is %O{types[i]}, of rank %i{types[i].Rank}; the op wants rank %i{operands[i].Length}"
            | None ->
                factorsOf strict signature operands results types
                |> Result.map (fun factors ->
                    let axisOf name =
                        let factor = factors |> Array.find (fun f -> f.Letter = name)
                        let operand = factor.Operands |> Array.findIndex (fun d -> d >= 0)
                        types[operand].Axes[factor.Operands[operand]]

                    {
                        Factors = factors
                        ResultAxes = results |> Array.map (Array.map (fun l -> axisOf l.Name))
                    })

    /// Rule of one operand whose axes carry over one to one; `result` renames or resizes, `mark` says what a split means.
    let carry (t: TensorType) (mark: Axis -> Mark) (result: Axis -> Axis) : Rule = {
        Factors =
            t.Axes
            |> Array.mapi (fun i a -> {
                Letter = a.Name
                Mark = mark a
                Extent = a.Extent
                Operands = [| i |]
                Results = [| i |]
            })
        ResultAxes = [| Array.map result t.Axes |]
    }

    /// Rule of operands matched by axis name against the first; the result has the first's axes.
    let byName (types: TensorType[]) : Result<Rule, string> =
        let first = types[0]

        let clash =
            types
            |> Array.mapi (fun i t ->
                t.Axes
                |> Array.tryPick (fun a ->
                    match first.IndexOf a.Name with
                    | -1 -> Some $"input %i{i} has axis '%s{a.Name}', which input 0, %O{first}, has not"
                    | d when first.Axes[d].Extent <> a.Extent ->
                        Some
                            $"axis '%s{a.Name}' is %i{first.Axes[d].Extent} in input 0 but %i{a.Extent} in input %i{i}"
                    | _d -> None))
            |> Array.tryPick id

        match clash with
        | Some text -> Error text
        | None ->
            Ok {
                Factors =
                    first.Axes
                    |> Array.mapi (fun d a -> {
                        Letter = a.Name
                        Mark = Mark.Plain
                        Extent = a.Extent
                        Operands = types |> Array.map _.IndexOf(a.Name)
                        Results = [| d |]
                    })
                ResultAxes = [| first.Axes |]
            }

/// One line of a graph's text: its tokens, and reading them from left to right.
namespace DeepSeekGraph

open System
open System.Collections.Generic
open System.Globalization
open System.Text

[<RequireQualifiedAccess>]
type internal Token =
    | Value of int
    | Word of string
    | Quoted of string
    | Mark of char
    | End

[<RequireQualifiedAccess>]
module internal Tokens =
    let bad (message: string) = raise (BadText message)

    let private isWord (c: char) = Char.IsAsciiLetterOrDigit c || c = '_' || c = '.' || c = '+' || c = '-'

    /// A quoted text that starts at `start`; gives it and where it ends.
    let private readQuoted (line: string) (start: int) =
        let text = StringBuilder()
        let mutable i = start + 1

        while i < line.Length && line[i] <> '"' do
            if line[i] = '\\' && i + 1 < line.Length && line[i + 1] = 'u' then
                match i + 6 <= line.Length && Seq.forall Char.IsAsciiHexDigit (line.Substring(i + 2, 4)) with
                | true -> text.Append(char (Convert.ToInt32(line.Substring(i + 2, 4), 16))) |> ignore
                | false -> bad "\\u needs four hexadecimal digits"

                i <- i + 6
            elif line[i] = '\\' && i + 1 < line.Length then
                text.Append line[i + 1] |> ignore
                i <- i + 2
            else
                text.Append line[i] |> ignore
                i <- i + 1

        if i >= line.Length then
            bad "a quoted text has no end"

        text.ToString(), i + 1

    let read (line: string) : Token[] =
        let found = List<Token>()
        let mutable i = 0

        let wordFrom start =
            let mutable stop = start

            while stop < line.Length && isWord line[stop] do
                stop <- stop + 1

            line.Substring(start, stop - start), stop

        while i < line.Length do
            match line[i] with
            | ' '
            | '\t' -> i <- i + 1
            | '"' ->
                let text, stop = readQuoted line i
                found.Add(Token.Quoted text)
                i <- stop
            | '%' ->
                let digits, stop = wordFrom (i + 1)

                match Int32.TryParse(digits, NumberStyles.None, CultureInfo.InvariantCulture) with
                | true, v -> found.Add(Token.Value v)
                | false, _ -> bad $"'%%%s{digits}' is no value"

                i <- stop
            | '='
            | '('
            | ')'
            | '['
            | ']'
            | ','
            | ':'
            | '@' ->
                found.Add(Token.Mark line[i])
                i <- i + 1
            | c when isWord c ->
                let word, stop = wordFrom i
                found.Add(Token.Word word)
                i <- stop
            | c -> bad $"unexpected character U+%04X{int c}"

        found.ToArray()

/// Reads one line's tokens from left to right.
[<Sealed>]
type internal LineReader(tokens: Token[]) =
    let mutable at = 0
    member _.Peek = if at < tokens.Length then tokens[at] else Token.End

    member this.Next() =
        let token = this.Peek
        at <- at + 1
        token

    member this.Is(mark: char) = (this.Peek = Token.Mark mark)

    member this.Expect(mark: char) =
        if this.Next() <> Token.Mark mark then
            Tokens.bad $"'%c{mark}' is missing"

    member this.Word(what: string) =
        match this.Next() with
        | Token.Word w -> w
        | Token.Value _
        | Token.Quoted _
        | Token.Mark _
        | Token.End -> Tokens.bad $"%s{what} is missing"

    member this.Quoted(what: string) =
        match this.Next() with
        | Token.Quoted s -> s
        | Token.Value _
        | Token.Word _
        | Token.Mark _
        | Token.End -> Tokens.bad $"%s{what} is missing"

    member this.Value() =
        match this.Next() with
        | Token.Value v -> v
        | Token.Quoted _
        | Token.Word _
        | Token.Mark _
        | Token.End -> Tokens.bad "a value such as %3 is missing"

    /// One or more, with commas between.
    member this.Several(one: unit -> 'a) : 'a list =
        let items = List [ one () ]

        while this.Is ',' do
            this.Expect ','
            items.Add(one ())

        List.ofSeq items

    /// None or more, with commas between, up to a closing mark.
    member this.Enclosed(opening: char, closing: char, one: unit -> 'a) : 'a list =
        this.Expect opening
        let items = if this.Is closing then [] else this.Several one
        this.Expect closing
        items

/// The words and the line scanner of a plan's text form.
namespace DeepSeekGraph

open System
open System.Collections.Generic
open System.Globalization
open System.Text

/// What is wrong on a line; never leaves the parser.
[<Sealed>]
type internal Malformed(code: string, message: string, help: string) =
    inherit Exception(message)
    member _.Code = code
    member _.Help = help

/// Closed vocabularies of the text form.
module internal PlanWords =
    let malformed message help : exn = Malformed(Codes.PlanText, message, help)

    /// RmsNormGradX -> rms_norm_grad_x
    let snake (name: string) =
        let out = StringBuilder()

        for i in 0 .. name.Length - 1 do
            if i > 0 && Char.IsAsciiLetterUpper name[i] then
                out.Append '_' |> ignore

            out.Append(Char.ToLowerInvariant name[i]) |> ignore

        out.ToString()

    let private kernelNames = Enum.GetValues<KernelId>() |> Array.map (fun k -> KeyValuePair(k, snake (string k)))

    let private nameOfKernel = Dictionary<KernelId, string> kernelNames

    let kernels =
        Dictionary<string, KernelId>(
            kernelNames |> Seq.map (fun p -> KeyValuePair(p.Value, p.Key)),
            StringComparer.Ordinal
        )

    let kernelName (kernel: KernelId) =
        match nameOfKernel.TryGetValue kernel with
        | true, name -> name
        | false, _ -> invalidArg (nameof kernel) $"kernel %i{int kernel} is not in the list"

    let kinds = [|
        "parameter", SlotKind.Parameter
        "optimizer", SlotKind.Optimizer
        "gradient", SlotKind.Gradient
        "counter", SlotKind.Counter
        "scalar", SlotKind.Scalar
        "cache", SlotKind.Cache
        "input", SlotKind.Input
        "saved", SlotKind.Saved
        "temporary", SlotKind.Temporary
    |]

    let kindName (kind: SlotKind) = kinds |> Array.find (fun (_, k) -> k = kind) |> fst
    let phases = Phase.All |> Array.map (fun p -> p.Word, p)
    let dtypes = DType.All |> Array.map (fun d -> d.Name, d)

    let private distance (a: string) (b: string) =
        let mutable row = Array.init (b.Length + 1) id

        for i in 1 .. a.Length do
            let next = Array.create (b.Length + 1) i

            for j in 1 .. b.Length do
                let swap = row[j - 1] + (if a[i - 1] = b[j - 1] then 0 else 1)
                next[j] <- min swap (1 + min row[j] next[j - 1])

            row <- next

        row[b.Length]

    /// The three names most like `word`.
    let nearest (word: string) (names: string seq) =
        let word = if word.Length > 40 then word.Substring(0, 40) else word

        names |> Seq.sortBy (fun n -> distance word n, n) |> Seq.truncate 3 |> String.concat ", "

    /// The value called `word`, or what else it could be.
    let lookup (role: string) (table: (string * 'a)[]) (word: string) : 'a =
        match table |> Array.tryFind (fun (name, _) -> name = word) with
        | Some(_, value) -> value
        | None ->
            raise (malformed $"'%s{word}' is no %s{role}" ("choose one of " + String.Join(", ", Array.map fst table)))

    /// May a text stand without quotes?
    let private isBareChar (c: char) = Char.IsAsciiLetterOrDigit c || "_.:#%+/@-".Contains c

    let private isBare (text: string) = text.Length > 0 && text |> Seq.forall isBareChar && text <> "->" && text <> "<-"

    let private append (out: StringBuilder) (c: char) =
        match c with
        | '"' -> out.Append "\\\"" |> ignore
        | '\\' -> out.Append "\\\\" |> ignore
        | '\n' -> out.Append "\\n" |> ignore
        | c when c < ' ' || c > '~' -> out.Append("\\u").Append((int c).ToString "x4") |> ignore
        | c -> out.Append c |> ignore

    let writeQuoted (out: StringBuilder) (text: string) =
        out.Append '"' |> ignore
        String.iter (append out) text
        out.Append '"' |> ignore

    /// A name: as it is if that is unmistakable, else quoted.
    let write (out: StringBuilder) (text: string) =
        if isBare text then out.Append text |> ignore else writeQuoted out text

    /// A float that reads back to the same bits and never looks like an integer.
    let float (x: float) =
        let text = x.ToString("R", CultureInfo.InvariantCulture)
        if text |> Seq.forall (fun c -> Char.IsAsciiDigit c || c = '-') then text + ".0" else text

    /// Reads one line from left to right.
    [<Sealed>]
    type Scanner(line: string) =
        let mutable at = 0

        let blanks () =
            while at < line.Length && line[at] = ' ' do
                at <- at + 1

        let rest () =
            let text = line.Substring at
            if text.Length > 30 then text.Substring(0, 30) + "..." else text

        let fail wanted = raise (malformed $"%s{wanted} is expected before '%s{rest ()}'" "")

        let unescape () =
            let out = StringBuilder()
            at <- at + 1

            while at < line.Length && line[at] <> '"' do
                if line[at] <> '\\' then
                    out.Append line[at] |> ignore
                    at <- at + 1
                elif at + 1 >= line.Length then
                    at <- line.Length
                else
                    match line[at + 1] with
                    | '"'
                    | '\\' ->
                        out.Append line[at + 1] |> ignore
                        at <- at + 2
                    | 'n' ->
                        out.Append '\n' |> ignore
                        at <- at + 2
                    | 'u' when at + 6 <= line.Length ->
                        match
                            UInt16.TryParse(
                                line.AsSpan(at + 2, 4),
                                NumberStyles.AllowHexSpecifier,
                                CultureInfo.InvariantCulture
                            )
                        with
                        | true, code -> out.Append(char code) |> ignore
                        | false, _ -> fail "an escape \\uXXXX"

                        at <- at + 6
                    | _ -> fail "an escape (\\\" \\\\ \\n \\uXXXX)"

            if at >= line.Length then
                raise (malformed "a quoted text does not end on its line" "")

            at <- at + 1
            out.ToString()

        /// Is the line at its end?
        member _.AtEnd =
            blanks ()
            at >= line.Length

        /// The next character that is not blank, or '\000'.
        member _.Peek =
            blanks ()
            if at < line.Length then line[at] else '\000'

        /// Does the next character start a quoted text?
        member this.IsQuoted = this.Peek = '"'

        /// A name or quoted text; `role` says what it stands for.
        member this.Word(role: string) : string =
            match this.Peek with
            | '"' -> unescape ()
            | _bare ->
                let start = at

                while at < line.Length && isBareChar line[at] do
                    at <- at + 1

                if at = start then
                    fail role

                line.Substring(start, at - start)

        /// The literal text, if it comes next.
        member this.Try(literal: string) : bool =
            this.Peek |> ignore
            let found = String.CompareOrdinal(line, at, literal, 0, literal.Length) = 0

            if found then
                at <- at + literal.Length

            found

        member this.Expect(literal: string) : unit =
            if not (this.Try literal) then
                fail $"'%s{literal}'"

        member private this.Digits(role: string) : ReadOnlySpan<char> =
            this.Peek |> ignore
            let start = at

            if at < line.Length && line[at] = '-' then
                at <- at + 1

            while at < line.Length && Char.IsAsciiDigit line[at] do
                at <- at + 1

            if at = start then
                fail role

            line.AsSpan(start, at - start)

        member this.Long(role: string) : int64 =
            match Int64.TryParse(this.Digits role, NumberStyles.AllowLeadingSign, CultureInfo.InvariantCulture) with
            | true, n -> n
            | false, _ -> raise (malformed $"the number for %s{role} has more than 64 bits" "")

        member this.Int(role: string) : int =
            match this.Long role with
            | n when n >= int64 Int32.MinValue && n <= int64 Int32.MaxValue -> int n
            | n -> raise (malformed $"%i{n} for %s{role} has more than 32 bits" "")

        /// A number that may have a fraction; `isInt` tells that it has neither point nor exponent.
        member this.Number(role: string, isInt: byref<bool>) : string =
            let word = this.Word role
            isInt <- word |> Seq.forall (fun c -> Char.IsAsciiDigit c || c = '-')
            word

        member this.Float(role: string) : float =
            let word = this.Word role

            match Double.TryParse(word, NumberStyles.Float, CultureInfo.InvariantCulture) with
            | true, x -> x
            | false, _ -> raise (malformed $"'%s{word}' for %s{role} is no number" "")

        /// Ints until something else comes.
        member this.Ints(role: string) : int[] =
            let found = List<int>()

            while Char.IsAsciiDigit this.Peek || this.Peek = '-' && at + 1 < line.Length && line[at + 1] <> '>' do
                found.Add(this.Int role)

            found.ToArray()

        /// 64-bit integers until something else comes.
        member this.Longs(role: string) : int64[] =
            let found = List<int64>()

            while Char.IsAsciiDigit this.Peek || this.Peek = '-' do
                found.Add(this.Long role)

            found.ToArray()

        /// Slot ids, each with '%' in front, until something else comes.
        member this.Slots() : int[] =
            let found = List<int>()

            while this.Try "%" do
                found.Add(this.Int "a slot")

            found.ToArray()

        /// Nothing may follow.
        member this.Close() : unit =
            if not this.AtEnd then
                fail "the end of the line"

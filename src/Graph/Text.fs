/// The text form of a graph: one node a line, every attribute exact; what is printed parses back.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Text

open System
open System.Collections.Generic
open System.Globalization
open System.Text

let private header = "graph 1"

// printing

let private quoted (s: string) =
    let text = StringBuilder("\"")

    for c in s do
        match c with
        | '"'
        | '\\' -> text.Append('\\').Append(c)
        | c when c < ' ' || c > '~' -> text.Append($"\\u%04x{int c}")
        | c -> text.Append c
        |> ignore

    text.Append('"').ToString()

let private isBare (name: string) =
    name <> "rows"
    && name.Length > 0
    && not (Char.IsAsciiDigit name[0])
    && name |> Seq.forall (fun c -> Char.IsAsciiLetterOrDigit c || c = '_')

let private printAxis (a: Axis) =
    let name = if isBare a.Name then a.Name else quoted a.Name
    $"%s{name} %i{a.Extent}"

let private printType (t: TensorType) =
    let density = t.Density.ToString("R", CultureInfo.InvariantCulture)
    let rows = if t.Routed then [| $"rows %s{density}" |] else [||]
    let axes = t.Axes |> Array.map printAxis |> Array.append rows |> String.concat ", "
    $"%s{t.DType.Name}[%s{axes}]"

let rec private printAttr (attr: Attr) =
    match attr with
    | Attr.Word w -> w
    | Attr.Quoted s -> quoted s
    | Attr.Items list ->
        let items = list |> List.map printAttr |> String.concat ", "
        $"[%s{items}]"

let private printValues (values: int[]) = values |> Array.map (fun v -> $"%%%i{v}") |> String.concat ", "

let private printPass (pass: Pass) =
    match pass with
    | Pass.Forward -> "forward"
    | Pass.Backward -> "backward"
    | Pass.Recompute -> "recompute"

let private printNode (graph: Graph) (node: Node) =
    let attributes =
        match OpText.attributes node.Op with
        | [] -> ""
        | list ->
            let pairs = list |> List.map (fun (k, v) -> $"%s{k}=%s{printAttr v}") |> String.concat ", "

            $"(%s{pairs})"

    let operands = if node.Inputs.Length = 0 then "" else " " + printValues node.Inputs

    let types = node.Outputs |> Array.map (fun v -> printType graph.Types[v]) |> String.concat ", "

    let at = node.Origin

    $"%s{printValues node.Outputs} = %s{(Catalog.define node.Op).Name}%s{attributes}%s{operands} : %s{types} @%O{at.Unit} %s{printPass at.Pass} %s{quoted at.Path}"

/// One line for the version, one a node, one an output, one a cotangent's primal.
let print (graph: Graph) : string =
    let text = StringBuilder()
    let line (s: string) = text.Append(s).Append('\n') |> ignore
    line header

    for node in graph.Nodes do
        line (printNode graph node)

    for name, v in graph.Outputs do
        line $"output %s{quoted name} %%%i{v}"

    graph.Primals
    |> Array.iteri (fun v primal ->
        if primal >= 0 then
            line $"primal %%%i{v} %%%i{primal}")

    text.ToString()

// parsing

let private readInt what (word: string) =
    match Int32.TryParse(word, NumberStyles.None, CultureInfo.InvariantCulture) with
    | true, n -> n
    | false, _ -> Tokens.bad $"'%s{word}' is no %s{what}"

let private readAttr (r: LineReader) () : string * Attr =
    let scalar () =
        match r.Next() with
        | Token.Word w -> Attr.Word w
        | Token.Quoted s -> Attr.Quoted s
        | Token.Value _
        | Token.Mark _
        | Token.End -> Tokens.bad "an attribute has no value"

    let key = r.Word "an attribute's name"
    r.Expect '='

    key, (if r.Is '[' then Attr.Items(r.Enclosed('[', ']', scalar)) else scalar ())

/// An axis, or the density of rows.
let private readAxis (r: LineReader) () : Choice<Axis, float> =
    match r.Next() with
    | Token.Word "rows" ->
        let word = r.Word "the density of rows"

        match Double.TryParse(word, NumberStyles.Float, CultureInfo.InvariantCulture) with
        | true, density when density > 0.0 && density <= 1.0 -> Choice2Of2 density
        | _, _ -> Tokens.bad $"'%s{word}' is no density of rows"
    | Token.Word name
    | Token.Quoted name ->
        Choice1Of2 {
            Name = name
            Extent = readInt "extent" (r.Word $"the extent of axis '%s{name}'")
        }
    | Token.Value _
    | Token.Mark _
    | Token.End -> Tokens.bad "an axis is missing"

let private readType (r: LineReader) () : TensorType =
    let name = r.Word "an element type"
    let mutable dtype = DType.Float32

    if not (DType.TryParse(name, &dtype)) then
        Tokens.bad $"'%s{name}' is no element type"

    let items = r.Enclosed('[', ']', readAxis r)

    let density =
        items
        |> List.choose (fun item ->
            match item with
            | Choice2Of2 d -> Some d
            | Choice1Of2 _ -> None)

    {
        DType = dtype
        Axes = [|
            for item in items do
                match item with
                | Choice1Of2 a -> a
                | Choice2Of2 _ -> ()
        |]
        Routed = not density.IsEmpty
        Density = List.tryHead density |> Option.defaultValue 1.0
    }

let private readUnit (word: string) : ModelUnit =
    match word.Split '.' with
    | [| "shared" |] -> ModelUnit.Shared
    | [| "embed" |] -> ModelUnit.Embed
    | [| "head" |] -> ModelUnit.Head
    | [| "layer"; i |] -> ModelUnit.Layer(readInt "layer" i)
    | [| "mtp"; i |] -> ModelUnit.Mtp(readInt "mtp" i)
    | _other -> Tokens.bad $"'%s{word}' is no part of a model: shared, embed, layer.0, mtp.0 or head"

let private readPass (word: string) =
    match word with
    | "forward" -> Pass.Forward
    | "backward" -> Pass.Backward
    | "recompute" -> Pass.Recompute
    | other -> Tokens.bad $"'%s{other}' is no pass: forward, backward or recompute"

let private readNode (r: LineReader) : Node * TensorType list =
    let outputs = r.Several r.Value
    r.Expect '='
    let name = r.Word "an op"
    let attributes = if r.Is '(' then r.Enclosed('(', ')', readAttr r) else []
    let inputs = if r.Is ':' then [] else r.Several r.Value
    r.Expect ':'
    let types = r.Several(readType r)
    r.Expect '@'
    let part = readUnit (r.Word "a part of the model")
    let pass = readPass (r.Word "forward or backward")
    let path = r.Quoted "a module path"

    if types.Length <> outputs.Length then
        Tokens.bad $"%i{outputs.Length} results but %i{types.Length} types"

    {
        Op = OpText.read name (Attrs(name, attributes)) types.Head
        Inputs = Array.ofList inputs
        Outputs = Array.ofList outputs
        Origin = {
            Path = path
            Unit = part
            Pass = pass
        }
    },
    types

[<RequireQualifiedAccess>]
type private Line =
    | Node of Node * TensorType list
    | Output of string * int
    | Primal of int * int

let private readLine (line: string) : Line =
    let r = LineReader(Tokens.read line)

    let read =
        match r.Peek with
        | Token.Word "output" ->
            r.Next() |> ignore
            let name = r.Quoted "an output's name"
            Line.Output(name, r.Value())
        | Token.Word "primal" ->
            r.Next() |> ignore
            let v = r.Value()
            Line.Primal(v, r.Value())
        | Token.Word _
        | Token.Value _
        | Token.Quoted _
        | Token.Mark _
        | Token.End -> Line.Node(readNode r)

    if r.Peek <> Token.End then
        Tokens.bad "the line goes on after its end"

    read

let private wrong (number: int) (message: string) = {
    Code = Codes.GraphText
    At = $"line %i{number}"
    Message = message
    Help = ""
}

/// The graph of numbered lines that were read; raises BadText where an id makes no sense.
let private assemble (lines: (int * Line) list) (fail: int -> string -> unit) : Graph =
    let nodes = [
        for number, line in lines do
            match line with
            | Line.Node(n, t) -> number, n, t
            | Line.Output _
            | Line.Primal _ -> ()
    ]

    let count = nodes |> List.sumBy (fun (_, n, _) -> n.Outputs.Length)
    let types = Array.create count (TensorType.scalar DType.Float32)
    let made = Array.create count false
    let primals = Array.create count -1

    let known number v (what: string) =
        if v >= count || not made[v] then
            fail number $"%s{what} %%%i{v} is not made before"

        v < count && made[v]

    for number, node, ts in nodes do
        if node.Inputs |> Array.forall (fun v -> known number v "operand") then
            match OpDef.infer (Catalog.define node.Op) (node.Inputs |> Array.map (fun v -> types[v])) with
            | Error text -> fail number $"%s{(Catalog.define node.Op).Name}: %s{text}"
            | Ok(_, results) ->
                if results <> Array.ofList ts then
                    let found = results |> Array.map printType |> String.concat ", "
                    fail number $"%s{(Catalog.define node.Op).Name} makes %s{found}"

        for v, t in List.zip (List.ofArray node.Outputs) ts do
            if v >= count then
                fail number $"values are numbered from 0 without gaps; there are %i{count}, so %%%i{v} is none"
            elif made[v] then
                fail number $"%%%i{v} is made twice"
            else
                made[v] <- true
                types[v] <- t

    let outputs = [|
        for number, line in lines do
            match line with
            | Line.Output(name, v) when known number v "output" -> name, v
            | Line.Output _
            | Line.Primal _
            | Line.Node _ -> ()
    |]

    for number, line in lines do
        match line with
        | Line.Primal(v, primal) when known number v "cotangent" && known number primal "primal" -> primals[v] <- primal
        | Line.Primal _
        | Line.Output _
        | Line.Node _ -> ()

    let sound = nodes |> List.forall (fun (_, n, _) -> n.Outputs |> Array.forall (fun v -> v < count))

    let kept = if sound then [| for _, n, _ in nodes -> n |] else [||]
    Graph(kept, types, outputs, primals)

/// The graph that a text says, or every line that is wrong. Lines that start with # are left out.
let parse (text: string) : Result<Graph, Diagnostic list> =
    let errors = List<Diagnostic>()
    let fail number message = errors.Add(wrong number message)

    let lines = [
        for number, line in text.Split '\n' |> Seq.indexed do
            let line = line.Trim()

            if line <> "" && line[0] <> '#' then
                number + 1, line
    ]

    match lines with
    | (_, first) :: rest when first = header ->
        let read = [
            for number, line in rest do
                try
                    number, readLine line
                with BadText message ->
                    fail number message
        ]

        let graph = if errors.Count = 0 then assemble read fail else Graph([||], [||], [||], [||])

        let errors = List.ofSeq errors

        match (if errors.IsEmpty then Verify.check graph else errors) with
        | [] -> Ok graph
        | found -> Error found
    | (number, _) :: _ -> Error [ wrong number $"a graph starts with the line '%s{header}'" ]
    | [] -> Error [ wrong 1 $"a graph starts with the line '%s{header}'" ]

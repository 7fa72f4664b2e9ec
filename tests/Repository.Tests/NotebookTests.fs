/// The cells of notebooks/*.ipynb compile, run, and print what the notebook shows.
module DeepSeekGraph.Repository.Tests.NotebookTests

open System
open System.IO
open System.Text.Encodings.Web
open System.Text.Json
open System.Text.Json.Nodes
open Expecto
open Microsoft.CodeAnalysis.CSharp.Scripting
open Microsoft.CodeAnalysis.Scripting
open DeepSeekGraph.Repository.Tests

/// DSG_UPDATE_NOTEBOOKS=1 writes what the cells print into the notebooks.
let private update = Environment.GetEnvironmentVariable "DSG_UPDATE_NOTEBOOKS" = "1"

/// All that this program can load, the product included.
let private options =
    let assemblies =
        match AppContext.GetData "TRUSTED_PLATFORM_ASSEMBLIES" with
        | :? string as paths -> paths.Split Path.PathSeparator
        | _ -> [||]

    ScriptOptions.Default
        .WithReferences(assemblies)
        .WithImports("System", "System.Collections.Generic", "System.IO", "System.Linq", "System.Threading.Tasks")

/// The text of a notebook's value that is one string or an array of lines.
let private text (value: JsonNode | null) =
    match value with
    | :? JsonArray as lines -> String.Concat(Seq.map string lines)
    | null -> ""
    | value -> string value

let private at (name: string) (cell: JsonNode) = cell[name]

/// What the cell's stored outputs say, in order.
let private shown (cell: JsonNode) =
    match at "outputs" cell with
    | :? JsonArray as outputs ->
        outputs
        |> Seq.map (fun output ->
            match output with
            | null -> ""
            | output -> text (at "text" output))
        |> String.Concat
    | _ -> ""

/// Cells tagged `varies` print times or paths: they are run, not compared.
let private varies (cell: JsonNode) =
    match at "metadata" cell with
    | null -> false
    | metadata ->
        match at "tags" metadata with
        | :? JsonArray as tags -> Seq.exists (fun tag -> string tag = "varies") tags
        | _ -> false

/// Runs `code` after `state`; the new state, and what it printed followed by its value.
let private run (place: string) (state: ScriptState<obj> option) (code: string) = task {
    let console = Console.Out
    use printed = new StringWriter()
    Console.SetOut printed

    try
        let! next =
            match state with
            | None -> CSharpScript.RunAsync(code, options)
            | Some state -> state.ContinueWithAsync(code, options)

        match next.ReturnValue with
        | null -> ()
        | value -> printed.WriteLine value

        Console.SetOut console
        return next, string printed
    with error ->
        Console.SetOut console
        return failtest $"%s{place}: %s{error.Message}"
}

let private store (cell: JsonNode) (output: string) =
    let stream = JsonObject()
    stream["output_type"] <- JsonValue.Create "stream"
    stream["name"] <- JsonValue.Create "stdout"
    let lines = output.Split '\n'

    let pieces = [|
        for n, line in Array.indexed lines do
            if n < lines.Length - 1 then
                line + "\n"
            elif line <> "" then
                line
    |]

    stream["text"] <- JsonArray [| for piece in pieces -> JsonValue.Create piece :> JsonNode | null |]

    cell["outputs"] <- if output = "" then JsonArray() else JsonArray [| stream :> JsonNode | null |]

/// One blank a level and no escapes, as Jupyter writes notebooks.
let private jupyterForm =
    JsonSerializerOptions(WriteIndented = true, IndentSize = 1, Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping)

let private runNotebook (file: string) = task {
    let notebook =
        match JsonNode.Parse(Tree.read file) with
        | null -> failwith $"%s{file} is empty"
        | notebook -> notebook

    let cells =
        match at "cells" notebook with
        | :? JsonArray as cells -> cells
        | _ -> failwith $"%s{file} has no cells"

    let mutable state = None

    for number, cell in Seq.indexed cells do
        match cell with
        | null -> ()
        | cell when text (at "cell_type" cell) = "code" ->
            let place = $"%s{file}, cell %d{number + 1}"
            let! next, output = run place state (text (at "source" cell))
            state <- Some next

            if update then
                store cell output
            elif not (varies cell) then
                Expect.equal output (shown cell) $"%s{place}; DSG_UPDATE_NOTEBOOKS=1 rewrites it"
        | _ -> ()

    if update then
        File.WriteAllText(Tree.path file, notebook.ToJsonString jupyterForm + "\n")
}

let tests =
    let notebooks =
        Tree.filesBelow "notebooks"
        |> List.filter (fun file -> file.EndsWith(".ipynb", StringComparison.Ordinal))

    testSequenced (
        testList "Notebooks" [
            if notebooks.IsEmpty then
                testCase "notebooks/*.ipynb" <| fun () -> skiptest "there is no notebook"
            for file in notebooks do
                testTask file { do! runNotebook file }
        ]
    )

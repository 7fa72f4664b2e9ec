/// The files of the checkout that the tests look at.
module DeepSeekGraph.Repository.Tests.Tree

open System
open System.Diagnostics
open System.IO

/// The folder that holds DeepSeekGraph.sln, above the test program.
let root =
    let rec up (folder: DirectoryInfo | null) =
        match folder with
        | null -> failwith "the tests do not run inside a checkout"
        | folder when File.Exists(Path.Combine(folder.FullName, "DeepSeekGraph.sln")) -> folder.FullName
        | folder -> up folder.Parent

    up (DirectoryInfo AppContext.BaseDirectory)

let path (name: string) = Path.Combine(root, name)

let read (name: string) = File.ReadAllText(path name)

/// What building and running leave behind.
let private produced = set [ ".git"; "artifacts"; "bin"; "obj"; "paket-files"; "runs"; "TestResults" ]

/// Files below `folder` (relative to the root, in order of name), without what building leaves behind.
let filesBelow (folder: string) =
    let rec walk (folder: string) : string list = [
        for file in Directory.GetFiles folder do
            if not (produced.Contains(string (Path.GetFileName file))) then
                file
        for inner in Directory.GetDirectories folder do
            if not (produced.Contains(string (Path.GetFileName inner))) then
                yield! walk inner
    ]

    if Directory.Exists(path folder) then
        walk (path folder) |> List.map (fun file -> Path.GetRelativePath(root, file)) |> List.sort
    else
        []

/// F# and C# sources below `folder`.
let sourcesBelow folder =
    filesBelow folder
    |> List.filter (fun file -> List.contains (Path.GetExtension file) [ ".fs"; ".fsi"; ".cs" ])

/// `file:line: text` of the lines of `files` that `isWrong` picks.
let linesWhere (isWrong: string -> bool) files = [
    for file in files do
        for number, line in Seq.indexed (File.ReadLines(path file)) do
            if isWrong line then
                $"%s{file}:%d{number + 1}: %s{line.Trim()}"
]

/// What a script of the repository prints.
let outputOf (script: string) =
    let start = ProcessStartInfo(path script, RedirectStandardOutput = true, WorkingDirectory = root)

    match Process.Start start with
    | null -> failwith $"%s{script} does not start"
    | started ->
        use started = started
        started.StandardOutput.ReadToEnd()

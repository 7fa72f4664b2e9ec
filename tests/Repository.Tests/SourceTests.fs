/// Rules that no compiler checks: what sources and committed files must not say.
module DeepSeekGraph.Repository.Tests.SourceTests

open System
open System.IO
open System.Text.RegularExpressions
open System.Xml.Linq
open Expecto
open DeepSeekGraph.Repository.Tests

let private matches (pattern: string) =
    let regex = Regex(pattern, RegexOptions.Compiled)
    fun (line: string) -> regex.IsMatch line

let private isText (file: string) =
    not (List.contains (Path.GetExtension file) [ ".ttf"; ".png"; ".safetensors"; ".gz"; ".npz"; ".bin" ])

/// This file spells what it forbids; the licence and Paket's own file are not ours.
let private written =
    Tree.filesBelow "."
    |> List.filter (fun file ->
        isText file
        && not (
            List.contains file [
                "LICENSE"
                ".paket/Paket.Restore.targets"
                "tests/Repository.Tests/SourceTests.fs"
            ]
        ))

let private indent (line: string) = line.Length - line.TrimStart().Length

/// Wildcard arms of a match over Op or Step that compute something: a new case would pass unseen. Arms that
/// leave everything else alone (None, false, unit, the value itself) only pick cases out.
let private openMatches file =
    let lines = File.ReadAllLines(Tree.path file)
    let isArm = matches @"^\s*\| _\w* ->"
    let leavesAlone = matches @"^\s*\| _\w* -> (None|ValueNone|false|\(\)|\[\]|\w+)\)*$"

    /// The arms of the match that line `last` ends: those above it at its own indentation.
    let armsAbove last =
        seq { last - 1 .. -1 .. 0 }
        |> Seq.takeWhile (fun n -> lines[n].Trim() = "" || indent lines[n] >= indent lines[last])
        |> Seq.map (fun n -> lines[n])
        |> Seq.filter (fun line -> indent line = indent lines[last] && line.TrimStart().StartsWith '|')

    [
        for number, line in Array.indexed lines do
            if isArm line && not (leavesAlone line) then
                if armsAbove number |> Seq.exists (matches @"^\s*\| (Op|Step)\.") then
                    $"%s{file}:%d{number + 1}: %s{line.Trim()}"
    ]

/// Where sources (parameters, inputs, constants) are treated apart and every other op goes by its record.
let private sourcesApart = [
    "src/Compiler/Partition/ContextParallel.fs"
    "src/Compiler/Partition/Propagate.fs"
    "src/Compiler/Partition/Reshard.fs"
    "src/Compiler/Plan/Programs.fs"
]

/// Projects that `project` refers to, by name.
let private references (project: string) = [
    for reference in XDocument.Load(Tree.path project).Descendants(XName.Get "ProjectReference") do
        match reference.Attribute(XName.Get "Include") with
        | null -> ()
        | includes -> Path.GetFileNameWithoutExtension includes.Value
]

/// A guide value; longer files are named, not refused.
let private longFile = 400

let tests =
    testList "Sources" [
        testCase "differentiation is ours: LibTorch's is named nowhere"
        <| fun () ->
            Tree.sourcesBelow "src"
            |> Tree.linesWhere (matches @"\.backward\(|\brequires_grad\b|\bautograd\b")
            |> fun found -> Expect.equal found [] "src/Graph/Autodiff.fs differentiates"

        testCase "no wildcard over Op or Step computes"
        <| fun () ->
            [ "src/Plan"; "src/Graph"; "src/Compiler" ]
            |> List.collect Tree.sourcesBelow
            |> List.filter (fun file -> not (List.contains file sourcesApart))
            |> List.collect openMatches
            |> fun found -> Expect.equal found [] "a new case must be met by every pass"

        testCase "no package registry is named"
        <| fun () ->
            written
            |> Tree.linesWhere (matches @"(api|www)\.nuget\.org|registry\.npmjs|pypi\.org|pkgs\.dev\.azure")
            |> fun found -> Expect.equal found [] "sources come from NuGet's configuration"

            Expect.isFalse ((Tree.read "paket.lock").Contains "://") "run build/paket.sh install"

        testCase "no folder of a build machine is named"
        <| fun () ->
            written
            |> Tree.linesWhere (matches @"(^|[\s""'=(:])/(work|root|home/\w+|Users/\w+)/")
            |> fun found -> Expect.equal found [] "paths are relative to the repository"

        testCase "projects refer to what is below them only"
        <| fun () ->
            let allowed = [
                "src/Plan/Plan.fsproj", []
                "src/Graph/Graph.fsproj", [ "Plan" ]
                "src/Compiler/Compiler.fsproj", [ "Graph"; "Plan" ]
                "src/Runtime/Runtime.csproj", [ "Plan" ]
                "src/Model/Model.csproj", [ "Compiler"; "Graph"; "Plan"; "Runtime" ]
            ]

            for project, below in allowed do
                for reference in references project do
                    Expect.contains below reference project

        testCase "files of more than 400 lines are named"
        <| fun () ->
            for file in Tree.sourcesBelow "src" @ Tree.sourcesBelow "tests" do
                let lines = Seq.length (File.ReadLines(Tree.path file))

                if lines > longFile then
                    printfn "%s has %d lines" file lines
    ]

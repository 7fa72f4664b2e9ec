/// Documents that list what the tree holds are equal to the tree.
module DeepSeekGraph.Repository.Tests.DocumentTests

open System
open System.IO
open System.Reflection
open Expecto
open DeepSeekGraph.Repository.Tests

/// Name and value of all literals in DeepSeekGraph.Codes.
let private ledger =
    match typeof<DeepSeekGraph.Diagnostic>.Assembly.GetType "DeepSeekGraph.Codes" with
    | null -> []
    | ledger -> [
        for field in ledger.GetFields(BindingFlags.Public ||| BindingFlags.Static) do
            if field.IsLiteral then
                field.Name, string (field.GetRawConstantValue())
      ]

let private codes = List.map snd ledger

let private marker = "<!-- The list below is written by build/architecture.sh. -->\n"

let tests =
    testList "Documents" [
        testCase "ARCHITECTURE.md lists every source file with its first comment"
        <| fun () ->
            let text = Tree.read "ARCHITECTURE.md"

            let listed = text.Substring(text.IndexOf(marker, StringComparison.Ordinal) + marker.Length)

            let wanted = Tree.outputOf "build/architecture.sh"
            let lines (text: string) = List.ofArray (text.Split '\n')

            Expect.equal (List.except (lines wanted) (lines listed)) [] "only in the document: run ./build.sh fix"

            Expect.equal (List.except (lines listed) (lines wanted)) [] "only in the tree: run ./build.sh fix"
            Expect.isTrue (listed = wanted) "the order is that of the projects: run ./build.sh fix"

        testCase "every source file lies in the compile list of its project"
        <| fun () ->
            let listed = Tree.outputOf "build/architecture.sh"

            Tree.sourcesBelow "src"
            |> List.filter (fun file -> not (listed.Contains $"(%s{file})"))
            |> fun missing -> Expect.equal missing [] "files that no project compiles"

        testCase "every source file begins with one sentence"
        <| fun () ->
            Tree.sourcesBelow "src"
            |> List.filter (fun file ->
                match Seq.tryHead (File.ReadLines(Tree.path file)) with
                | Some line ->
                    not (line.StartsWith("//", StringComparison.Ordinal) && ".?".Contains line[line.Length - 1])
                | None -> true)
            |> fun silent -> Expect.equal silent [] "the first line is a comment, and a sentence"

        testCase "codes of diagnostics are never used twice"
        <| fun () ->
            Expect.isNonEmpty codes "the ledger is found"
            Expect.equal (List.distinct codes) codes "one name a code"

        testCase "every code of a diagnostic is used"
        <| fun () ->
            let sources = Tree.sourcesBelow "src" |> List.map Tree.read |> String.concat "\n"

            ledger
            |> List.map fst
            |> List.filter (fun name -> not (sources.Contains $"Codes.%s{name}"))
            |> fun unused -> Expect.equal unused [] "delete the code and its page"

        testCase "every code of a diagnostic has a page, and every page a code"
        <| fun () ->
            let pages =
                Tree.filesBelow "docs/errors"
                |> List.map (fun file -> string (Path.GetFileNameWithoutExtension file))
                |> List.filter (fun name -> name.StartsWith("DSG", StringComparison.Ordinal))

            Expect.equal pages (List.sort codes) "docs/errors/CODE.md"

        testCase "an error page says its code, an example, why and what to do"
        <| fun () ->
            for code in codes do
                let file = $"docs/errors/%s{code}.md"

                if File.Exists(Tree.path file) then
                    let page = Tree.read file
                    Expect.stringStarts page $"# %s{code}: " file

                    for heading in [ "## Example"; "## Why"; "## Fix" ] do
                        Expect.stringContains page heading file
    ]

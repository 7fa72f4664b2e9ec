/// Tables of the documentation that tests write and compare.
module DeepSeekGraph.Testing.Documents

open System
open System.IO
open Expecto

let private root =
    let rec up (folder: string) =
        if File.Exists(Path.Combine(folder, "DeepSeekGraph.sln")) then
            folder
        else
            match Path.GetDirectoryName folder with
            | null -> failtest "the tests do not lie in the repository"
            | parent -> up parent

    lazy up AppContext.BaseDirectory

/// First and one past the last character of a table between its marks.
let private between (text: string) (name: string) =
    let first, last = $"<!-- %s{name} -->\n", $"<!-- /%s{name} -->"
    let start = text.IndexOf(first, StringComparison.Ordinal)
    let until = text.IndexOf(last, StringComparison.Ordinal)

    if start < 0 || until < start then
        failtestf "there is no place for table %s" name

    start + first.Length, until

/// The page of docs has these tables, by name; DSG_UPDATE_DOCS=1 writes them.
let agrees (page: string) (tables: Lazy<(string * string) list>) =
    testCase $"docs/%s{page} has the tables that the plans come to (DSG_UPDATE_DOCS=1 writes them)"
    <| fun () ->
        let path = Path.Combine(root.Value, "docs", page)
        let mutable text = File.ReadAllText path
        let update = Environment.GetEnvironmentVariable "DSG_UPDATE_DOCS" = "1"

        for name, table in tables.Value do
            let from, until = between text name

            if update then
                text <- text.Substring(0, from) + table + "\n" + text.Substring until
            else
                Expect.equal (text.Substring(from, until - from)) (table + "\n") $"table %s{name}"

        if update then
            File.WriteAllText(path, text)

/// Data that is too large for the repository: it may lie in a folder `shared` beside it, else its tests are skipped.
module DeepSeekGraph.Runtime.Tests.Shared

open System
open System.IO
open Expecto

let private root =
    let rec up (folder: string) =
        if File.Exists(Path.Combine(folder, "DeepSeekGraph.sln")) then
            folder
        else
            up (Path.GetDirectoryName folder |> nonNull)

    up AppContext.BaseDirectory

/// A file or folder of the repository.
let inRepository (path: string) = Path.Combine(root, path)

/// A folder of shared data, if it is here.
let folder (name: string) =
    let path = Path.GetFullPath(Path.Combine(root, "..", "shared", name))
    if Directory.Exists path then Some path else None

/// A test on a folder of shared data, skipped by name without it.
let testOn (name: string) (data: string) (test: string -> unit) =
    match folder data with
    | Some path -> testCase name (fun () -> test path)
    | None -> ptestCase $"%s{name} (needs ../shared/%s{data})" ignore

/// A count for a long campaign from the environment, else the one for every day.
let count (variable: string) (everyDay: int) =
    match Int32.TryParse(Environment.GetEnvironmentVariable variable) with
    | true, count when count > 0 -> count
    | _ -> everyDay

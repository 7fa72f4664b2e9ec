/// Runs the built command as a child process, in an empty folder of its own.
module DeepSeekGraph.Cli.Tests.Dsg

open System
open System.Diagnostics
open System.IO
open System.Runtime.InteropServices

/// What a command left: exit code and both streams.
type Result = {
    Code: int
    Out: string
    Error: string
}

/// The repository's folder, above the test program's.
let root =
    let rec up (folder: DirectoryInfo) =
        if File.Exists(Path.Combine(folder.FullName, "DeepSeekGraph.sln")) then
            folder.FullName
        else
            up (nonNull folder.Parent)

    up (DirectoryInfo AppContext.BaseDirectory)

let program = Path.Combine(AppContext.BaseDirectory, "dsg.dll")

/// An empty folder; gone afterwards.
let inFolder (body: string -> 'a) : 'a =
    let folder = Directory.CreateTempSubdirectory "dsg-test-"

    try
        body folder.FullName
    finally
        folder.Delete true

let private startWith (folder: string) (variables: (string * string) list) (program: string) (arguments: string list) =
    let info =
        ProcessStartInfo(
            "dotnet",
            program :: arguments,
            WorkingDirectory = folder,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
            RedirectStandardInput = true
        )

    // test programs run under a terminal or not: the child sees none
    info.Environment["NO_COLOR"] <- "1"

    for name, value in variables do
        info.Environment[name] <- value

    nonNull (Process.Start info)

let start folder program arguments = startWith folder [] program arguments

/// The result of a started command; it is killed after three minutes.
let finish (child: Process) =
    use child = child
    let out = child.StandardOutput.ReadToEndAsync()
    let error = child.StandardError.ReadToEndAsync()

    if not (child.WaitForExit(TimeSpan.FromMinutes 3.0)) then
        child.Kill()
        failwith "dsg did not end within three minutes"

    {
        Code = child.ExitCode
        Out = out.Result
        Error = error.Result
    }

let run (folder: string) (arguments: string list) = start folder program arguments |> finish

/// The same with environment variables.
let runWith folder variables arguments = startWith folder variables program arguments |> finish

[<DllImport("libc", EntryPoint = "kill")>]
extern int private kill(int pid, int signal)

let interrupt (child: Process) = kill (child.Id, 2) |> ignore

/// A small text for `--data`.
let writeText (folder: string) =
    let path = Path.Combine(folder, "text.txt")

    let words = "plans are data; ranks run them, and every loss falls as it should, step by step".Split ' '

    let text = [| for i in 0..2000 -> words[(i * i + i / 7) % words.Length] |]
    File.WriteAllText(path, String.concat " " text)
    path

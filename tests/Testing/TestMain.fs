/// The entry point that all test programs share.
namespace DeepSeekGraph.Testing

open System
open System.IO
open System.Text
open Expecto
open Expecto.Impl

[<RequireQualifiedAccess>]
module TestMain =
    /// The closing line as raw bytes: Expecto's own writer would wrap it in terminal escapes.
    let private printClosingLine (summary: TestRunSummary) =
        let failed = summary.failed.Length + summary.errored.Length

        let line = $"\n%d{summary.passed.Length} passed, %d{failed} failed, %d{summary.ignored.Length} skipped\n"

        Console.Out.Flush()
        use output = Console.OpenStandardOutput()
        output.Write(Encoding.ASCII.GetBytes line)

    /// Compiled plans of the tests, and of the commands that they start, go to a folder that goes with them.
    let private withOwnCache (body: unit -> int) =
        let folder = Directory.CreateTempSubdirectory "dsg-code-"
        Environment.SetEnvironmentVariable("DSG_CACHE", folder.FullName)

        try
            body ()
        finally
            folder.Delete true

    let private runExpecto (argv: string[]) (tests: Test) =
        let mutable closing = None
        let printer = TestPrinters.defaultPrinter

        let printer = {
            printer with
                summary =
                    fun config summary -> async {
                        do! printer.summary config summary
                        closing <- Some summary
                    }
        }

        let arguments = [
            CLIArguments.Printer printer
            CLIArguments.No_Spinner
            CLIArguments.Colours 0
            CLIArguments.Fail_On_Focused_Tests
        ]

        let exitCode = withOwnCache (fun () -> runTestsWithCLIArgs arguments argv tests)
        Option.iter printClosingLine closing
        exitCode

    /// Runs `tests` and returns the exit code. As a program: Expecto's options, and a last line
    /// `N passed, N failed, N skipped`. Under `dotnet test`, which passes --server: its protocol.
    let run (argv: string[]) (tests: Test) =
        if Array.contains "--server" argv then
            TestingPlatform.run argv tests
        else
            runExpecto argv tests

/// What a run leaves behind: its folder and metrics.jsonl.
module DeepSeekGraph.Runtime.Tests.MetricsTests

open System
open System.Globalization
open System.IO
open System.Text.Json
open System.Threading.Tasks
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Runtime
open DeepSeekGraph.Runtime.Telemetry
open DeepSeekGraph.Runtime.Tests.DataTests
open DeepSeekGraph.Testing

let private step number loss (mtp: Nullable<float>) =
    StepMetrics(
        Step = number,
        Loss = loss,
        MtpLoss = mtp,
        Lr = 3e-4,
        GradNorm = 0.1 + 0.2,
        Tokens = 8192L,
        TokensPerS = 12345.678,
        Seconds = 0.6635
    )

let private write folder steps =
    let path = Path.Combine(folder, $"%O{Guid.NewGuid()}.jsonl")
    use writer = new MetricsWriter(path)
    List.iter writer.Write steps
    path

let private metrics =
    testList "Metrics" [
        Properties.property "every double comes back as it was"
        <| fun (loss: float) (mtp: Nullable<float>) ->
            inFolder (fun folder ->
                let steps = [ step 1L loss mtp; step 2L 0.1 (Nullable()) ]
                Expect.sequenceEqual (MetricsFile.Read(write folder steps)) steps "steps")

        test "a line is one flat JSON object with these names" {
            inFolder (fun folder ->
                let path = write folder [ step 1L 5.5 (Nullable 6.25); step 2L 5.25 (Nullable()) ]
                let lines = File.ReadAllLines path

                let names (line: string) = [
                    for p in JsonDocument.Parse(line).RootElement.EnumerateObject() -> p.Name
                ]

                let all = [
                    "step"
                    "loss"
                    "mtp_loss"
                    "lr"
                    "grad_norm"
                    "tokens"
                    "tokens_per_s"
                    "seconds"
                ]

                Expect.sequenceEqual (names lines[0]) all "with multi-token prediction"
                Expect.sequenceEqual (names lines[1]) (List.except [ "mtp_loss" ] all) "without"

                Expect.equal
                    lines[0]
                    ("""{"step":1,"loss":5.5,"mtp_loss":6.25,"lr":0.0003,"grad_norm":0.30000000000000004,"""
                     + "\"tokens\":8192,\"tokens_per_s\":12345.678,\"seconds\":0.6635}")
                    "the text")
        }
        test "lines are on disk at once, whatever the culture" {
            inFolder (fun folder ->
                let path = Path.Combine(folder, "metrics.jsonl")
                use writer = new MetricsWriter(path)

                for number in 1L .. 3L do
                    writer.Write(step number 2.5 (Nullable()))
                    Expect.hasLength (MetricsFile.Read path) (int number) "while it is open")
        }
        test "a metrics file is never overwritten, nor made where it cannot be" {
            inFolder (fun folder ->
                let path = write folder []
                let d = diagnosticOf (fun () -> (new MetricsWriter(path)).Dispose())
                Expect.equal d.Code Codes.OutputTaken "exists"
                let missing = Path.Combine(folder, "no", "metrics.jsonl")
                let d = diagnosticOf (fun () -> (new MetricsWriter(missing)).Dispose())
                Expect.equal d.Code Codes.OutputUnwritable "no such folder")
        }
        test "a damaged line is told with its number" {
            inFolder (fun folder ->
                let path = write folder [ step 1L 1.0 (Nullable()) ]

                for line in [ "{\"step\":2"; "null"; "{\"step\":2}"; "" ] do
                    File.WriteAllText(path, File.ReadAllLines(path)[0] + "\n" + line + "\n")
                    let d = diagnosticOf (fun () -> MetricsFile.Read path |> ignore)
                    Expect.equal d.Code Codes.DataMalformed "code"
                    Expect.stringContains d.At ".jsonl:2" "line"

                let d = diagnosticOf (fun () -> MetricsFile.Read(Path.Combine(folder, "no")) |> ignore)

                Expect.equal d.Code Codes.DataUnavailable "missing")
        }
    ]

let private folders =
    testList "RunFolder" [
        test "without --out the folders are numbered" {
            inFolder (fun folder ->
                let runs = Path.Combine(folder, "runs")

                let make () = Path.GetFileName(RunFolder.Create(null, runs))

                Expect.equal (make ()) "0001" "first"
                Expect.equal (make ()) "0002" "second"
                Directory.CreateDirectory(Path.Combine(runs, "0041")) |> ignore
                Directory.CreateDirectory(Path.Combine(runs, "notes")) |> ignore
                Expect.equal (make ()) "0042" "behind the highest")
        }
        test "runs that start together get folders of their own" {
            inFolder (fun folder ->
                let made = Array.zeroCreate<string> 64

                Parallel.For(0, made.Length, fun i -> made[i] <- RunFolder.Create(null, folder)) |> ignore

                Expect.hasLength (Array.distinct made) made.Length "all different"

                let chosen = Path.Combine(folder, "chosen")
                let mutable won = 0

                Parallel.For(
                    0,
                    16,
                    fun _ ->
                        try
                            RunFolder.Create chosen |> ignore
                            Threading.Interlocked.Increment &won |> ignore
                        with :? DiagnosticException ->
                            ()
                )
                |> ignore

                Expect.equal won 1 "one gets the chosen folder")
        }
        test "--out takes a new or an empty folder, and nothing else" {
            inFolder (fun folder ->
                let inside name = Path.Combine(folder, name)
                Expect.equal (RunFolder.Create(inside "a/b")) (inside "a/b") "new, with the folders above"
                Directory.CreateDirectory(inside "empty") |> ignore
                Expect.equal (RunFolder.Create(inside "empty")) (inside "empty") "empty"
                File.WriteAllText(inside "file", "")

                for taken in [ "a/b"; "a"; "file" ] do
                    let d = diagnosticOf (fun () -> RunFolder.Create(inside taken) |> ignore)
                    Expect.equal d.Code Codes.OutputTaken taken
                    Expect.equal d.At "--out" "names the option"

                for bad in [ "file/below"; "a\000b" ] do
                    let d = diagnosticOf (fun () -> RunFolder.Create(inside bad) |> ignore)
                    Expect.equal d.Code Codes.OutputUnwritable bad)
        }
    ]

let tests = testList "Telemetry" [ metrics; folders ]

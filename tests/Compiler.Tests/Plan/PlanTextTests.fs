/// The text form of plans: it reads back, refuses what it does not know, and survives damage.
module DeepSeekGraph.Compiler.Tests.PlanTextTests

open System
open System.Diagnostics
open System.IO
open System.Text
open Expecto
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Testing

let private property name law = Properties.propertyOver [ typeof<Plans.Arbitraries> ] name law

let private sample = {
    (Gen.sampleWithSeed (FsCheck.Rnd 7UL) 50 1 Plans.plan)[0] with
        Stages = [|
            {
                Stage = 0
                Units = "EtL"
                Slots = [||]
                Programs = [|
                    {
                        Phase = Phase.F 0
                        Chunk = 1
                        Steps = [|
                            Step.Launch(
                                KernelId.RmsNorm,
                                [| Attribute.Float 1e-6 |],
                                [| 3; 7 |],
                                [| 12 |],
                                "model.norm"
                            )
                            Step.Start(4, Collective.AllGather 1, 2, [| 5 |], [| 6 |], "path")
                            Step.Wait 4
                            Step.Free 5
                        |]
                    }
                |]
                Timetable = [|
                    {
                        Phase = Phase.Prologue
                        Chunk = 0
                        Microbatch = 0
                    }
                    {
                        Phase = Phase.F 0
                        Chunk = 0
                        Microbatch = 3
                    }
                    {
                        Phase = Phase.W 0
                        Chunk = 1
                        Microbatch = 0
                    }
                |]
            }
        |]
}

let private refused (text: string) =
    match PlanText.parse text with
    | Ok _ -> failtestf "this should be refused:\n%s" text
    | Error wrong -> wrong.Head

/// As many steps as DeepSeek-V3 on 16 stages has.
let private large =
    let stage s = {
        Stage = s
        Units = "tttt"
        Slots = [|
            for i in 0..799 ->
                {
                    Id = i
                    Name = $"%%%i{i}"
                    Kind = SlotKind.Temporary
                    DType = DType.BFloat16
                    Axes = [| "batch"; "seq"; "hidden" |]
                    Extents = [| 1; 4096; 7168 |]
                    Routed = false
                    Density = 1.0
                    Padding = 1
                    Layout = [| AxisState.Replicated; AxisState.Split 0; AxisState.PartialSum |]
                }
        |]
        Programs = [|
            for phase in [ Phase.F 0; Phase.I 0; Phase.W 0; Phase.S ] ->
                {
                    Phase = phase
                    Chunk = 0
                    Steps = [|
                        for i in 0..1049 ->
                            Step.Launch(
                                KernelId.Contract,
                                [| Attribute.Text "b s k+, n k+ -> b s n" |],
                                [| i % 800; (i + 1) % 800 |],
                                [| (i + 2) % 800 |],
                                $"model.layers.%i{i / 40}.self_attn"
                            )
                    |]
                }
        |]
        Timetable = [|
            for i in 0..63 ->
                {
                    Phase = Phase.F 0
                    Chunk = 0
                    Microbatch = i
                }
        |]
    }

    {
        sample with
            Stages = Array.init 16 stage
    }

let tests =
    testList "Plan.PlanText" [
        property "parsing a printed plan gives the plan" (fun (plan: PlanSet) ->
            match PlanText.parse (PlanText.print plan) with
            | Ok again -> again = plan
            | Error wrong -> failtestf "%A" wrong)

        property
            "damaged text never crashes the reader, and every diagnostic names a line"
            (fun (plan: PlanSet, at: int, bytes: byte list) ->
                let text = Encoding.Latin1.GetBytes(PlanText.print plan)
                let at = abs (at % text.Length)

                bytes
                |> List.iteri (fun i b ->
                    if at + i < text.Length then
                        text[at + i] <- b)

                match PlanText.parse (Encoding.Latin1.GetString text) with
                | Ok _ -> true
                | Error wrong ->
                    wrong
                    |> List.forall (fun d -> d.At.Contains "line" && d.Message <> "" && d.Code.StartsWith "DSG060"))

        property "text cut off anywhere never crashes the reader" (fun (plan: PlanSet, at: int) ->
            let text = PlanText.print plan

            match PlanText.parse (text.Substring(0, abs (at % text.Length))) with
            | Ok _
            | Error(_ :: _) -> true
            | Error [] -> false)

        testCase "steps are one readable line each"
        <| fun () ->
            let text = PlanText.print sample

            for line in
                [
                    "  %12 = rms_norm 1E-06 %3 %7 ; model.norm"
                    "  t4 <- all_gather(1) g2 %5 -> %6 ; path"
                    "  wait t4"
                    "  free %5"
                    "program F@1"
                    "timetable prologue F3 W0@1"
                ] do
                Expect.stringContains text (line + "\n") ""

        testCase "an unknown version is refused with both versions"
        <| fun () ->
            let wrong = refused ((PlanText.print sample).Replace($"dsg-plan %i{PlanSchema.Version}", "dsg-plan 999"))
            Expect.equal wrong.Code Codes.PlanVersion ""
            Expect.stringContains wrong.Message "version 999" ""
            Expect.stringContains wrong.Message $"version %i{PlanSchema.Version}" ""

        testCase "an unknown kernel is refused with the nearest names and the line"
        <| fun () ->
            let wrong = refused ((PlanText.print sample).Replace("rms_norm ", "rms_nrom "))
            Expect.stringContains wrong.Message "rms_nrom" ""
            Expect.stringContains wrong.Help "rms_norm" ""
            Expect.stringContains wrong.At "line" ""

        testCase "text that is no plan is refused"
        <| fun () ->
            for text in
                [
                    ""
                    "\n"
                    "hello"
                    "dsg-plan"
                    "dsg-plan 99999999999999999999"
                    $"dsg-plan %i{PlanSchema.Version}\nfree %%1"
                    $"dsg-plan %i{PlanSchema.Version}\nslot %%1"
                ] do
                Expect.stringStarts (refused text).Code "DSG060" text

            Expect.stringContains
                (refused ($"dsg-plan %i{PlanSchema.Version}\nrecipe \"" + String('x', 2_000_000))).Message
                "characters"
                ""

        testCase "comments and blank lines mean nothing"
        <| fun () ->
            let text = (PlanText.print sample).Replace("\nlayout", "\n# a remark\n\nlayout")
            Expect.equal (PlanText.parse text) (Ok sample) ""

        testCase "a file keeps plan and hash, and a changed file is refused"
        <| fun () ->
            let path = Path.Combine(Path.GetTempPath(), $"%s{Path.GetRandomFileName()}.plan")

            try
                let hash = PlanFile.Write(path, sample)
                Expect.equal hash (PlanFile.Hash sample) ""
                Expect.equal (PlanFile.Read path) sample ""
                let near = Directory.GetFiles(Path.GetTempPath()) |> Array.filter (fun f -> f.StartsWith path)
                Expect.equal near [| path |] "no temporary file stays"
                File.WriteAllText(path, (File.ReadAllText path).Replace("EtL", "EtmL"))
                let e = Expect.throwsC (fun () -> PlanFile.Read path |> ignore) id

                match e with
                | :? DiagnosticException as d -> Expect.equal d.Diagnostics[0].Code Codes.PlanFile ""
                | other -> failtestf "%O" other
            finally
                File.Delete path

        testCase "files that are missing, folders or binary are refused"
        <| fun () ->
            let binary = Path.GetTempFileName()
            File.WriteAllBytes(binary, [| 0xffuy; 0xfeuy; 0uy; 0x80uy |])

            try
                for path in [ "/nowhere/plan"; Path.GetTempPath(); binary ] do
                    Expect.throwsT<DiagnosticException> (fun () -> PlanFile.Read path |> ignore) path
            finally
                File.Delete binary

            Expect.throwsT<DiagnosticException> (fun () -> PlanFile.Write("/nowhere/plan", sample) |> ignore) ""

        testCase "fifty thousand steps print and parse within seconds"
        <| fun () ->
            let clock = Stopwatch.StartNew()
            let text = PlanText.print large
            Expect.equal (PlanText.parse text |> Result.map _.Stages.Count) (Ok 16) ""
            Expect.isLessThan clock.ElapsedMilliseconds 20000L ""
    ]

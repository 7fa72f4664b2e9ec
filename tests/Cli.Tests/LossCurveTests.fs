/// The picture of a run: its text is drawn, with the font that the program carries.
module DeepSeekGraph.Cli.Tests.LossCurveTests

open System
open System.IO
open Expecto
open ScottPlot
open SkiaSharp
open DeepSeekGraph
open DeepSeekGraph.Cli
open DeepSeekGraph.Runtime.Telemetry

let private step number loss withMtp =
    StepMetrics(
        Step = number,
        Loss = loss,
        MtpLoss = (if withMtp then Nullable(loss + 0.4) else Nullable()),
        Lr = 1e-3,
        GradNorm = 1.0,
        Tokens = 1024L,
        TokensPerS = 1e4,
        Seconds = 0.1
    )

let private steps count withMtp = [|
    for i in 1L .. count -> step i (2.0 + 3.5 / sqrt (float i) + 0.1 * sin (float (i * i))) withMtp
|]

/// Pixels that are not white, in the columns and rows given.
let private ink (png: byte[]) (columns: int seq) (rows: int seq) =
    use picture = SKBitmap.Decode png
    Expect.equal (picture.Width, picture.Height) (1200, 700) "size"

    let isInk x y =
        let pixel = picture.GetPixel(x, y)
        int pixel.Red + int pixel.Green + int pixel.Blue < 600

    Seq.length (
        seq {
            for x in columns do
                for y in rows do
                    if isInk x y then
                        (x, y)
        }
    )

/// The strips that hold nothing but text: outside of the axes and their tick marks.
let private strips = [
    "title", [ 0..1199 ], [ 0..50 ]
    "x ticks", [ 0..1199 ], [ 630..645 ]
    "x label", [ 0..1199 ], [ 648..699 ]
    "y label", [ 0..59 ], [ 0..645 ]
    "y ticks", [ 62..89 ], [ 0..645 ]
]

let tests =
    testList "LossCurve" [
        test "title, axis labels and ticks are really drawn" {
            let plot = LossCurve.Draw(steps 300L true, "Training loss")
            let drawn = LossCurve.Png plot

            for axis in [ plot.Axes.Left :> IAxis; plot.Axes.Bottom ] do
                axis.Label.ForeColor <- Colors.Transparent
                axis.TickLabelStyle.ForeColor <- Colors.Transparent

            plot.Axes.Title.Label.ForeColor <- Colors.Transparent
            let mute = LossCurve.Png plot

            for name, columns, rows in strips do
                Expect.isGreaterThan (ink drawn columns rows) 100 $"%s{name} is there"
                Expect.equal (ink mute columns rows) 0 $"%s{name} was text"
        }
        test "the typeface is the one that the program carries" {
            LossCurve.Draw(steps 2L false, "Training loss") |> ignore

            use carried =
                use file = EmbeddedFont.Open()
                SKTypeface.FromStream file

            let table (face: SKTypeface) = face.GetTableData 0x68656164u // 'head': checksum and dates
            let used = Fonts.GetTypeface(EmbeddedFont.Family, false, false)
            Expect.equal used.FamilyName "DejaVu Sans" "family"
            Expect.sequenceEqual (table used) (table carried) "the same file"
        }
        test "short runs, steps without a number and no steps at all are drawn" {
            let broken = [| step 0L nan false; yield! steps 3L true |]

            for metrics in [ steps 1L false; broken; [||] ] do
                let png = LossCurve.Draw(metrics, "Training loss") |> LossCurve.Png
                Expect.isGreaterThan (ink png [ 0..1199 ] [ 0..30 ]) 100 "title"
        }
        test "a picture that cannot be written is told" {
            let path = Path.Combine(Path.GetTempPath(), $"%O{Guid.NewGuid()}", "loss.png")

            try
                LossCurve.Write(path, steps 2L false)
                failtest "it was written"
            with :? DiagnosticException as e ->
                Expect.equal e.Diagnostics[0].Code Codes.OutputUnwritable "code"
        }
    ]

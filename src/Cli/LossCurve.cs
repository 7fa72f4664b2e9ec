// The picture of a run: loss over steps as a PNG.

using System.Globalization;
using DeepSeekGraph.Runtime.Telemetry;
using ScottPlot;
using ScottPlot.TickGenerators;

namespace DeepSeekGraph.Cli;

/// Main cross-entropy and, where there is one, that of multi-token prediction; long runs get a running mean.
public static class LossCurve
{
    private const int Width = 1200;
    private const int Height = 700;

    /// Up to so many steps each is marked; beyond, lines only.
    private const int MostMarked = 40;

    /// From so many steps on, a running mean over a fiftieth of the run is drawn on top.
    private const int LeastToAverage = 100;
    private const int MeanSpans = 50;

    private static readonly Color s_ink = Color.FromHex("#24292f");
    private static readonly Color s_loss = Color.FromHex("#1f6feb");
    private static readonly Color s_mtp = Color.FromHex("#d9730d");

    /// Draws `steps` to the PNG file `path`, which it replaces; DSG0816 when it cannot be written.
    public static void Write(string path, IReadOnlyList<StepMetrics> steps, string title = "Training loss")
    {
        try
        {
            using var plot = Draw(steps, title);
            File.WriteAllBytes(path, Png(plot));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw DiagnosticException.Of(
                Codes.OutputUnwritable,
                path,
                $"the loss curve cannot be written: {e.Message}",
                "free some space, or write to another folder");
        }
    }

    internal static byte[] Png(Plot plot) => plot.GetImageBytes(Width, Height, ImageFormat.Png);

    internal static Plot Draw(IReadOnlyList<StepMetrics> steps, string title)
    {
        var plot = new Plot();
        AddCurve(plot, "loss", s_loss, [.. steps.Select(step => (step.Step, step.Loss))]);
        AddCurve(
            plot,
            "MTP loss",
            s_mtp,
            [.. steps.Where(step => step.MtpLoss is not null).Select(step => (step.Step, step.MtpLoss!.Value))]);

        plot.Title(title, 24);
        plot.XLabel("step", 18);
        plot.YLabel("cross-entropy (nats per token)", 18);
        foreach (var label in new[] { plot.Axes.Title.Label, plot.Axes.Bottom.Label, plot.Axes.Left.Label })
        {
            label.Bold = false;
        }

        // Frame to the left and below only, a faint grid, few ticks, steps as whole numbers.
        plot.Axes.Color(s_ink);
        plot.Axes.Right.FrameLineStyle.Width = 0;
        plot.Axes.Top.FrameLineStyle.Width = 0;
        plot.Grid.MajorLineColor = s_ink.WithAlpha(0.12);
        SetTicks(plot.Axes.Bottom, new NumericAutomatic { IntegerTicksOnly = true, TickDensity = 0.8 });
        SetTicks(plot.Axes.Left, new NumericAutomatic { TickDensity = 0.5 });
        plot.Axes.Margins(0.02, 0.08);
        plot.Layout.Fixed(new PixelPadding(left: 96, right: 40, bottom: 76, top: 56));

        plot.ShowLegend(Alignment.UpperRight);
        plot.Legend.FontSize = 16;
        plot.Legend.OutlineColor = s_ink.WithAlpha(0.25);
        plot.Legend.ShadowColor = Colors.Transparent;
        EmbeddedFont.Use(plot);
        return plot;
    }

    private static void SetTicks(IAxis axis, ITickGenerator ticks)
    {
        axis.TickGenerator = ticks;
        axis.TickLabelStyle.FontSize = 15;
        axis.MinorTickStyle.Length = 0;
    }

    /// Values that are no number are left out: the line bridges them.
    private static void AddCurve(Plot plot, string name, Color color, (long Step, double Value)[] points)
    {
        points = [.. points.Where(point => double.IsFinite(point.Value))];
        if (points.Length == 0)
        {
            return;
        }

        double[] steps = [.. points.Select(point => (double)point.Step)];
        double[] values = [.. points.Select(point => point.Value)];
        var last = string.Create(CultureInfo.InvariantCulture, $"{name}, last {values[^1]:F3}");
        var line = plot.Add.Scatter(steps, values, color);
        line.MarkerSize = points.Length <= MostMarked ? 7 : 0;
        line.LineWidth = 2;
        line.LegendText = last;
        if (points.Length < LeastToAverage)
        {
            return;
        }

        var span = (points.Length / MeanSpans) | 1;
        line.LineWidth = 1;
        line.Color = color.WithAlpha(0.35);
        line.LegendText = "";
        var mean = plot.Add.Scatter(steps, RunningMean(values, span), color);
        mean.MarkerSize = 0;
        mean.LineWidth = 2.5f;
        mean.LegendText = $"{last} (bold: mean of {span} steps)";
    }

    /// Mean over span values around each; at the start, where loss falls steeply, as many before as behind it.
    private static double[] RunningMean(double[] values, int span)
    {
        var sums = new double[values.Length + 1];
        for (var i = 0; i < values.Length; i++)
        {
            sums[i + 1] = sums[i] + values[i];
        }

        return [.. values.Select((_, i) =>
        {
            var reach = Math.Min(span / 2, i);
            var (from, to) = (i - reach, Math.Min(i + reach + 1, values.Length));
            return (sums[to] - sums[from]) / (to - from);
        })];
    }
}

// The live line of a run: step, loss, tokens a second, time left. Plain lines where nobody watches.

using System.Diagnostics;
using System.Globalization;
using DeepSeekGraph.Runtime.Telemetry;

namespace DeepSeekGraph.Cli;

internal sealed class Progress(long steps, long done = 0)
{
    /// Runs of up to so many steps print each; longer ones about as many lines.
    private const int PlainLines = 20;

    private readonly long _begin = Stopwatch.GetTimestamp();
    private TimeSpan _first;
    private bool _open;

    public void Show(StepMetrics step)
    {
        var elapsed = Stopwatch.GetElapsedTime(_begin);
        var first = done + 1;
        if (step.Step == first)
            _first = elapsed;

        // the first step is slower: code is compiled, memory is new
        var each = step.Step == first ? elapsed : (elapsed - _first) / (step.Step - first);
        var line = Line(step, steps, each * (steps - step.Step));
        if (Render.IsTerminal)
        {
            Console.Write($"\r{line}\e[K");
            _open = true;
        }
        else if (step.Step == first || step.Step == steps || step.Step % Math.Max(1, steps / PlainLines) == 0)
        {
            Console.WriteLine(line);
        }
    }

    /// Leaves the last line standing.
    public void Close()
    {
        if (_open)
            Console.WriteLine();
        _open = false;
    }

    internal static string Line(StepMetrics step, long steps, TimeSpan left)
    {
        var digits = steps.ToString(CultureInfo.InvariantCulture).Length;
        var mtp = step.MtpLoss is { } loss ? string.Create(CultureInfo.InvariantCulture, $"  mtp {loss:F4}") : "";
        return string.Create(
            CultureInfo.InvariantCulture,
            $"step {step.Step.ToString(CultureInfo.InvariantCulture).PadLeft(digits)}/{steps}"
            + $"  loss {step.Loss:F4}{mtp}  {step.TokensPerS,7:N0} tokens/s  {Clock(left)} left");
    }

    internal static string Clock(TimeSpan time) => string.Create(
        CultureInfo.InvariantCulture,
        $"{(long)Math.Round(time.TotalSeconds) / 60}:{(long)Math.Round(time.TotalSeconds) % 60:D2}");
}

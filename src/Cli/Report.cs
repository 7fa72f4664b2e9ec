// The end of a run: what came out, where it lies, and what to try next.

using System.Globalization;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Telemetry;

namespace DeepSeekGraph.Cli;

/// Steps asked for and seen, with what was measured.
internal sealed record Outcome(
    PlanSet Plan, int Steps, IReadOnlyList<StepMetrics> Seen, IReadOnlyList<MemoryRow> Measured, string Folder)
{
    /// Checkpoints in words; null where none were asked for.
    public string? Saved { get; init; }

    public bool Stopped => Seen.Count < Steps;
}

internal static class Report
{
    public static void Print(Outcome outcome)
    {
        var files = $"{Files.Metrics}, {Files.Plan}";
        if (outcome.Seen.Count > 0)
        {
            var title = $"Training loss, {PlanSummary.Name(outcome.Plan)}";
            LossCurve.Write(Path.Combine(outcome.Folder, Files.Curve), outcome.Seen, title);
            files += $", {Files.Curve}";
        }

        Console.WriteLine();
        Console.WriteLine("result");
        Render.Pairs(Results(outcome));
        Console.WriteLine("\nplan");
        Render.Pairs(PlanSummary.Lines(outcome.Plan));
        Console.WriteLine();
        Render.Table(PlanSummary.Memory(outcome.Plan, outcome.Measured));
        Console.WriteLine($"\nwritten to {outcome.Folder}: {files}");
        Console.WriteLine("\nwhat to try next");
        foreach (var line in Next(outcome))
            Console.WriteLine($"  {line}");
    }

    internal static IEnumerable<(string, string)> Results(Outcome outcome)
    {
        var seen = outcome.Seen;
        yield return ("steps", $"{seen.Count}" + (outcome.Stopped ? $" of {outcome.Steps}, stopped by a signal" : ""));
        if (outcome.Saved is { } saved)
            yield return ("checkpoints", saved);
        if (seen.Count == 0)
            yield break;

        yield return ("loss first", Number(seen[0].Loss));
        yield return ("loss last", Number(seen[^1].Loss));
        if (seen[0].MtpLoss is { } first && seen[^1].MtpLoss is { } last)
            yield return ("MTP loss first, last", $"{Number(first)}, {Number(last)}");
        var seconds = seen.Sum(step => step.Seconds);
        yield return ("seconds", seconds.ToString("F1", CultureInfo.InvariantCulture));
        var speed = seen.Sum(step => step.Tokens) / seconds;
        yield return ("tokens/s", speed.ToString("N0", CultureInfo.InvariantCulture));
    }

    internal static IEnumerable<string> Next(Outcome outcome)
    {
        var name = PlanSummary.Name(outcome.Plan);
        var ranks = PlanSummary.Ranks(outcome.Plan);
        var plan = Path.Combine(Path.GetRelativePath(Environment.CurrentDirectory, outcome.Folder), Files.Plan);
        if (outcome.Stopped)
        {
            var steps = Math.Max(1, outcome.Seen.Count);
            yield return $"the run was stopped; for a short one: ./dsg pretrain {name} --steps {steps}";
            if (outcome.Saved is not null)
                yield return $"to go on:                  ./dsg pretrain {name} --resume {Path.GetDirectoryName(plan)}";
        }

        if (ranks > ThisMachine.Cores)
        {
            var cores = ThisMachine.Cores;
            yield return $"{ranks} ranks on {cores} cores show the plan, not speed; one rank is faster here:";
            yield return $"  ./dsg pretrain {name} --tp 1 --pp 1 --ep 1 --dp 1";
        }
        else
        {
            yield return "the same model on 8 ranks, with the same losses to the fourth digit in fp32:";
            yield return $"  ./dsg pretrain {name} --tp 2 --pp 2 --ep 2 --dp 2";
        }

        yield return $"what every rank did:       ./dsg show {plan}";
        yield return $"the same run, bit for bit: ./dsg run {plan}";
        yield return "your own text:             ./dsg pretrain --data FOLDER";
    }

    private static string Number(double value) => value.ToString("F4", CultureInfo.InvariantCulture);
}

// What a training step measured, and metrics.jsonl: one JSON object a step.

using System.Text;
using System.Text.Json;
using System.Text.Json.Serialization;

namespace DeepSeekGraph.Runtime.Telemetry;

/// Numbers of one step. Loss: main cross-entropy, nats, mean over the valid tokens of the global batch.
public sealed record StepMetrics
{
    /// Counted from 1.
    public required long Step { get; init; }

    /// Nats a token, without the multi-token prediction and balance terms.
    public required double Loss { get; init; }

    /// Nats a token, mean over depths, not scaled by its weight; null without multi-token prediction.
    public double? MtpLoss { get; init; }

    /// What the sequence-wise balance loss adds to the objective, summed over layers; null without it.
    public double? BalanceLoss { get; init; }

    /// Learning rate of this step.
    public required double Lr { get; init; }

    /// Global L2 norm of the gradient, before clipping.
    public required double GradNorm { get; init; }

    /// Valid tokens in the global batch.
    public required long Tokens { get; init; }

    /// Tokens over Seconds, of the whole job.
    public required double TokensPerS { get; init; }

    /// Wall time of the step.
    public required double Seconds { get; init; }
}

/// Appends a line a step and flushes it, so that a run can be watched and a crash loses nothing.
public sealed class MetricsWriter : IDisposable
{
    private readonly FileStream _file;

    /// Creates `path`, which must not exist (DSG0815); DSG0816 where it cannot.
    public MetricsWriter(string path)
        : this(path, FileMode.CreateNew)
    {
    }

    private MetricsWriter(string path, FileMode mode)
    {
        try
        {
            _file = new FileStream(path, mode, FileAccess.Write, FileShare.Read);
        }
        catch (IOException) when (File.Exists(path))
        {
            throw DiagnosticException.Of(
                Codes.OutputTaken, path, "the metrics file exists", "give --out a new or empty folder");
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw Unwritable(path, e);
        }
    }

    /// Goes on behind the lines that are there; DSG0816 where it cannot.
    public static MetricsWriter Append(string path) => new(path, FileMode.Append);

    /// Writes one line; doubles in the shortest form that reads back equal. DSG0816 when the disk is full.
    public void Write(StepMetrics metrics)
    {
        try
        {
            _file.Write([.. JsonSerializer.SerializeToUtf8Bytes(metrics, MetricsJson.Default.StepMetrics), (byte)'\n']);
            _file.Flush();
        }
        catch (IOException e)
        {
            throw Unwritable(_file.Name, e);
        }
    }

    public void Dispose() => _file.Dispose();

    private static DiagnosticException Unwritable(string path, Exception e) => DiagnosticException.Of(
        Codes.OutputUnwritable,
        path,
        $"the metrics cannot be written: {e.Message}",
        "free some space, or give another --out");
}

/// Reads metrics.jsonl back, for plots and tests.
public static class MetricsFile
{
    /// All steps of the file, in its order; DSG0810 when it cannot be read, DSG0812 with the line when malformed.
    public static IReadOnlyList<StepMetrics> Read(string path)
    {
        var steps = new List<StepMetrics>();
        try
        {
            foreach (var line in File.ReadLines(path, Encoding.UTF8))
            {
                steps.Add(Parse(line, $"{path}:{steps.Count + 1}"));
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw DiagnosticException.Of(
                Codes.DataUnavailable,
                path,
                $"the metrics file cannot be read: {e.Message}",
                "give the metrics.jsonl of a run");
        }

        return steps;
    }

    /// Drops all steps behind `step`, as a run does that goes on from there again, and a line that was cut short; what stays.
    public static IReadOnlyList<StepMetrics> Keep(string path, long step)
    {
        try
        {
            var text = File.ReadAllText(path, Encoding.UTF8);
            string[] lines = [.. text[..(text.LastIndexOf('\n') + 1)].Split('\n', StringSplitOptions.RemoveEmptyEntries)];
            var steps = lines.Select((line, i) => Parse(line, $"{path}:{i + 1}")).TakeWhile(metrics => metrics.Step <= step).ToArray();
            var temporary = path + ".tmp";
            File.WriteAllText(temporary, string.Concat(lines.Take(steps.Length).Select(line => line + "\n")));
            File.Move(temporary, path, overwrite: true);
            return steps;
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            throw DiagnosticException.Of(
                Codes.OutputUnwritable, path, $"the metrics cannot be kept: {e.Message}", "free some space, or start anew with another --out");
        }
    }

    private static StepMetrics Parse(string line, string at)
    {
        try
        {
            return JsonSerializer.Deserialize(line, MetricsJson.Default.StepMetrics)
                ?? throw new JsonException("the line is null");
        }
        catch (JsonException e)
        {
            throw DiagnosticException.Of(
                Codes.DataMalformed,
                at,
                $"the line is not a step's metrics: {e.Message}",
                "remove the line, or give a whole file");
        }
    }
}

/// Names in snake_case; a loss that is not a number stays readable as "NaN".
[JsonSourceGenerationOptions(
    PropertyNamingPolicy = JsonKnownNamingPolicy.SnakeCaseLower,
    DefaultIgnoreCondition = JsonIgnoreCondition.WhenWritingNull,
    NumberHandling = JsonNumberHandling.AllowNamedFloatingPointLiterals)]
[JsonSerializable(typeof(StepMetrics))]
internal sealed partial class MetricsJson : JsonSerializerContext;

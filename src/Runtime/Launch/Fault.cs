// What ended a job, as it goes from the process where it happened to all others.
namespace DeepSeekGraph.Runtime.Launch;

/// <summary>Thrown where another process was told to stop by a signal.</summary>
public sealed class JobCancelledException(int process) : OperationCanceledException($"rank {process} was told to stop")
{
    public int Process => process;
}

/// <summary>An error of a process: diagnostics, a stop by signal (neither), or the text of a bug.</summary>
internal sealed record Fault(int Process, IReadOnlyList<Diagnostic> Diagnostics, string Bug)
{
    private const int MostDiagnostics = 100;
    private const int MostText = 10_000;

    public bool IsCancellation => Diagnostics.Count == 0 && Bug.Length == 0;

    /// <summary>What a process tells the others of an exception.</summary>
    public static Fault Of(int process, Exception error)
        => error switch
        {
            DiagnosticException { Diagnostics: var diagnostics } => new Fault(process, diagnostics, ""),
            RuntimeException fault => new Fault(process, fault.ToDiagnostic().Diagnostics, ""),
            AggregateException { InnerException: { } inner } => Of(process, inner),
            OperationCanceledException => new Fault(process, [], ""),
            _ => new Fault(process, [], error.ToString()),
        };

    /// <summary>The same in another process: diagnostics name the rank.</summary>
    public Exception ToException()
    {
        if (IsCancellation)
            return new JobCancelledException(Process);
        return Diagnostics.Count > 0
            ? new DiagnosticException([.. Diagnostics.Select(d => new Diagnostic(d.Code, Named(d.At), d.Message, d.Help))])
            : new InvalidOperationException($"rank {Process}: {Bug}");
    }

    public byte[] ToBytes()
        => Packing.Pack(writer =>
        {
            writer.Write(Process);
            writer.Write(Clip(Bug));
            writer.Write(Math.Min(MostDiagnostics, Diagnostics.Count));
            foreach (var one in Diagnostics.Take(MostDiagnostics))
            {
                foreach (var text in (string[])[one.Code, one.At, one.Message, one.Help])
                    writer.Write(Clip(text));
            }
        });

    /// <summary>InvalidDataException for what is no fault.</summary>
    public static Fault Read(byte[] bytes)
        => Packing.Unpack(bytes, reader =>
        {
            var (process, bug) = (reader.ReadInt32(), reader.ReadString());
            var diagnostics = new Diagnostic[reader.ReadCount()];
            for (var i = 0; i < diagnostics.Length; i++)
                diagnostics[i] = new Diagnostic(reader.ReadString(), reader.ReadString(), reader.ReadString(), reader.ReadString());
            return new Fault(process, diagnostics, bug);
        });

    private string Named(string at)
        => at.StartsWith("rank ", StringComparison.Ordinal) ? at : at.Length == 0 ? $"rank {Process}" : $"rank {Process}, {at}";

    private static string Clip(string text) => text.Length <= MostText ? text : text[..MostText];
}

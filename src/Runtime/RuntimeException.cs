// What a rank could not do: code, rank, step and the plan instruction, told in one line.
namespace DeepSeekGraph.Runtime;

/// <summary>A fault of a running rank (DSG08xx); the first one of a job is the one reported.</summary>
public sealed class RuntimeException : Exception
{
    public RuntimeException(string code, string what, Exception? cause = null)
        : base(what, cause) => Code = code;

    /// <summary>A stable code of the DSG08xx range.</summary>
    public string Code { get; }

    /// <summary>The rank it happened on; -1 when it is not known.</summary>
    public int Rank { get; init; } = -1;

    /// <summary>The training step, counted from 1; 0 before the first.</summary>
    public long Step { get; init; }

    /// <summary>The plan instruction, as text.</summary>
    public string Instruction { get; init; } = "";

    /// <summary>The module path the instruction came from.</summary>
    public string Path { get; init; } = "";

    /// <summary>The form shown to users.</summary>
    public DiagnosticException ToDiagnostic()
        => DiagnosticException.Of(
            Code,
            $"rank {Rank}, step {Step}{(Path.Length > 0 ? $", {Path}" : "")}{(Instruction.Length > 0 ? $", {Instruction}" : "")}",
            Message.Split('\n')[0],
            "");
}

// What ends a command early: mistakes as diagnostics, anything else as a bug of dsg.

using DeepSeekGraph.Runtime;

namespace DeepSeekGraph.Cli;

internal static class Faults
{
    /// Says what went wrong on the error stream and gives the exit code.
    public static int Report(Exception e)
    {
        switch (e)
        {
            case DiagnosticException { Diagnostics: var diagnostics }:
                Render.Diagnostics(diagnostics);
                return ExitCode.Diagnostics;
            case AggregateException { InnerException: { } inner }:
                return Report(inner);
            default:
                return IsMachines(e, out var told) ? Report(told) : Bug(e);
        }
    }

    /// A rank's fault has a code too. Not inlined: naming the type loads the runtime.
    [System.Runtime.CompilerServices.MethodImpl(System.Runtime.CompilerServices.MethodImplOptions.NoInlining)]
    private static bool IsMachines(Exception e, out Exception told)
    {
        told = e is RuntimeException fault ? fault.ToDiagnostic() : e;
        return !ReferenceEquals(told, e);
    }

    private static int Bug(Exception e)
    {
        Console.Error.WriteLine($"dsg: this is a bug in dsg, not in your input: {e.Message}");
        Console.Error.WriteLine(e);
        return ExitCode.Bug;
    }
}

/// What the shell gets.
internal static class ExitCode
{
    public const int Ok = 0;
    public const int Diagnostics = 1;
    /// Of dsg diff, as diff and cmp have it.
    public const int Different = 1;
    public const int Usage = 2;
    public const int Bug = 70;
    public const int Interrupted = 130;
    public const int Terminated = 143;
}

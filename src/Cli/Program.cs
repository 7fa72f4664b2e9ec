// The dsg command: dispatch, and exit codes 0 ok, 1 diagnostics, 2 usage, 70 a fault of dsg itself.

namespace DeepSeekGraph.Cli;

public static class Program
{
    public static int Main(string[] args)
    {
        try
        {
            return Arguments.Invoke(args);
        }
        catch (Exception e)
        {
            return Faults.Report(e);
        }
    }
}

// dsg compile --emit-csharp: the C# that runs a plan, one file a stage, to be read.

using System.Globalization;
using DeepSeekGraph.Runtime.Execution.Generated;

namespace DeepSeekGraph.Cli;

internal static class EmittedCode
{
    public const string Option = "--emit-csharp";

    /// Before the work rather than after it: DSG0815 where the folder holds something, or is a file.
    public static void RefuseUsed(string folder)
    {
        if (File.Exists(folder))
            throw Taken(folder, "is a file");
        if (Directory.Exists(folder) && Directory.EnumerateFileSystemEntries(folder).Any())
            throw Taken(folder, "is not empty");
    }

    /// Writes Stage0.cs, Stage1.cs, ... into a new or empty folder; DSG0815, DSG0816.
    public static void Write(PlanSet plan, string folder)
    {
        RefuseUsed(folder);
        try
        {
            Directory.CreateDirectory(folder);
            for (var i = 0; i < plan.Stages.Count; i++)
            {
                var file = string.Create(CultureInfo.InvariantCulture, $"Stage{i}.cs");
                File.WriteAllText(Path.Combine(folder, file), CodeWriter.Write(plan, plan.Stages[i]));
            }
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw DiagnosticException.Of(
                Codes.OutputUnwritable,
                Option,
                $"the output folder '{folder}' cannot be written: {e.Message}",
                $"give {Option} a folder that you may write to");
        }
    }

    private static DiagnosticException Taken(string folder, string what) => DiagnosticException.Of(
        Codes.OutputTaken,
        Option,
        $"the output folder '{folder}' {what}",
        $"give {Option} a new or empty folder");
}

// Slurm's lists of nodes: "n[0-3,07],gpu12" is what SLURM_STEP_NODELIST says.
using System.Diagnostics;
using System.Globalization;
using System.Text.RegularExpressions;

namespace DeepSeekGraph.Runtime.Launch;

internal static partial class SlurmNodes
{
    /// <summary>The first node of a list; DSG0860 where it is none.</summary>
    public static string First(string list)
    {
        var match = FirstNode().Match(list);
        if (!match.Success)
        {
            throw DiagnosticException.Of(
                Codes.LaunchEnvironment, "SLURM_STEP_NODELIST", $"'{list}' is no list of nodes", "give rank 0's node in MASTER_ADDR");
        }

        return match.Groups["name"].Value + match.Groups["number"].Value + match.Groups["rest"].Value;
    }

    /// <summary>The most tasks on one node by SLURM_STEP_TASKS_PER_NODE, such as "2(x3),1".</summary>
    public static int MostTasks(string perNode)
        => perNode.Split(',')
            .Select(part => int.TryParse(part.Split('(')[0], NumberStyles.None, CultureInfo.InvariantCulture, out var tasks) ? tasks : 1)
            .Max();

    /// <summary>A node's address where its name cannot be looked up, as Slurm's own controller has it; null where that does not say.</summary>
    public static string? AddressOf(string node)
    {
        try
        {
            var start = new ProcessStartInfo("scontrol", ["-o", "show", "node", node])
            {
                RedirectStandardOutput = true,
                RedirectStandardError = true,
            };
            using var scontrol = Process.Start(start);
            if (scontrol is null)
                return null;
            var text = scontrol.StandardOutput.ReadToEndAsync();
            if (!scontrol.WaitForExit(Patience.Handshake))
            {
                scontrol.Kill();
                return null;
            }

            return NodeAddress().Match(text.Result) is { Success: true } match ? match.Groups["address"].Value : null;
        }
        catch (Exception e) when (e is System.ComponentModel.Win32Exception or IOException)
        {
            return null;
        }
    }

    [GeneratedRegex(@"^(?<name>[A-Za-z0-9._-]+?)(\[(?<number>\d+)[\d,\[\]-]*\](?<rest>[A-Za-z0-9._-]*))?(,|\z)")]
    private static partial Regex FirstNode();

    [GeneratedRegex(@"\bNodeAddr=(?<address>\S+)")]
    private static partial Regex NodeAddress();
}

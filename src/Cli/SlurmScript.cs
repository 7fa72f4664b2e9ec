// A batch script for Slurm: srun starts a process for each rank.

using System.Globalization;
using System.Text;

namespace DeepSeekGraph.Cli;

internal static class SlurmScript
{
    public static string Of(Submission job)
    {
        var text = new StringBuilder("#!/bin/bash\n");
        Option("job-name", job.Name);
        Option("nodes", Text(job.Nodes));
        Option("ntasks", Text(job.Ranks));
        Option("ntasks-per-node", Text(job.PerNode));
        if (job.CpusPerRank is { } cpus)
            Option("cpus-per-task", Text(cpus));
        if (job.GpusPerNode is { } gpus)
            Option("gpus-per-node", Text(gpus));
        else
            Option("mem", $"{Text(job.MebibytesPerNode)}M");
        if (job.Time is { } time)
            Option("time", time);
        if (job.Partition is { } partition)
            Option("partition", partition);
        if (job.Account is { } account)
            Option("account", account);
        Option("output", "%x-%j.log");
        text.Append(CultureInfo.InvariantCulture, $"# plan {job.Hash}: {job.Ranks} ranks, {job.PerNode} on each of {job.Nodes} nodes\n");
        text.Append(
            """
            set -euo pipefail
            # a stranger's process on the same port is refused
            DSG_JOB_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
            export DSG_JOB_TOKEN
            # a rank that dies ends the step; dsg says first which one it was
            exec srun --wait=60 --kill-on-bad-exit=0 \

            """.Replace("\r\n", "\n", StringComparison.Ordinal));
        text.AppendJoin(' ', ((string[])[job.Program, "run", job.Plan, .. job.Options]).Select(Quoted).Prepend(" ")).Append('\n');
        return text.ToString();

        void Option(string name, string value) => text.Append(CultureInfo.InvariantCulture, $"#SBATCH --{name}={value}\n");
    }

    /// One word of a shell, whatever is in it.
    public static string Quoted(string word)
        => word.Length > 0 && word.All(c => char.IsAsciiLetterOrDigit(c) || "_./:=,+-".Contains(c, StringComparison.Ordinal))
            ? word
            : $"'{word.Replace("'", @"'\''", StringComparison.Ordinal)}'";

    private static string Text(long number) => number.ToString(CultureInfo.InvariantCulture);
}

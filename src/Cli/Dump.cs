// dsg compile --dump DIR: what each pass leaves, as numbered text files.

using System.Globalization;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime;

namespace DeepSeekGraph.Cli;

internal static class Dump
{
    /// The plan of a job, compiled with every form written: 00-declared.graph, 01-prune.graph, ..., 08-lower.plan.
    public static PlanSet Compile(NamedRecipe job, string folder)
    {
        var into = RunFolder.Create(folder);
        return new DeepSeekV3(job.Config).Compile(job.Recipe, (number, pass, progress) =>
        {
            var (text, kind) = progress.Form switch
            {
                Form.Logical logical => (Text.print(logical.Item), "graph"),
                Form.Local local => (Compiler.Partition.PartitionText.print(local.Item), "shards"),
                Form.Plan plan => (PlanFile.Print(plan.Item), "plan"),
                _ => throw new InvalidOperationException("a form without a text (a bug in dsg)"),
            };
            var file = Path.Combine(into, string.Create(CultureInfo.InvariantCulture, $"{number:D2}-{pass}.{kind}"));
            try
            {
                File.WriteAllText(file, text);
            }
            catch (Exception e) when (e is IOException or UnauthorizedAccessException)
            {
                throw DiagnosticException.Of(Codes.OutputUnwritable, file, e.Message, "give another folder");
            }
        });
    }
}

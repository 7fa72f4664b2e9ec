// dsg export: a checkpoint of any layout becomes one that Hugging Face reads.

using System.CommandLine;
using System.Globalization;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models.HuggingFace;
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Cli;

internal static class Export
{
    public static Command Verb()
    {
        var checkpoint = new Option<string?>("--checkpoint")
        {
            HelpName = "DIR",
            Description = "A checkpoint, the folder that holds several, or that of a run",
        };
        var folder = new Option<string?>("--out") { HelpName = "DIR", Description = "Folder of the published form; weights in it are replaced" };
        var dtype = new Option<string?>("--dtype") { HelpName = "fp32|bf16", Description = "Type of the weights; without, as they are stored" };
        var fp8 = new Option<bool>("--fp8") { Description = "Linear weights in E4M3 with scales of 128 x 128 blocks" };
        var shard = new Option<string?>("--shard-size") { HelpName = "BYTES", Description = "Largest file of weights; without, 5GB" };
        var verb = new Command("export", "Write a checkpoint in the form of Hugging Face") { checkpoint, folder, dtype, fp8, shard };
        verb.SetAction(parse => Start(
            JobOptions.Required(parse, checkpoint),
            JobOptions.Required(parse, folder),
            new StoredExportOptions
            {
                DType = JobOptions.DTypeOf(parse.GetValue(dtype)),
                Fp8 = parse.GetValue(fp8),
                ShardBytes = SizeOf(parse.GetValue(shard)),
            }));
        return verb;
    }

    private static int Start(string path, string folder, StoredExportOptions options)
    {
        Launched.RequireAlone("export");
        using var checkpoint = CheckpointReader.Open(path);
        var progress = new ByteProgress("export");
        var bytes = StoredExport.Write(checkpoint, folder, options with { Progress = progress.Show });
        progress.Close(bytes);
        Console.WriteLine(string.Create(
            CultureInfo.InvariantCulture, $"{checkpoint.Folder}, step {checkpoint.Manifest.Step}, is in {folder}"));
        return ExitCode.Ok;
    }

    private static long SizeOf(string? text)
        => text is null ? ShardedWriter.DefaultShardBytes
            : ByteSize.tryParse(text) is { IsSome: true } size ? size.Value
            : throw DiagnosticException.Of(
                Codes.OptionValue, "--shard-size", $"'{text}' is no number of bytes", $"give {ByteSize.forms}");
}

// Writes a model's parameters as a published checkpoint: config.json, shards of per-expert tensors, and their index.

using System.Text;
using System.Text.Json.Nodes;
using DeepSeekGraph.Runtime.Weights;
using TorchSharp;

namespace DeepSeekGraph.Models.HuggingFace;

/// How a checkpoint is written.
public sealed record ExportOptions
{
    /// Type of the weights; biases of the router are F32 always.
    public torch.ScalarType Type { get; init; } = torch.ScalarType.BFloat16;

    /// Linear weights in E4M3 with scales of 128 x 128 blocks, as DeepSeek publishes them.
    public bool Fp8 { get; init; }

    /// Largest shard.
    public long ShardBytes { get; init; } = ShardedWriter.DefaultShardBytes;

    /// A checkpoint's own config.json, whose other fields stay.
    public JsonObject? Basis { get; init; }

    /// Further files of the folder by name, such as those of the tokenizer.
    public IReadOnlyDictionary<string, byte[]> Files { get; init; } = new Dictionary<string, byte[]>();
}

/// The one way out: tensor by tensor, so that memory holds one parameter at a time; the folder changes in one step.
public static class CheckpointExport
{
    /// `parameter` yields parameters whole, in the model's shape; each is disposed here. DSG0815, DSG0816 as ShardedWriter says.
    public static void Write(
        DeepSeekV3Config config, Func<string, torch.Tensor> parameter, string folder, ExportOptions options)
    {
        var map = WeightMap.Of(config);
        var copies = WeightMap.Copies(config).ToLookup(pair => pair.Original, pair => pair.Copy);
        var tensors = map.Tensors(config).ToDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        using var writer = ShardedWriter.Create(
            folder,
            [.. tensors.Values.SelectMany(tensor => Specs(tensor, options))],
            options.ShardBytes,
            new Dictionary<string, string> { ["format"] = "pt" });
        foreach (var entry in map.Entries)
        {
            using var given = parameter(entry.Parameter);
            using var flat = given.reshape(-1);
            foreach (var piece in entry.Pieces)
            {
                using var part = flat.narrow(0, piece.Offset, piece.Elements);
                using var values = part.reshape([.. piece.Shape]);
                foreach (var name in copies[piece.Tensor].Prepend(piece.Tensor))
                    WriteOne(writer, tensors[name], values, options);
            }
        }

        foreach (var (name, bytes) in options.Files)
            writer.AddFile(name, bytes);
        var type = options.Type == torch.ScalarType.Float32 ? "float32" : "bfloat16";
        writer.AddFile("config.json", Encoding.UTF8.GetBytes(ConfigJson.Write(config, type, options.Fp8, options.Basis)));
        writer.Commit();
    }

    private static bool IsFp8(CheckpointTensor tensor, ExportOptions options) => options.Fp8 && tensor.Blocks;

    private static IEnumerable<SafeTensorSpec> Specs(CheckpointTensor tensor, ExportOptions options)
    {
        long[] shape = [.. tensor.Shape];
        if (!IsFp8(tensor, options))
        {
            yield return new(tensor.Name, NameOf(TypeOf(tensor, options)), shape);
            yield break;
        }

        var grid = Fp8Blocks.Grid(shape[0], shape[1]);
        yield return new(tensor.Name, "F8_E4M3", shape);
        yield return new(WeightMap.ScalesOf(tensor.Name), "F32", [grid.Rows, grid.Columns]);
    }

    private static void WriteOne(ShardedWriter writer, CheckpointTensor tensor, torch.Tensor values, ExportOptions options)
    {
        if (IsFp8(tensor, options))
        {
            using var wide = values.to_type(torch.ScalarType.Float32);
            using var blocks = Fp8Blocks.Quantize(wide, tensor.Name);
            writer.Write(tensor.Name, blocks.Weight.bytes);
            writer.Write(WeightMap.ScalesOf(tensor.Name), blocks.Scales.bytes);
            return;
        }

        using var typed = values.to_type(TypeOf(tensor, options));
        using var whole = typed.contiguous();
        writer.Write(tensor.Name, whole.bytes);
    }

    private static torch.ScalarType TypeOf(CheckpointTensor tensor, ExportOptions options)
        => tensor.Float32 ? torch.ScalarType.Float32 : options.Type;

    private static string NameOf(torch.ScalarType type) => type switch
    {
        torch.ScalarType.Float32 => "F32",
        torch.ScalarType.BFloat16 => "BF16",
        _ => throw new ArgumentException($"checkpoints are written as Float32 or BFloat16, not {type}", nameof(type)),
    };
}

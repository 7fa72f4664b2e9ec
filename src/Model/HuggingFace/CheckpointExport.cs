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

    /// Types of single parameters that differ from it.
    public IReadOnlyDictionary<string, torch.ScalarType> Types { get; init; } = new Dictionary<string, torch.ScalarType>();

    /// Linear weights in E4M3 with scales of 128 x 128 blocks, as DeepSeek publishes them.
    public bool Fp8 { get; init; }

    /// Largest shard.
    public long ShardBytes { get; init; } = ShardedWriter.DefaultShardBytes;

    /// A checkpoint's own config.json, whose other fields stay.
    public JsonObject? Basis { get; init; }

    /// Further files of the folder by name, such as those of the tokenizer.
    public IReadOnlyDictionary<string, byte[]> Files { get; init; } = new Dictionary<string, byte[]>();
}

/// The one way out: tensor by tensor, so that memory holds one at a time; the folder changes in one step.
public static class CheckpointExport
{
    /// `values` yields the elements of a checkpoint tensor, in its shape; each is disposed here. A config.json among the further files
    /// is taken as it is. DSG0815, DSG0816 as ShardedWriter says.
    public static void Write(
        DeepSeekV3Config config, Func<WeightPlace, torch.Tensor> values, string folder, ExportOptions options)
    {
        var map = WeightMap.Of(config);
        var copies = WeightMap.Copies(config).ToLookup(pair => pair.Original, pair => pair.Copy);
        var tensors = map.Tensors(config).ToDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        using var writer = ShardedWriter.Create(
            folder,
            [.. tensors.Values.SelectMany(tensor => Specs(tensor, TypeOf(map, tensor, options), options))],
            options.ShardBytes,
            new Dictionary<string, string> { ["format"] = "pt" });
        foreach (var piece in map.Entries.SelectMany(entry => entry.Pieces))
        {
            using var given = values(map.Find(piece.Tensor)!);
            foreach (var name in copies[piece.Tensor].Prepend(piece.Tensor))
                WriteOne(writer, tensors[name], given, TypeOf(map, tensors[name], options), options);
        }

        foreach (var (name, bytes) in options.Files)
            writer.AddFile(name, bytes);
        var type = options.Type == torch.ScalarType.Float32 ? "float32" : "bfloat16";
        if (!options.Files.ContainsKey("config.json"))
            writer.AddFile("config.json", Encoding.UTF8.GetBytes(ConfigJson.Write(config, type, options.Fp8, options.Basis)));
        writer.Commit();
    }

    private static bool IsFp8(CheckpointTensor tensor, ExportOptions options) => options.Fp8 && tensor.Blocks;

    private static IEnumerable<SafeTensorSpec> Specs(CheckpointTensor tensor, torch.ScalarType type, ExportOptions options)
    {
        long[] shape = [.. tensor.Shape];
        if (!IsFp8(tensor, options))
        {
            yield return new(tensor.Name, NameOf(type), shape);
            yield break;
        }

        var grid = Fp8Blocks.Grid(shape[0], shape[1]);
        yield return new(tensor.Name, "F8_E4M3", shape);
        yield return new(WeightMap.ScalesOf(tensor.Name), "F32", [grid.Rows, grid.Columns]);
    }

    private static void WriteOne(
        ShardedWriter writer, CheckpointTensor tensor, torch.Tensor values, torch.ScalarType type, ExportOptions options)
    {
        if (IsFp8(tensor, options))
        {
            using var wide = values.to_type(torch.ScalarType.Float32);
            using var blocks = Fp8Blocks.Quantize(wide, tensor.Name);
            writer.Write(tensor.Name, blocks.Weight);
            writer.Write(WeightMap.ScalesOf(tensor.Name), blocks.Scales);
            return;
        }

        using var typed = values.to_type(type);
        using var whole = typed.contiguous();
        writer.Write(tensor.Name, whole);
    }

    /// A copy has the type of what it repeats.
    private static torch.ScalarType TypeOf(WeightMap map, CheckpointTensor tensor, ExportOptions options)
        => tensor.Float32
            ? torch.ScalarType.Float32
            : options.Types.GetValueOrDefault(map.Find(tensor.Original ?? tensor.Name)!.Entry.Parameter, options.Type);

    private static string NameOf(torch.ScalarType type) => type switch
    {
        torch.ScalarType.Float32 => "F32",
        torch.ScalarType.BFloat16 => "BF16",
        _ => throw new ArgumentException($"checkpoints are written as Float32 or BFloat16, not {type}", nameof(type)),
    };
}

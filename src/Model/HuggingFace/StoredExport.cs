// From a checkpoint of any plan to a published one, tensor by tensor, with the small files that it kept.

using System.Text.Json.Nodes;
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Data;
using DeepSeekGraph.Runtime.Data.Tokenizers;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Weights;
using TorchSharp;

namespace DeepSeekGraph.Models.HuggingFace;

/// How a checkpoint is exported.
public sealed record StoredExportOptions
{
    /// fp32 (of the master weights, where there are any) or bf16; null: each parameter as it is stored.
    public DType? DType { get; init; }

    /// Linear weights in E4M3 with scales of 128 x 128 blocks.
    public bool Fp8 { get; init; }

    /// Largest shard.
    public long ShardBytes { get; init; } = ShardedWriter.DefaultShardBytes;

    /// Told of bytes written and of all there are.
    public System.Action<long, long>? Progress { get; init; }
}

/// Memory besides the mapped files is at most one tensor of the published checkpoint.
public static class StoredExport
{
    private const string GenerationConfig = "generation_config.json";

    private static byte[] Ends(HuggingFaceTokenizer tokenizer)
    {
        var text = new JsonObject { ["_from_model_config"] = true };
        if (tokenizer.Bos is { } bos)
            text["bos_token_id"] = bos;
        if (tokenizer.Eos is { } eos)
            text["eos_token_id"] = eos;
        return System.Text.Encoding.UTF8.GetBytes(text.ToJsonString(new() { WriteIndented = true }) + "\n");
    }

    /// Bytes written. DSG0847 where the checkpoint is not of a published model; DSG0815, DSG0816 as ShardedWriter says.
    public static long Write(CheckpointReader checkpoint, string folder, StoredExportOptions options)
    {
        var config = RecordFields.ConfigOf(checkpoint.Manifest.Recipe) ?? throw Unknown(
            checkpoint, "it does not say all sizes of a model of the DeepSeek family", "export what was trained or imported as one");
        var map = WeightMap.Of(config);
        var sources = map.Entries.ToDictionary(entry => entry.Parameter, entry => Source(entry.Parameter), StringComparer.Ordinal);
        var wrong = map.Entries
            .Where(entry => sources[entry.Parameter] is not { } source || !source.Tensor.Shape.SequenceEqual(entry.Shape))
            .Select(entry => entry.Parameter)
            .ToArray();
        if (wrong.Length > 0)
            throw Unknown(checkpoint, $"it has no {string.Join(", no ", wrong)} of the model's shape", "its files were mixed: copy it again");

        var types = sources.ToDictionary(source => source.Key, source => TypeOf(source.Value!), StringComparer.Ordinal);
        var main = types.GetValueOrDefault("lm_head.weight", torch.ScalarType.BFloat16);
        var all = map.Entries.Sum(entry => entry.Elements * (types[entry.Parameter] == torch.ScalarType.Float32 ? 4 : 2));
        var done = 0L;
        CheckpointExport.Write(config, Values, folder, new ExportOptions
        {
            Type = main,
            Types = types,
            Fp8 = options.Fp8,
            ShardBytes = options.ShardBytes,
            Basis = Basis(),
            Files = Files(),
        });
        return all;

        StoredWeight? Source(string parameter)
            => options.DType is not { IsFloat32: true } && checkpoint.Find(parameter) is { } weight
                ? new(weight, null)
                : StoredWeight.Of(checkpoint, parameter);

        torch.ScalarType TypeOf(StoredWeight source)
            => options.DType is { } given
                ? given.IsFloat32 ? torch.ScalarType.Float32 : torch.ScalarType.BFloat16
                : source.Tensor.Dtype == "BF16" ? torch.ScalarType.BFloat16 : torch.ScalarType.Float32;

        torch.Tensor Values(WeightPlace place)
        {
            var box = new Shard(place.Start, place.Extents, place.Entry.Shape);
            var source = sources[place.Entry.Parameter]!;
            var values = source.Remainder is null
                ? checkpoint.Tensor(source.Tensor, box, place.Piece.Shape)
                : source.Values(checkpoint, box, place.Piece.Shape);
            options.Progress?.Invoke(done += place.Piece.Elements * (types[place.Entry.Parameter] == torch.ScalarType.Float32 ? 4 : 2), all);
            return values;
        }

        JsonObject? Basis()
        {
            try
            {
                return checkpoint.Kept("config.json") is { } kept ? JsonNode.Parse(kept)?.AsObject() : null;
            }
            catch (Exception e) when (e is System.Text.Json.JsonException or InvalidOperationException or ArgumentException)
            {
                throw Unknown(checkpoint, $"its config.json cannot be read: {e.Message}", "import the weights again");
            }
        }

        Dictionary<string, byte[]> Files()
        {
            var files = checkpoint.Manifest.Kept.ToDictionary(kept => kept.Name, kept => checkpoint.Kept(kept.Name)!, StringComparer.Ordinal);
            if (checkpoint.Manifest.Data?.Tokenizer == ByteTokenizer.Instance.Name && config.VocabSize >= ByteTokenizer.Instance.Vocabulary)
            {
                foreach (var (name, bytes) in ByteTokenizerFiles.All)
                    files.TryAdd(name, bytes);
            }

            // of what was trained with a tokenizer, that one knows where a text begins and ends
            if (checkpoint.Manifest.Data is not null && files.ContainsKey("tokenizer.json") && !files.ContainsKey(GenerationConfig))
                files.Add(GenerationConfig, Ends(HuggingFaceTokenizer.Load(checkpoint.Folder)));

            // as it was, where it still says what the weights are
            if (files.TryGetValue("config.json", out var text) && !SaysWhatIsWritten(text))
                files.Remove("config.json");
            return files;
        }

        bool SaysWhatIsWritten(byte[] text)
        {
            var json = JsonNode.Parse(text)!.AsObject();
            var type = (json["torch_dtype"] ?? json["dtype"])?.GetValue<string>();
            return !options.Fp8 && !json.ContainsKey("quantization_config")
                && (type is null || type == (main == torch.ScalarType.Float32 ? "float32" : "bfloat16"))
                && ConfigJson.Write(config) == ConfigJson.Write(ConfigJson.Parse(System.Text.Encoding.UTF8.GetString(text)));
        }
    }

    private static DiagnosticException Unknown(CheckpointReader checkpoint, string what, string help)
        => DiagnosticException.Of(Codes.CheckpointModel, checkpoint.Folder, $"the checkpoint cannot be exported: {what}", help);
}

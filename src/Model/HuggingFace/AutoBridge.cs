// From a Hugging Face checkpoint to a model and back: the architecture is read from config.json, weights load by parameter.

using System.Text.Json.Nodes;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Training;
using DeepSeekGraph.Runtime.Weights;
using TorchSharp;

namespace DeepSeekGraph.Models.HuggingFace;

/// As Megatron Bridge's AutoBridge. Nothing of a checkpoint is ever run: config.json and safetensors are data.
///
///     using var bridge = AutoBridge.FromHfPretrained("deepseek-ai/DeepSeek-V2-Lite");
///     var plan = bridge.ToModel().Compile(Recipe.Default.WithParallelism(tensor: 2, pipeline: 1, expert: 2, data: 1));
///     await using var trainer = await Trainer.StartAsync(plan, new TrainerOptions { Weights = bridge.Load });
///     bridge.ExportCheckpoint(trainer, "out");
public sealed class AutoBridge : IDisposable
{
    private readonly Lazy<SafeTensorsSet> _set;
    private readonly Lazy<CheckpointWeights> _weights;

    private AutoBridge(string folder, bool noMtp)
    {
        Folder = folder;
        var declared = ConfigJson.Read(folder);
        Config = noMtp ? declared.WithoutMtp() : declared;
        _set = new(() => SafeTensorsSet.Open(folder));
        _weights = new(() => new CheckpointWeights(Config, _set.Value, declared.NumNextnPredictLayers));
    }

    /// The checkpoint's folder.
    public string Folder { get; }

    /// The model's sizes as config.json has them; training's own settings are the defaults.
    public DeepSeekV3Config Config { get; }

    /// The checkpoint's tensors; DSG0820 and on where they cannot be read.
    public SafeTensorsSet Tensors => _set.Value;

    /// The checkpoint's tensors as parameters.
    public CheckpointWeights Weights => _weights.Value;

    /// Opens a folder, or a hub name that the local cache of Hugging Face has (DSG0707 otherwise, with the command that
    /// downloads it). `noMtp`: without multi-token prediction, whether or not the checkpoint has its weights. DSG0702,
    /// DSG0703 for a configuration that is not supported.
    public static AutoBridge FromHfPretrained(string pathOrName, bool noMtp = false)
        => new(HubCache.FolderOf(pathOrName), noMtp);

    /// The model, to be compiled for any layout.
    public DeepSeekV3 ToModel() => new(Config);

    /// For TrainerOptions.Weights: parameters from the checkpoint. Reads and checks all of it first and throws every problem
    /// at once (CheckpointWeights.Check).
    public Func<string, torch.Tensor?> Load
    {
        get
        {
            if (Weights.Check() is { Count: > 0 } wrong)
                throw new DiagnosticException(wrong);
            return Weights.Parameter;
        }
    }

    /// Writes a trained model as a checkpoint of the same form, with the tokenizer's files: in the type of the original's
    /// weights unless `options` says otherwise. Parameters are gathered one at a time, from fp32 masters where there are any.
    public void ExportCheckpoint(Trainer trainer, string folder, ExportOptions? options = null)
    {
        // the tensors of a parameter follow one another
        var (name, whole) = ("", (torch.Tensor?)null);
        try
        {
            CheckpointExport.Write(Config, Values, folder, (options ?? Original()) with
            {
                Basis = options?.Basis ?? JsonNode.Parse(File.ReadAllText(Path.Combine(Folder, "config.json")))?.AsObject(),
                Files = options is { Files.Count: > 0 } ? options.Files : OwnFiles(),
            });
        }
        finally
        {
            whole?.Dispose();
        }

        torch.Tensor Values(WeightPlace place)
        {
            if (name != place.Entry.Parameter || whole is null)
            {
                whole?.Dispose();
                (name, whole) = (place.Entry.Parameter, Whole(trainer, place.Entry.Parameter));
            }

            using var flat = whole.reshape(-1);
            using var part = flat.narrow(0, place.Piece.Offset, place.Piece.Elements);
            return part.reshape([.. place.Piece.Shape]);
        }
    }

    public void Dispose()
    {
        if (_weights.IsValueCreated)
            _weights.Value.Dispose();
        if (_set.IsValueCreated)
            _set.Value.Dispose();
    }

    private ExportOptions Original() => new()
    {
        Type = Tensors.Info("lm_head.weight").DType == "F32" ? torch.ScalarType.Float32 : torch.ScalarType.BFloat16,
    };

    private Dictionary<string, byte[]> OwnFiles()
        => SmallFiles.In(Folder, SmallFiles.OfText).ToDictionary(file => file.Name, file => file.Bytes);

    private static torch.Tensor Whole(Trainer trainer, string name)
    {
        var stage = trainer.Plan.Parameters.First(parameter => parameter.Name == name).Stages[0];
        return Gathering.Master(trainer.Ranks, stage, name);
    }
}

// Weights to generate with: a published checkpoint, or one of a run in any layout.

using DeepSeekGraph.Models;
using DeepSeekGraph.Models.HuggingFace;
using DeepSeekGraph.Runtime;
using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Generation;

namespace DeepSeekGraph.Cli;

/// Where weights come from: one of --hf and --checkpoint.
internal sealed class ModelSource : IDisposable
{
    private readonly AutoBridge? _bridge;
    private readonly CheckpointReader? _checkpoint;
    private bool _closed;

    private ModelSource(AutoBridge? bridge, CheckpointReader? checkpoint, DeepSeekV3Config config)
        => (_bridge, _checkpoint, Config) = (bridge, checkpoint, config);

    /// Without multi-token prediction, which generation does not use.
    public DeepSeekV3Config Config { get; }

    /// The folder of weights, which may have a tokenizer.
    public string Folder => _bridge?.Folder ?? _checkpoint!.Folder;

    /// How the generator gets its weights.
    public GeneratorOptions Options => new()
    {
        Weights = _bridge?.Load,
        Checkpoint = _checkpoint,
    };

    public static ModelSource Open(GenerateChoices choices)
    {
        switch (choices.HuggingFace, choices.Checkpoint)
        {
            case ({ Length: > 0 } folder, null or ""):
                var bridge = AutoBridge.FromHfPretrained(folder, noMtp: true);
                return new(bridge, null, bridge.Config);
            case (null or "", { Length: > 0 } path):
                var checkpoint = CheckpointReader.Open(path);
                return new(null, checkpoint, RecordFields.ConfigOf(checkpoint.Manifest.Recipe)?.WithoutMtp() ?? throw DiagnosticException.Of(
                    Codes.CheckpointMismatch,
                    checkpoint.Folder,
                    "the checkpoint does not say which model it is of",
                    "give one of dsg pretrain or dsg import"));
            default:
                throw Generation.Wrong(
                    "--hf", choices.HuggingFace is null ? "no weights are given" : "weights are given twice", "give one of --hf DIR and --checkpoint DIR");
        }
    }

    /// fp32 for weights of fp32, else what this machine multiplies faster.
    public DType DTypeOf(string? name)
        => JobOptions.DTypeOf(name) ?? (IsFloat32 ? DType.Float32 : DTypeProbe.Faster);

    private bool IsFloat32 => _bridge is { } bridge
        ? bridge.Tensors.Info("lm_head.weight").DType == "F32"
        : _checkpoint!.Manifest.Tensors.Any(tensor => tensor.Name == "lm_head.weight" && tensor.Dtype == "F32");

    /// Once the ranks have their weights: what was read of the files is theirs twice until then. May be called again.
    public void Dispose()
    {
        if (_closed)
            return;
        _closed = true;
        _bridge?.Dispose();
        _checkpoint?.Dispose();
    }
}

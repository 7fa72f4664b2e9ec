// Recipes of DeepSeek-V3 with the arguments and defaults of Megatron Bridge; docs/recipes.md has both side by side.

using DeepSeekGraph.Compiler;

namespace DeepSeekGraph.Models;

/// Jobs as functions of their choices; every result is an immutable value.
public static class DeepSeekV3Recipes
{
    private static readonly string[] RopeRules = ["mla_rope_q", "mla_rope_kv"];
    private static readonly string[] PermuteRules = ["permute_with_probs", "permute", "unpermute"];

    /// <summary>Pre-training of the 671B model: TP 2, PP 16, EP 64 on 1024 accelerators, bf16, sequence parallel.</summary>
    /// <param name="name">What the plan is called.</param>
    /// <param name="dataPaths">Text to train on; null: the documentation that .NET SDKs install.</param>
    /// <param name="dir">Folder for results; null: the next of runs/0001, runs/0002, ...</param>
    /// <param name="trainIters">Optimizer steps.</param>
    /// <param name="globalBatchSize">Sequences of a step, over all ranks.</param>
    /// <param name="microBatchSize">Sequences of a microbatch on one data-parallel rank.</param>
    /// <param name="seqLength">Tokens of a sequence.</param>
    /// <param name="mtpNumLayers">Depths of multi-token prediction.</param>
    /// <param name="mtpLossScalingFactor">Weight of their losses (lambda of arXiv 2412.19437).</param>
    /// <param name="tensorParallel">Degree, as the next ones; world size is tensor x context x data x pipeline.</param>
    /// <param name="pipelineParallel">Stages.</param>
    /// <param name="expertParallel">Ranks that share a layer's experts.</param>
    /// <param name="dataParallel">0: the smallest that lets experts fit, which makes 1024 ranks of the defaults.</param>
    /// <param name="contextParallel">Ranks that share a sequence.</param>
    /// <param name="expertTensorParallel">Ranks that share one expert.</param>
    /// <param name="sequenceParallel">Splits the residual stream over tokens between tensor-parallel regions.</param>
    /// <param name="layout">Units of each stage in Megatron's letters; null: DeepSeek-V3's table, else cut by cost.</param>
    /// <param name="recompute">What the backward pass computes again; null: core_attn.</param>
    /// <param name="moePermuteFusion">Fused permute and unpermute.</param>
    /// <param name="applyRopeFusion">Fused rotation that writes queries and keys in attention layout.</param>
    /// <param name="dispatcher">How rows reach their experts; null: all-to-all.</param>
    /// <param name="dtype">What matrices and activations are computed in; null: bf16.</param>
    /// <param name="stateTypes">Element types of master weights, gradients and moments; null: fp32 masters, else bf16.</param>
    /// <param name="lr">Highest learning rate.</param>
    /// <param name="minLr">Where its cosine ends.</param>
    /// <param name="lrWarmupIters">Steps of warm-up.</param>
    /// <param name="lrDecayIters">Step at which the cosine ends; 0: the last one.</param>
    public static NamedRecipe Pretrain(
        string name = "deepseek_v3_pretrain",
        IReadOnlyList<string>? dataPaths = null,
        string? dir = null,
        int trainIters = 1_000_000,
        int globalBatchSize = 4096,
        int microBatchSize = 1,
        int seqLength = 4096,
        int mtpNumLayers = 1,
        double mtpLossScalingFactor = 0.1,
        int tensorParallel = 2,
        int pipelineParallel = 16,
        int expertParallel = 64,
        int dataParallel = 0,
        int contextParallel = 1,
        int expertTensorParallel = 1,
        bool sequenceParallel = true,
        string? layout = null,
        IReadOnlyList<string>? recompute = null,
        bool moePermuteFusion = true,
        bool applyRopeFusion = true,
        Dispatcher? dispatcher = null,
        DType? dtype = null,
        StateTypes? stateTypes = null,
        double lr = 3e-4,
        double minLr = 3e-5,
        int lrWarmupIters = 2000,
        int lrDecayIters = 0)
    {
        var states = stateTypes ?? new StateTypes(MainParams.Float32, DType.BFloat16, DType.BFloat16, DType.BFloat16);
        string[] unfused = [.. moePermuteFusion ? [] : PermuteRules, .. applyRopeFusion ? [] : RopeRules];
        var model = Presets.V3 with
        {
            NumNextnPredictLayers = mtpNumLayers,
            MtpLossScalingFactor = mtpLossScalingFactor,
        };
        var recipe = Recipe.Default
            .WithName(name)
            .WithParallelism(tensorParallel, pipelineParallel, expertParallel, dataParallel)
            .WithContextParallel(contextParallel)
            .WithExpertTensorParallel(expertTensorParallel)
            .WithSequenceParallel(sequenceParallel)
            .WithDispatcher(dispatcher ?? Dispatcher.AllToAll)
            .WithLayout(layout ?? "")
            .WithBatch(globalBatchSize, microBatchSize, seqLength)
            .WithDType(dtype ?? DType.BFloat16)
            .WithoutFusions(unfused)
            .WithRecompute([.. recompute ?? ["core_attn"]])
            .WithAdam(beta1: 0.9, beta2: 0.95, eps: 1e-5, weightDecay: 0.1, clipNorm: 1)
            .WithStateTypes(states.MainParams, states.MainGrads, states.ExpAvg, states.ExpAvgSq);
        return new NamedRecipe(model, recipe)
        {
            Training = new TrainingSettings
            {
                TrainIters = trainIters,
                Lr = lr,
                MinLr = minLr,
                LrWarmupIters = lrWarmupIters,
                LrDecayIters = lrDecayIters,
                DataPaths = dataPaths ?? [],
                Dir = dir,
            },
        };
    }

    /// The same model on 32 nodes of 8: TP 2, PP 8, EP 32 on 256 accelerators; every layer is computed again.
    public static NamedRecipe Pretrain32Nodes(
        string name = "deepseek_v3_pretrain_32nodes",
        IReadOnlyList<string>? dataPaths = null,
        string? dir = null,
        int trainIters = 1_000_000,
        int globalBatchSize = 4096,
        int seqLength = 4096,
        int mtpNumLayers = 1,
        double mtpLossScalingFactor = 0.1)
        => Pretrain(
            name,
            dataPaths,
            dir,
            trainIters,
            globalBatchSize,
            seqLength: seqLength,
            mtpNumLayers: mtpNumLayers,
            mtpLossScalingFactor: mtpLossScalingFactor,
            pipelineParallel: 8,
            expertParallel: 32,
            recompute: ["full"]);

    /// Every part of the model on eight ranks that two cores can feed; about a minute of training.
    public static NamedRecipe Tiny(string name = "deepseek_v3_tiny", int trainIters = 200) => new(
        Presets.Tiny,
        Recipe.Default
            .WithName(name)
            .WithParallelism(tensor: 2, pipeline: 2, expert: 2, data: 2)
            .WithLayout("Ettt|tmL")
            .WithBatch(globalBatch: 8, microBatch: 1, seqLength: 128))
    {
        Training = new() { TrainIters = trainIters, Lr = 5e-3, MinLr = 5e-4, LrWarmupIters = 20 },
    };

    /// DeepSeek-V3's widths with few layers and experts, bf16, on one accelerator: 10 bytes a parameter; ten steps show whether it runs.
    public static NamedRecipe Proxy(string name = "deepseek_v3_proxy", int trainIters = 10) => new(
        Presets.Proxy,
        Recipe.Default
            .WithName(name)
            .WithParallelism(tensor: 1, pipeline: 1, expert: 1, data: 1)
            .WithBatch(globalBatch: 1, microBatch: 1, seqLength: 4096)
            .WithDType(DType.BFloat16)
            .WithStateTypes(MainParams.Remainder, DType.BFloat16, DType.BFloat16, DType.BFloat16))
    {
        Training = new() { TrainIters = trainIters, Lr = 2.2e-4, MinLr = 2.2e-5 },
    };
}

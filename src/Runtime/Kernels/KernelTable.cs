// The runtime's kernels by id; complete, by test.
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>What the table knows of a kernel: how to run it, and whether its result replaces the slot's storage.</summary>
public sealed record KernelEntry(Kernel Run, bool Adopts);

/// <summary>KernelId -> kernel for the CPU.</summary>
public static class KernelTable
{
    /// <summary>What LibTorch does alike on any device.</summary>
    internal static readonly IReadOnlyDictionary<KernelId, KernelEntry> Either = new Dictionary<KernelId, KernelEntry>
    {
        [KernelId.Full] = Fills(SourceKernels.Full),
        [KernelId.Sub] = Adopts(ElementwiseKernels.Sub),
        [KernelId.Mul] = Adopts(ElementwiseKernels.Mul),
        [KernelId.Div] = Adopts(ElementwiseKernels.Div),
        [KernelId.Neg] = Adopts(ElementwiseKernels.Neg),
        [KernelId.Exp] = Adopts(ElementwiseKernels.Exp),
        [KernelId.Log] = Adopts(ElementwiseKernels.Log),
        [KernelId.Rsqrt] = Adopts(ElementwiseKernels.Rsqrt),
        [KernelId.Sigmoid] = Adopts(ElementwiseKernels.Sigmoid),
        [KernelId.Silu] = Adopts(ElementwiseKernels.Silu),
        [KernelId.Scale] = Adopts(ElementwiseKernels.Scale),
        [KernelId.Offset] = Adopts(ElementwiseKernels.Offset),
        [KernelId.Slice] = Fills(MovementKernels.Slice),
        [KernelId.Pad] = Fills(MovementKernels.Pad),
        [KernelId.Concat] = Fills(MovementKernels.Concat),
        [KernelId.Broadcast] = Fills(MovementKernels.Broadcast),
        [KernelId.Transpose] = Fills(MovementKernels.Transpose),
        [KernelId.Zigzag] = Fills(MovementKernels.Zigzag),
        [KernelId.Sum] = Adopts(ReductionKernels.Sum),
        [KernelId.Max] = Adopts(ReductionKernels.Max),
    };

    private static readonly Dictionary<KernelId, KernelEntry> Entries = new(Either)
    {
        [KernelId.Iota] = Fills(SourceKernels.Iota),
        [KernelId.Add] = Adopts(ElementwiseKernels.Add),
        [KernelId.Cast] = Fills(ElementwiseKernels.Cast),
        [KernelId.LocalSlice] = Fills(MovementKernels.LocalSlice),
        [KernelId.Contract] = Adopts(ContractionKernels.Contract),
        [KernelId.GroupedMatMul] = Fills(GroupedKernels.GroupedMatMul),
        [KernelId.GroupedWeightGrad] = Fills(GroupedKernels.GroupedWeightGrad),
        [KernelId.Fp8Quantize] = Fills(QuantizationKernels.Fp8Quantize),
        [KernelId.RmsNorm] = Fills(NormalizationKernels.RmsNorm),
        [KernelId.RmsNormGradX] = Fills(NormalizationKernels.RmsNormGradX),
        [KernelId.RmsNormGradW] = Fills(NormalizationKernels.RmsNormGradW),
        [KernelId.AddRmsNorm] = Fills(NormalizationKernels.AddRmsNorm),
        [KernelId.RmsNormGradXAdd] = Fills(NormalizationKernels.RmsNormGradXAdd),
        [KernelId.RotaryTable] = Fills(RotaryKernels.RotaryTable),
        [KernelId.Rope] = Fills(RotaryKernels.Rope),
        [KernelId.RopeQ] = Fills(RotaryKernels.RopeQ),
        [KernelId.RopeKv] = Fills(RotaryKernels.RopeKv),
        [KernelId.RopeKvGrad] = Fills(RotaryKernels.RopeKvGrad),
        [KernelId.Attention] = Fills(AttentionKernels.Attention),
        [KernelId.AttentionGrad] = Fills(AttentionKernels.AttentionGrad),
        [KernelId.CacheWrite] = Fills(CacheKernels.CacheWrite),
        [KernelId.CacheAttention] = Fills(CacheKernels.CacheAttention),
        [KernelId.GroupTopK] = Fills(RouterKernels.GroupTopK),
        [KernelId.Router] = Fills(RouterKernels.Router),
        [KernelId.RouterGrad] = Fills(RouterKernels.RouterGrad),
        [KernelId.Balance] = Fills(RouterKernels.Balance),
        [KernelId.BalanceGrad] = Fills(RouterKernels.BalanceGrad),
        [KernelId.Route] = Adopts(RouterKernels.Route),
        [KernelId.Permute] = Fills(PermutationKernels.Permute),
        [KernelId.Unpermute] = Fills(PermutationKernels.Unpermute),
        [KernelId.RouteProbs] = Fills(PermutationKernels.RouteProbs),
        [KernelId.UnrouteProbs] = Fills(PermutationKernels.UnrouteProbs),
        [KernelId.PermuteWithProbs] = Fills(PermutationKernels.PermuteWithProbs),
        [KernelId.UnpermuteWithProbs] = Fills(PermutationKernels.UnpermuteWithProbs),
        [KernelId.PermuteFused] = Fills(PermutationKernels.PermuteFused),
        [KernelId.UnpermuteFused] = Fills(PermutationKernels.UnpermuteFused),
        [KernelId.SwiGlu] = Fills(GatedKernels.SwiGlu),
        [KernelId.SwiGluGrad] = Fills(GatedKernels.SwiGluGrad),
        [KernelId.SwiGluProbs] = Fills(GatedKernels.SwiGluProbs),
        [KernelId.SwiGluProbsGrad] = Fills(GatedKernels.SwiGluProbsGrad),
        [KernelId.Embedding] = Fills(VocabularyKernels.Embedding),
        [KernelId.EmbeddingGrad] = Fills(VocabularyKernels.EmbeddingGrad),
        [KernelId.Pick] = Fills(VocabularyKernels.Pick),
        [KernelId.PickGrad] = Fills(VocabularyKernels.PickGrad),
        [KernelId.LinearLogSumExp] = Fills(HeadKernels.LinearLogSumExp),
        [KernelId.LinearLogSumExpGrad] = Fills(HeadKernels.LinearLogSumExpGrad),
        [KernelId.LinearCrossEntropy] = Fills(CrossEntropyKernels.Loss),
        [KernelId.LinearCrossEntropyGrad] = Fills(CrossEntropyKernels.LossAndGradient),
        [KernelId.Zero] = Fills(StepKernels.Zero),
        [KernelId.Accumulate] = Fills(StepKernels.Accumulate),
        [KernelId.SumSquares] = Fills(StepKernels.SumSquares),
        [KernelId.ClipScale] = Fills(StepKernels.ClipScale),
        [KernelId.AdamW] = Fills(StepKernels.AdamW),
        [KernelId.RouterBias] = Fills(StepKernels.RouterBias),
    };

    /// <summary>The kernels for one CPU core per rank.</summary>
    public static IReadOnlyDictionary<KernelId, KernelEntry> Cpu => Entries;

    /// <summary>Runs one kernel outside a plan; without a device on the processor.</summary>
    public static void Run(
        KernelId id, IReadOnlyList<Attribute> attributes, SlotValue[] inputs, SlotValue[] outputs, RankContext rank, RankDevice? device = null)
    {
        device?.Enter();
        (device ?? RankDevice.Cpu).Kernels[id].Run(new KernelCall(attributes, inputs, outputs, rank));

        // here nobody else may hold the slots: a collected tensor frees memory that native code still reads
        GC.KeepAlive(inputs);
        GC.KeepAlive(outputs);
    }

    internal static KernelEntry Fills(Kernel run) => new(run, false);

    internal static KernelEntry Adopts(Kernel run) => new(run, true);
}

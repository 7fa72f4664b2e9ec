// The hyper-parameters of DeepSeek-V3, under the names of config.json; defaults are the published 671B model's.

namespace DeepSeekGraph.Models;

/// YaRN (arXiv 2309.00071): rotary embedding stretched by `Factor` beyond the context it was trained with.
public sealed record YarnScaling
{
    public double Factor { get; init; } = 40;
    public int OriginalMaxPositionEmbeddings { get; init; } = 4096;
    public double BetaFast { get; init; } = 32;
    public double BetaSlow { get; init; } = 1;
    public double Mscale { get; init; } = 1;
    public double MscaleAllDim { get; init; } = 1;

    /// Growth of attention's temperature with the context: 1 for factors up to 1.
    public static double Temperature(double factor, double mscale)
        => factor <= 1 ? 1 : (0.1 * mscale * Math.Log(factor)) + 1;
}

/// What turns a router's logits into scores: each by itself, or over all experts.
public enum ScoringFunc
{
    Sigmoid,
    Softmax,
}

/// How experts are chosen by score.
public enum TopkMethod
{
    /// By score plus a correction bias, among the groups with the largest sums of two best (DeepSeek-V3).
    NoauxTc,

    /// By score, among the groups with the largest scores (DeepSeek-V2).
    GroupLimitedGreedy,

    /// By score, among all (DeepSeek-V2-Lite).
    Greedy,
}

/// arXiv 2412.19437, section 4.2, and config.json of the published checkpoint.
public sealed record DeepSeekV3Config
{
    public int VocabSize { get; init; } = 129_280;
    public int HiddenSize { get; init; } = 7168;
    public int NumHiddenLayers { get; init; } = 61;
    public double RmsNormEps { get; init; } = 1e-6;
    public double InitializerRange { get; init; } = 0.006;

    // Multi-head latent attention.
    public int NumAttentionHeads { get; init; } = 128;
    /// Zero: queries come straight from the hidden state, without a latent.
    public int QLoraRank { get; init; } = 1536;
    public int KvLoraRank { get; init; } = 512;
    public int QkNopeHeadDim { get; init; } = 128;
    public int QkRopeHeadDim { get; init; } = 64;
    public int VHeadDim { get; init; } = 128;
    public double RopeTheta { get; init; } = 10_000;
    /// Null: plain rotary embedding.
    public YarnScaling? RopeScaling { get; init; } = new();

    // Feed-forward: the first layers are dense, the others mixtures of experts.
    public int IntermediateSize { get; init; } = 18_432;
    public int FirstKDenseReplace { get; init; } = 3;
    public int MoeIntermediateSize { get; init; } = 2048;
    public int NSharedExperts { get; init; } = 1;
    public int NRoutedExperts { get; init; } = 256;
    public int NumExpertsPerTok { get; init; } = 8;
    public ScoringFunc ScoringFunc { get; init; } = ScoringFunc.Sigmoid;
    public TopkMethod TopkMethod { get; init; } = TopkMethod.NoauxTc;
    public int NGroup { get; init; } = 8;
    public int TopkGroup { get; init; } = 4;
    public bool NormTopkProb { get; init; } = true;
    public double RoutedScalingFactor { get; init; } = 2.5;

    /// Speed of the router's bias (gamma of the paper).
    public double BiasUpdateSpeed { get; init; } = 0.001;

    /// Weight of the sequence-wise balance loss (alpha of the paper); zero: none.
    public double SeqAuxLossAlpha { get; init; } = 1e-4;

    /// Groups that were not selected score zero, as Hugging Face computes it, instead of minus infinity.
    public bool ZeroMaskedGroups { get; init; }

    // Multi-token prediction.
    public int NumNextnPredictLayers { get; init; } = 1;
    /// Weight of the extra losses (lambda of the paper), shared by all depths.
    public double MtpLossScalingFactor { get; init; } = 0.1;

    /// Features of a query or key head.
    public int QkHeadDim => QkNopeHeadDim + QkRopeHeadDim;

    /// 1/sqrt(qk_dim), times the square of YaRN's temperature.
    public double SoftmaxScale
    {
        get
        {
            var temperature = RopeScaling is { } yarn ? YarnScaling.Temperature(yarn.Factor, yarn.MscaleAllDim) : 1;
            return temperature * temperature / Math.Sqrt(QkHeadDim);
        }
    }

    /// The rotation of the rope features.
    public RotarySpec Rotary => RopeScaling is { } yarn
        ? new(
            dim: QkRopeHeadDim,
            theta: RopeTheta,
            factor: yarn.Factor,
            original: yarn.OriginalMaxPositionEmbeddings,
            betaFast: yarn.BetaFast,
            betaSlow: yarn.BetaSlow,
            mscale: YarnScaling.Temperature(yarn.Factor, yarn.Mscale)
                / YarnScaling.Temperature(yarn.Factor, yarn.MscaleAllDim))
        : new(QkRopeHeadDim, RopeTheta, factor: 1, original: 4096, betaFast: 32, betaSlow: 1, mscale: 1);

    /// The same with another weight of the extra losses.
    public DeepSeekV3Config WithMtpLossScalingFactor(double factor) => this with { MtpLossScalingFactor = factor };

    /// The same without multi-token prediction.
    public DeepSeekV3Config WithoutMtp() => this with { NumNextnPredictLayers = 0 };

    /// The same, choosing experts exactly as Hugging Face's transformers does, which knows no balance loss.
    public DeepSeekV3Config LikeHuggingFace() => this with { ZeroMaskedGroups = true, SeqAuxLossAlpha = 0 };

    /// Which experts a token goes to.
    public TopKSpec TopK => TopkMethod switch
    {
        TopkMethod.NoauxTc => new(NumExpertsPerTok, NGroup, TopkGroup, ZeroMaskedGroups, GroupScore.BestTwo),
        TopkMethod.GroupLimitedGreedy => new(NumExpertsPerTok, NGroup, TopkGroup, ZeroMaskedGroups, GroupScore.Best),
        TopkMethod.Greedy => new(NumExpertsPerTok, groups: 1, keepGroups: 1, zeroMasked: false, GroupScore.Best),
        _ => throw new InvalidOperationException($"no way to choose experts is called {TopkMethod}"),
    };

    /// Weights of a token's experts are divided by their sum. DeepSeek-V2 leaves a single one as it is.
    public bool NormalizesWeights
        => NormTopkProb && (TopkMethod == TopkMethod.NoauxTc || NumExpertsPerTok > 1);

    /// What multiplies the weights. The published code of DeepSeek-V2 either normalises or scales, that of V3 does both.
    public double WeightFactor
        => TopkMethod != TopkMethod.NoauxTc && NormalizesWeights ? 1 : RoutedScalingFactor;

    /// Is layer `index` a mixture of experts?
    public bool IsSparse(int index) => index >= FirstKDenseReplace;
}

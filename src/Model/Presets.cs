// Named configurations: tiny for a laptop, proxy for one GPU, v3 for the cluster.

namespace DeepSeekGraph.Models;

/// Sizes that are known by name.
public static class Presets
{
    /// Every part of DeepSeek-V3 at byte-level vocabulary; all that is split divides by 4.
    public static DeepSeekV3Config Tiny { get; } = new()
    {
        VocabSize = 256,
        HiddenSize = 128,
        NumHiddenLayers = 4,
        InitializerRange = 0.03,
        NumAttentionHeads = 4,
        QLoraRank = 64,
        KvLoraRank = 32,
        QkNopeHeadDim = 32,
        QkRopeHeadDim = 16,
        VHeadDim = 32,
        RopeScaling = new() { Factor = 4, OriginalMaxPositionEmbeddings = 64 },
        IntermediateSize = 256,
        FirstKDenseReplace = 1,
        MoeIntermediateSize = 64,
        NRoutedExperts = 16,
        NumExpertsPerTok = 4,
        NGroup = 4,
        TopkGroup = 2,
        NumNextnPredictLayers = 1,
    };

    /// DeepSeek-V3's widths, few layers and experts: what one accelerator holds.
    public static DeepSeekV3Config Proxy { get; } = new()
    {
        VocabSize = 32_768,
        NumHiddenLayers = 4,
        FirstKDenseReplace = 1,
        NRoutedExperts = 32,
        NumNextnPredictLayers = 0,
    };

    /// DeepSeek-V3, 671B parameters, one depth of multi-token prediction.
    public static DeepSeekV3Config V3 { get; } = new();

    /// Preset by name; DSG0706 lists the names for any other.
    public static DeepSeekV3Config Named(string name) => name switch
    {
        "tiny" => Tiny,
        "proxy" => Proxy,
        "v3" => V3,
        _ => throw DiagnosticException.Of(
            Codes.UnknownModel, "model", $"there is no model '{name}'", "choose from tiny proxy v3"),
    };
}

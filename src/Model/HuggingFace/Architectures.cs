// The published architectures that are read: what config.json calls them, and what it leaves unsaid for each.

namespace DeepSeekGraph.Models.HuggingFace;

/// A model_type of config.json with the defaults of its configuration class, and checkpoints that have it.
internal sealed record Architecture(
    string ModelType, string Checkpoints, ScoringFunc ScoringFunc, TopkMethod TopkMethod, bool NormTopkProb);

public static partial class ConfigJson
{
    private static class Architectures
    {
        public static IReadOnlyList<Architecture> All { get; } =
        [
            new("deepseek_v3", "DeepSeek-V3, V3-Base, R1, Moonlight", ScoringFunc.Sigmoid, TopkMethod.NoauxTc, true),
            new("deepseek_v2", "DeepSeek-V2, V2-Lite", ScoringFunc.Softmax, TopkMethod.Greedy, false),
            new("kimi_k2", "Kimi-K2", ScoringFunc.Sigmoid, TopkMethod.NoauxTc, true),
        ];

        /// What may be given instead.
        public static string Help
            => "give a checkpoint of a supported architecture: "
                + string.Join("; ", All.Select(a => $"{a.ModelType} ({a.Checkpoints})"));

        // Kimi-K2 says DeepseekV3ForCausalLM, or its own name.
        private static readonly string[] Classes = ["DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM", "KimiK2ForCausalLM"];

        /// By model_type; a file that has none is of DeepSeek-V3. DSG0703 for any other, and for a class of another kind.
        public static Architecture Of(Reader r)
        {
            foreach (var name in r.Texts("architectures").Where(name => !Classes.Contains(name)))
                r.Refuse("architectures", $"the architecture is \"{name}\"", Help);

            var type = r.Text("model_type", All[0].ModelType);
            if (All.FirstOrDefault(a => a.ModelType == type) is { } known)
                return known;
            r.Refuse("model_type", $"model_type is \"{type}\"", Help);
            return All[0];
        }
    }
}

// Reads config.json, in the published style and in that of transformers 5, into DeepSeekV3Config.

using System.Text.Json;

namespace DeepSeekGraph.Models.HuggingFace;

/// config.json of a checkpoint. Mistakes are collected: DSG0702, DSG0703, then DSG0701.
public static partial class ConfigJson
{
    private const long MostBytes = 1 << 20;

    /// Reads the file, or config.json in the folder, at `path`.
    public static DeepSeekV3Config Read(string path)
    {
        var file = Directory.Exists(path) ? Path.Combine(path, "config.json") : path;
        try
        {
            if (new FileInfo(file).Length > MostBytes)
                throw Unreadable(file, $"the file is larger than {MostBytes} bytes");

            return Parse(File.ReadAllText(file), file);
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException or ArgumentException)
        {
            throw Unreadable(file, e.Message);
        }
    }

    /// Reads the text of a config.json; `source` names it in messages.
    public static DeepSeekV3Config Parse(string json, string source = "config.json")
    {
        try
        {
            using var document = JsonDocument.Parse(json);
            if (document.RootElement.ValueKind != JsonValueKind.Object)
                throw Unreadable(source, "the text is no JSON object");

            var reader = new Reader(document.RootElement, source);
            var config = Convert(reader);
            if (reader.Mistakes.Count > 0)
                throw new DiagnosticException(reader.Mistakes);

            var illegal = ConfigCheck.Check(config, source);
            return illegal.Count == 0 ? config : throw new DiagnosticException(illegal);
        }
        catch (JsonException e)
        {
            throw Unreadable(source, e.Message);
        }
    }

    private static DeepSeekV3Config Convert(Reader r)
    {
        var family = Architectures.Of(r);

        // what these models do not have, with the value that means "without"
        r.MustBe("hidden_act", "silu");
        r.MustBe("attention_bias", false);
        r.MustBe("mlp_bias", false);
        r.MustBe("tie_word_embeddings", false);
        r.MustBe("rope_interleave", true);
        r.MustBe("moe_layer_freq", 1);
        var heads = r.Int("num_attention_heads");
        r.MustBe("num_key_value_heads", heads);
        Quantization(r.In("quantization_config"));

        var defaults = new DeepSeekV3Config();
        return new DeepSeekV3Config
        {
            VocabSize = r.Int("vocab_size"),
            HiddenSize = r.Int("hidden_size"),
            NumHiddenLayers = r.Int("num_hidden_layers"),
            RmsNormEps = r.Number("rms_norm_eps", defaults.RmsNormEps),
            InitializerRange = r.Number("initializer_range", 0.02),
            NumAttentionHeads = heads,
            QLoraRank = r.Int("q_lora_rank", 0),
            KvLoraRank = r.Int("kv_lora_rank"),
            QkNopeHeadDim = r.Int("qk_nope_head_dim"),
            QkRopeHeadDim = r.Int("qk_rope_head_dim"),
            VHeadDim = r.Int("v_head_dim"),
            RopeTheta = r.In("rope_parameters").Number("rope_theta", r.Number("rope_theta", 10_000)),
            RopeScaling = Scaling(r),
            IntermediateSize = r.Int("intermediate_size"),
            FirstKDenseReplace = r.Int("first_k_dense_replace"),
            MoeIntermediateSize = r.Int("moe_intermediate_size"),
            NSharedExperts = r.Int("n_shared_experts", 0),
            NRoutedExperts = r.Int("n_routed_experts"),
            NumExpertsPerTok = r.Int("num_experts_per_tok"),
            ScoringFunc = r.Choice("scoring_func", family.ScoringFunc),
            TopkMethod = r.Choice("topk_method", family.TopkMethod),
            NGroup = r.Int("n_group", 1),
            TopkGroup = r.Int("topk_group", 1),
            NormTopkProb = r.Flag("norm_topk_prob", family.NormTopkProb),
            RoutedScalingFactor = r.Number("routed_scaling_factor", 1),
            NumNextnPredictLayers = r.Int("num_nextn_predict_layers", 0),
        };
    }

    /// rope_parameters (transformers 5) or rope_scaling (published); type "default" or null is plain rotary embedding.
    private static YarnScaling? Scaling(Reader root)
    {
        var r = root.Has("rope_parameters") ? root.In("rope_parameters") : root.In("rope_scaling");
        var type = r.Text("rope_type", r.Text("type", "default"));
        if (type == "default")
            return null;

        r.MustBe(r.Has("rope_type") ? "rope_type" : "type", "yarn");
        return new YarnScaling
        {
            Factor = r.Number("factor", 1),
            OriginalMaxPositionEmbeddings = r.Int("original_max_position_embeddings", 4096),
            BetaFast = r.Number("beta_fast", 32),
            BetaSlow = r.Number("beta_slow", 1),
            Mscale = r.Number("mscale", 1),
            MscaleAllDim = r.Number("mscale_all_dim", 0),
        };
    }

    /// Weights as they are, or E4M3 in blocks of 128 x 128 as DeepSeek publishes them; no other quantisation is read.
    private static void Quantization(Reader r)
    {
        r.MustBe("quant_method", "fp8");
        r.MustBe("fmt", "e4m3");
        r.MustBe("weight_block_size", (int[])[128, 128]);
    }

    private static DiagnosticException Unreadable(string source, string why)
        => DiagnosticException.Of(
            Codes.ConfigUnreadable,
            source,
            $"the configuration cannot be read: {why}",
            "give a checkpoint's config.json, or the folder that holds it");

    /// Fields of one JSON object; null counts as absent. A mistake is recorded and yields the default.
    private sealed class Reader(JsonElement element, string source)
    {
        public List<Diagnostic> Mistakes { get; private init; } = [];

        public bool Has(string name) => Find(name) is not null;

        public Reader In(string name)
            => Find(name) switch
            {
                { ValueKind: JsonValueKind.Object } inner => Nested(inner, name),
                null => Nested(default, name),
                { } other => Nested(Wrong<JsonElement>(name, other, "an object", default), name),
            };

        public int Int(string name, int? absent = null)
            => Find(name) switch
            {
                { ValueKind: JsonValueKind.Number } e when e.TryGetInt32(out var value) => value,
                null when absent is { } value => value,
                null => Missing(name),
                { } other => Wrong(name, other, "a whole number", absent ?? 1),
            };

        public double Number(string name, double absent)
            => Find(name) switch
            {
                { ValueKind: JsonValueKind.Number } e => e.GetDouble(),
                null => absent,
                { } other => Wrong(name, other, "a number", absent),
            };

        public bool Flag(string name, bool absent)
            => Find(name) switch
            {
                { ValueKind: JsonValueKind.True or JsonValueKind.False } e => e.GetBoolean(),
                null => absent,
                { } other => Wrong(name, other, "true or false", absent),
            };

        public string Text(string name, string absent)
            => Find(name) switch
            {
                { ValueKind: JsonValueKind.String } e => e.GetString() ?? absent,
                null => absent,
                { } other => Wrong(name, other, "a string", absent),
            };

        /// The texts of an array; none where it is absent.
        public IReadOnlyList<string> Texts(string name)
            => Find(name) switch
            {
                { ValueKind: JsonValueKind.Array } e when e.EnumerateArray().All(item => item.ValueKind == JsonValueKind.String)
                    => [.. e.EnumerateArray().Select(item => item.GetString()!)],
                null => [],
                { } other => Wrong<IReadOnlyList<string>>(name, other, "an array of strings", []),
            };

        /// One of an enumeration's names as config.json writes them; another is DSG0703.
        public T Choice<T>(string name, T absent)
            where T : struct, Enum
        {
            var names = Enum.GetNames<T>().Select(RecordFields.Snake).ToArray();
            var given = Text(name, RecordFields.Snake(absent.ToString()));
            var at = Array.IndexOf(names, given);
            if (at >= 0)
                return Enum.GetValues<T>()[at];
            Refuse(name, $"{name} is \"{Clip(given)}\"", $"supported are {string.Join(", ", names)}");
            return absent;
        }

        /// Any other value than the one supported is DSG0703.
        public void MustBe(string name, object supported)
        {
            if (Find(name) is not { } e)
                return;

            var wanted = JsonSerializer.SerializeToElement(supported);
            if (!JsonElement.DeepEquals(e, wanted))
                Refuse(name, $"{name} is {Short(e)}, only {wanted.GetRawText()} is supported", Architectures.Help);
        }

        public void Refuse(string name, string message, string help)
            => Mistakes.Add(new Diagnostic(Codes.ConfigUnsupported, $"{source}, {name}", message, help));

        private JsonElement? Find(string name)
            => element.ValueKind == JsonValueKind.Object
                && element.TryGetProperty(name, out var found)
                && found.ValueKind != JsonValueKind.Null
                    ? found
                    : null;

        private Reader Nested(JsonElement inner, string name) => new(inner, $"{source}, {name}") { Mistakes = Mistakes };

        private int Missing(string name)
        {
            Mistakes.Add(new Diagnostic(
                Codes.ConfigUnreadable, $"{source}, {name}", $"{name} is missing", "add it, a whole number"));
            return 1;
        }

        private T Wrong<T>(string name, JsonElement found, string wanted, T instead)
        {
            Mistakes.Add(new Diagnostic(
                Codes.ConfigUnreadable, $"{source}, {name}", $"{name} is {Short(found)}, not {wanted}", $"give {wanted}"));
            return instead;
        }

        private static string Short(JsonElement e) => Clip(e.GetRawText());

        private static string Clip(string text) => text.Length > 60 ? text[..57] + "..." : text;
    }
}

// tokenizer_config.json and generation_config.json: which tokens begin and end a text, and the chat template.

using System.Text.Json;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// What lies beside tokenizer.json; a file or field that is not there is no token and no template.
internal sealed record TokenizerConfig
{
    public const string FileName = "tokenizer_config.json";
    public const string GenerationFile = "generation_config.json";

    private const long MostBytes = 8 << 20;
    private const int MostTemplate = 1 << 20;
    private const int MostEnds = 64;

    public bool AddBos { get; init; }

    public bool AddEos { get; init; }

    /// Texts of the tokens.
    public string? Bos { get; init; }

    public string? Eos { get; init; }

    public string? Pad { get; init; }

    /// Jinja source, to be recognised, never to be run.
    public string? ChatTemplate { get; init; }

    /// eos_token_id of generation_config.json.
    public IReadOnlyList<int> Ends { get; init; } = [];

    /// The files of a folder, as far as they are there.
    public static TokenizerConfig Read(string folder)
    {
        var config = new TokenizerConfig();
        var path = Path.Combine(folder, FileName);
        if (File.Exists(path))
        {
            using var document = JsonField.Open(path, MostBytes);
            var root = new JsonField(path, "", document.RootElement);
            config = new TokenizerConfig
            {
                AddBos = !root["add_bos_token"].IsNull && root["add_bos_token"].Bool(),
                AddEos = !root["add_eos_token"].IsNull && root["add_eos_token"].Bool(),
                Bos = Token(root["bos_token"]),
                Eos = Token(root["eos_token"]),
                Pad = Token(root["pad_token"]),
                ChatTemplate = Template(root["chat_template"]),
            };
        }

        path = Path.Combine(folder, GenerationFile);
        if (!File.Exists(path))
            return config;
        using var generation = JsonField.Open(path, MostBytes);
        var ends = new JsonField(path, "", generation.RootElement)["eos_token_id"];
        return ends.IsNull ? config : config with
        {
            Ends = ends.Value.ValueKind == JsonValueKind.Array
                ? [.. ends.Items(MostEnds).Select(id => id.Number(TokenizerJson.MostTokens))]
                : [ends.Number(TokenizerJson.MostTokens)],
        };
    }

    /// A token is its text, or an object with its text.
    private static string? Token(JsonField field)
        => field.IsNull ? null
            : (field.Value.ValueKind == JsonValueKind.Object ? field["content"] : field).Text(TokenizerJson.MostCharacters);

    /// One template, or several with names: then the one named default.
    private static string? Template(JsonField field)
        => field.IsNull ? null
            : field.Value.ValueKind != JsonValueKind.Array ? field.Text(MostTemplate)
            : field.Items(MostEnds)
                .Where(item => item["name"].Text(TokenizerJson.MostCharacters) == "default")
                .Select(item => item["template"].Text(MostTemplate))
                .FirstOrDefault();
}

// The byte-level tokenizer as the files of Hugging Face, for models that were trained on bytes.

using System.Text.Json;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// A token is a byte and its id the byte's value, with DeepSeek-V3's splits, which change nothing without merges.
public static class ByteTokenizerFiles
{
    private static readonly JsonSerializerOptions s_plain = new() { WriteIndented = true };

    /// tokenizer.json, tokenizer_config.json and generation_config.json; the separator of documents ends a text.
    public static IReadOnlyList<(string Name, byte[] Bytes)> All { get; } =
    [
        (TokenizerJson.FileName, JsonSerializer.SerializeToUtf8Bytes(Tokenizer(), s_plain)),
        (TokenizerConfig.FileName, JsonSerializer.SerializeToUtf8Bytes(
            new Dictionary<string, object?>
            {
                ["add_bos_token"] = false,
                ["add_eos_token"] = false,
                ["clean_up_tokenization_spaces"] = false,
                ["tokenizer_class"] = "PreTrainedTokenizerFast",
            },
            s_plain)),
        (TokenizerConfig.GenerationFile, JsonSerializer.SerializeToUtf8Bytes(
            new Dictionary<string, object?> { ["eos_token_id"] = ByteTokenizer.Instance.Separator }, s_plain)),
    ];

    private static Dictionary<string, object?> Tokenizer()
    {
        object ByteLevel() => new Dictionary<string, object?>
        {
            ["type"] = "ByteLevel",
            ["add_prefix_space"] = false,
            ["trim_offsets"] = true,
            ["use_regex"] = false,
        };

        var splits = DeepSeekPieces.Patterns.Select(pattern => (object)new Dictionary<string, object?>
        {
            ["type"] = "Split",
            ["pattern"] = new Dictionary<string, string> { ["Regex"] = pattern },
            ["behavior"] = "Isolated",
            ["invert"] = false,
        });
        return new Dictionary<string, object?>
        {
            ["version"] = "1.0",
            ["truncation"] = null,
            ["padding"] = null,
            ["added_tokens"] = Array.Empty<object>(),
            ["normalizer"] = null,
            ["pre_tokenizer"] = new Dictionary<string, object?>
            {
                ["type"] = "Sequence",
                ["pretokenizers"] = splits.Append(ByteLevel()).ToArray(),
            },
            ["post_processor"] = null,
            ["decoder"] = ByteLevel(),
            ["model"] = new Dictionary<string, object?>
            {
                ["type"] = "BPE",
                ["dropout"] = null,
                ["unk_token"] = null,
                ["continuing_subword_prefix"] = null,
                ["end_of_word_suffix"] = null,
                ["fuse_unk"] = false,
                ["byte_fallback"] = false,
                ["vocab"] = Enumerable.Range(0, 256).ToDictionary(b => ByteAlphabet.CharOf((byte)b).ToString(), b => b),
                ["merges"] = Array.Empty<string>(),
            },
        };
    }
}

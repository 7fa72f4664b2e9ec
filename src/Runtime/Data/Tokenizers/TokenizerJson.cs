// tokenizer.json of Hugging Face: byte-level BPE with DeepSeek-V3's pre-tokenizer, checked whole before it is used.

using System.Text.Json;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// What a tokenizer is made of: ids by token, merges by rank, and tokens cut out beforehand. Every merge joins two tokens to
/// a third, every byte has a token, and every id is one token. DSG0830 to DSG0832 otherwise.
internal sealed record TokenizerJson(
    IReadOnlyDictionary<string, int> Vocabulary,
    IReadOnlyList<(string Left, string Right)> Merges,
    IReadOnlyList<AddedToken> Added)
{
    /// The name that Hugging Face gives it.
    public const string FileName = "tokenizer.json";

    /// Bytes of the largest file that is read: four times DeepSeek-V3's.
    public const long MostBytes = 32 << 20;

    /// Ids, tokens and merges are at most so many.
    public const int MostTokens = 1 << 20;

    /// Characters of the longest token.
    public const int MostCharacters = 4096;

    /// Ids are below this.
    public int Size => Math.Max(
        Vocabulary.Count == 0 ? 0 : Vocabulary.Values.Max(), Added.Count == 0 ? 0 : Added.Max(token => token.Id)) + 1;

    public static TokenizerJson Read(string path)
    {
        using var document = JsonField.Open(path, MostBytes);
        var root = new JsonField(path, "", document.RootElement);
        var model = root["model"];
        RefuseOtherKinds(root, model);
        var added = ReadAdded(root["added_tokens"]);
        var vocabulary = ReadVocabulary(model["vocab"]);
        CheckIds(root["added_tokens"], vocabulary, added);
        CheckBytes(model["vocab"], vocabulary);
        return new TokenizerJson(vocabulary, ReadMerges(model["merges"], vocabulary), added);
    }

    private static void RefuseOtherKinds(JsonField root, JsonField model)
    {
        RequireType(model["type"], "BPE");
        foreach (var name in (string[])["dropout", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"])
            model[name].RequireNothing("null or false");
        foreach (var name in (string[])["continuing_subword_prefix", "end_of_word_suffix"])
        {
            if (model[name].Shown() != "\"\"")
                model[name].RequireNothing("null or empty");
        }

        root["truncation"].RequireNothing("null");
        root["padding"].RequireNothing("null");
        if (root["normalizer"] is { IsNull: false } normalizer
            && (RequireType(normalizer["type"], "Sequence") && normalizer["normalizers"].Items(MostTokens).Any()))
            throw normalizer.Unsupported("no normalizer, or an empty sequence");
        if (root["post_processor"] is { IsNull: false } post)
            RequireType(post["type"], "ByteLevel");
        RequireType(root["decoder"]["type"], "ByteLevel");

        var cuts = root["pre_tokenizer"];
        RequireType(cuts["type"], "Sequence");
        var items = cuts["pretokenizers"].Items(MostTokens).ToList();
        var splits = items.SkipLast(1).ToList();
        var known = splits.Count == DeepSeekPieces.Patterns.Count && splits.Zip(DeepSeekPieces.Patterns).All(pair =>
            Is(pair.First["type"], "Split")
            && Is(pair.First["behavior"], "Isolated")
            && (pair.First["invert"].IsNull || !pair.First["invert"].Bool())
            && pair.First["pattern"].Value.ValueKind == JsonValueKind.Object
            && Is(pair.First["pattern"]["Regex"], pair.Second));
        if (!known)
            throw cuts.Unsupported("the three splits of DeepSeek-V3, then ByteLevel; other patterns are not run");
        RequireType(items[^1]["type"], "ByteLevel");
        items[^1]["add_prefix_space"].RequireNothing("false");
        items[^1]["use_regex"].RequireNothing("false");
        if (items[^1]["use_regex"].IsNull || items[^1]["add_prefix_space"].IsNull)
            throw items[^1].Unsupported("add_prefix_space and use_regex false; both are true where they are not given");
    }

    private static bool Is(JsonField field, string text)
        => field.Value.ValueKind == JsonValueKind.String && field.Text(MostCharacters) == text;

    private static bool RequireType(JsonField type, string wanted) => Is(type, wanted) ? true : throw type.Unsupported(wanted);

    private static List<AddedToken> ReadAdded(JsonField field)
    {
        var tokens = new List<AddedToken>();
        foreach (var item in field.IsNull ? [] : field.Items(MostTokens))
        {
            foreach (var name in (string[])["single_word", "lstrip", "rstrip"])
                item[name].RequireNothing("false");
            tokens.Add(new AddedToken(
                item["id"].Number(MostTokens),
                item["content"].Text(MostCharacters),
                !item["special"].IsNull && item["special"].Bool())
            {
                Normalized = !item["normalized"].IsNull && item["normalized"].Bool(),
            });
        }

        return tokens;
    }

    private static Dictionary<string, int> ReadVocabulary(JsonField field)
    {
        field.Require(JsonValueKind.Object, "an object");
        var count = field.Value.GetPropertyCount();
        if (count > MostTokens)
            throw field.Malformed($"has {count} tokens, at most {MostTokens} are read");
        var vocabulary = new Dictionary<string, int>(count, StringComparer.Ordinal);
        try
        {
            foreach (var property in field.Value.EnumerateObject())
            {
                var token = property.Name;
                if (token.Length is 0 or > MostCharacters)
                    throw field.Malformed($"has a token of {token.Length} characters, 1 to {MostCharacters} are read");
                vocabulary.Add(token, new JsonField(field.File, field.Place, property.Value).Number(MostTokens));
            }
        }
        catch (InvalidOperationException)
        {
            throw field.Malformed("has a token with half of a surrogate pair");
        }

        return vocabulary;
    }

    /// An id is one token, and a token one id; added tokens may stand in the vocabulary too.
    private static void CheckIds(JsonField added, Dictionary<string, int> vocabulary, List<AddedToken> tokens)
    {
        var contents = new Dictionary<int, string>();
        foreach (var (content, id) in vocabulary.Select(pair => (pair.Key, pair.Value)).Concat(tokens.Select(t => (t.Content, t.Id))))
        {
            if (!contents.TryAdd(id, content) && contents[id] != content)
                throw added.Malformed($"and the vocabulary give the id {id} to two tokens");
        }

        var names = new HashSet<string>(StringComparer.Ordinal);
        foreach (var token in tokens)
        {
            if (!names.Add(token.Content) || (vocabulary.TryGetValue(token.Content, out var id) && id != token.Id))
                throw added.Malformed($"give the token of id {token.Id} a second time");
        }
    }

    private static void CheckBytes(JsonField field, Dictionary<string, int> vocabulary)
    {
        for (var b = 0; b < 256; b++)
        {
            if (!vocabulary.ContainsKey(ByteAlphabet.CharOf((byte)b).ToString()))
                throw field.Malformed($"has no token for the byte {b}");
        }
    }

    /// A merge is "left right", or since version 0.20 of Hugging Face's library ["left", "right"].
    private static List<(string Left, string Right)> ReadMerges(JsonField field, Dictionary<string, int> vocabulary)
    {
        var merges = new List<(string Left, string Right)>();
        var seen = new HashSet<(string, string)>();
        foreach (var item in field.Items(MostTokens))
        {
            string[] parts = item.Value.ValueKind == JsonValueKind.Array
                ? [.. item.Items(2).Select(part => part.Text(MostCharacters))]
                : item.Text(2 * MostCharacters).Split(' ');
            if (parts is not [var left, var right] || left.Length == 0 || right.Length == 0)
                throw item.Malformed($"is {item.Shown()}, not two tokens");
            if (!vocabulary.ContainsKey(left) || !vocabulary.ContainsKey(right) || !vocabulary.ContainsKey(left + right))
                throw item.Malformed($"is {item.Shown()}, of which both parts and the whole must be in the vocabulary");
            if (!seen.Add((left, right)))
                throw item.Malformed($"is {item.Shown()}, which came before");
            merges.Add((left, right));
        }

        return merges;
    }
}

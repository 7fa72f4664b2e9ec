// The tokenizer of a Hugging Face checkpoint: byte-level BPE through Microsoft.ML.Tokenizers, exact for DeepSeek-V3.

using System.Text;
using Microsoft.ML.Tokenizers;

namespace DeepSeekGraph.Runtime.Data.Tokenizers;

/// Loaded from tokenizer.json and the configuration beside it. Text with half of a surrogate pair is read as U+FFFD there.
/// Any number of threads may use it.
public sealed class HuggingFaceTokenizer : ITokenizer
{
    /// Longer pieces are merged by LongPieces: the package takes 2 us a character here, and 5 s for a piece of 100,000.
    private const int MostCharacters = 512;

    private readonly BpeTokenizer _bpe;
    private readonly Lazy<LongPieces> _long;
    private readonly AddedTokens _plain;
    private readonly AddedTokens _normalized;
    private readonly byte[]?[] _bytes;
    private readonly bool[] _special;
    private readonly string? _chatTemplate;

    private HuggingFaceTokenizer(string path, TokenizerJson json, TokenizerConfig config)
    {
        Path = path;
        Vocabulary = json.Size;
        Added = json.Added;
        AddsBos = config.AddBos;
        AddsEos = config.AddEos;
        _chatTemplate = config.ChatTemplate;
        _bytes = new byte[]?[Vocabulary];
        _special = new bool[Vocabulary];
        foreach (var (token, id) in json.Vocabulary)
            _bytes[id] = ByteAlphabet.BytesOf(token);
        foreach (var token in json.Added)
            (_bytes[token.Id], _special[token.Id]) = (ByteAlphabet.BytesOf(token.Content), token.Special);

        _plain = new AddedTokens(json.Added.Where(token => !token.Normalized));
        _normalized = new AddedTokens(json.Added.Where(token => token.Normalized));
        _long = new(() => new LongPieces(json.Vocabulary, json.Merges));
        _bpe = BpeTokenizer.Create(new BpeOptions(json.Vocabulary)
        {
            Merges = json.Merges.Select(merge => $"{merge.Left} {merge.Right}"),
            ByteLevel = true,
        });
        Bos = IdOf(json, config.Bos, "bos_token");
        Eos = IdOf(json, config.Eos, "eos_token");
        Pad = IdOf(json, config.Pad, "pad_token");
        if (AddsBos && Bos is null)
            throw Config("'add_bos_token' is true, but there is no bos_token");
        if (AddsEos && Eos is null)
            throw Config("'add_eos_token' is true, but there is no eos_token");
        if (config.Ends.FirstOrDefault(id => id >= Vocabulary || _bytes[id] is null, -1) is >= 0 and var end)
            throw Config($"'eos_token_id' of {TokenizerConfig.GenerationFile} is {end}, which is no token");
        Ends = [.. config.Ends.Concat(Eos is { } eos ? [eos] : Array.Empty<int>()).Distinct().Order()];
    }

    /// tokenizer.json, as found.
    public string Path { get; }

    public string Name => Path;

    /// Ids are below this; some of them may be no token.
    public int Vocabulary { get; }

    /// Begins a text, if the checkpoint has such a token.
    public int? Bos { get; }

    /// Ends a text.
    public int? Eos { get; }

    public int? Pad { get; }

    /// add_bos_token and add_eos_token: whether Encode puts them around a text.
    public bool AddsBos { get; }

    public bool AddsEos { get; }

    /// Ids at which generation stops: eos_token, and eos_token_id of generation_config.json.
    public IReadOnlyList<int> Ends { get; }

    /// Tokens that are one id wherever their text stands.
    public IReadOnlyList<AddedToken> Added { get; }

    /// eos_token, which packed training data has behind each document; DSG0831 where there is none.
    public int Separator => Eos ?? throw Config("there is no eos_token, which separates documents");

    /// Reads tokenizer.json, or that of a folder, with tokenizer_config.json and generation_config.json beside it.
    /// DSG0830 when it cannot be read, DSG0831 when it is damaged, DSG0832 when it is of a kind that is not supported.
    public static HuggingFaceTokenizer Load(string path)
    {
        var file = Directory.Exists(path) ? System.IO.Path.Combine(path, TokenizerJson.FileName) : path;
        var json = TokenizerJson.Read(file);
        return new(file, json, TokenizerConfig.Read(System.IO.Path.GetDirectoryName(System.IO.Path.GetFullPath(file))!));
    }

    /// The ids of a text as Hugging Face gives them: added tokens in the text are recognised, whoever wrote it;
    /// bos and eos around it where the configuration says so, unless `addSpecialTokens` is false.
    public int[] Encode(string text, bool addSpecialTokens = true)
    {
        var ids = new List<int>((text.Length / 3) + 2);
        if (addSpecialTokens && AddsBos)
            ids.Add(Bos!.Value);
        text = Whole(text);
        Cut(text, 0, text.Length, _plain, ids, (from, to) => Cut(text, from, to, _normalized, ids, (a, b) => Pieces(text, a, b, ids)));
        if (addSpecialTokens && AddsEos)
            ids.Add(Eos!.Value);
        return [.. ids];
    }

    /// The ids of a text in which the names of tokens mean nothing: no text can end a document or forge a chat's roles.
    public int[] EncodeText(string text)
    {
        var ids = new List<int>((text.Length / 3) + 2);
        text = Whole(text);
        Pieces(text, 0, text.Length, ids);
        return [.. ids];
    }

    /// The text of ids, special tokens as their names unless they are skipped; bytes that are no UTF-8 become U+FFFD.
    public string Decode(ReadOnlySpan<int> ids, bool skipSpecial = false)
    {
        var bytes = new List<byte>(ids.Length * 4);
        foreach (var id in ids)
            bytes.AddRange(BytesOf(id, skipSpecial));
        return Encoding.UTF8.GetString(System.Runtime.InteropServices.CollectionsMarshal.AsSpan(bytes));
    }

    /// The same of the ids that training has.
    public string Decode(ReadOnlySpan<long> tokens)
    {
        var ids = new int[tokens.Length];
        for (var i = 0; i < ids.Length; i++)
            ids[i] = tokens[i] is >= 0 and <= int.MaxValue ? (int)tokens[i] : -1;
        return Decode(ids);
    }

    /// Decodes a text id by id, as it is generated.
    public StreamingDecoder Stream(bool skipSpecial = false) => new(this, skipSpecial);

    /// Messages as the text that the model was trained on; Encode it without special tokens, for the text has its own.
    /// DSG0833 for a template that is not known, DSG0834 for messages that it cannot render.
    public string RenderChat(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt = true)
        => ChatTemplate.Recognise(_chatTemplate, Path)
            .Render(messages, Bos is { } bos ? Encoding.UTF8.GetString(_bytes[bos]!) : "", addGenerationPrompt);

    /// The bytes of an id; those of U+FFFD for one that is no token.
    internal ReadOnlySpan<byte> BytesOf(int id, bool skipSpecial)
        => id < 0 || id >= Vocabulary || _bytes[id] is not { } bytes ? "\uFFFD"u8
            : skipSpecial && _special[id] ? []
            : bytes;

    /// Added tokens of text[from..to) as their ids, and what lies between them as `between` says.
    private static void Cut(string text, int from, int to, AddedTokens tokens, List<int> ids, Action<int, int> between)
    {
        while (tokens.TryFind(text, from, to, out var at, out var length, out var id))
        {
            if (at > from)
                between(from, at);
            ids.Add(id);
            from = at + length;
        }

        if (from < to)
            between(from, to);
    }

    private void Pieces(string text, int from, int to, List<int> ids)
    {
        var part = text.AsSpan(from, to - from);
        var start = 0;
        foreach (var end in DeepSeekPieces.Ends(part))
        {
            var piece = part[start..end];
            if (piece.Length <= MostCharacters)
                ids.AddRange(_bpe.EncodeToIds(piece, considerPreTokenization: false, considerNormalization: false));
            else
                _long.Value.Encode(ByteAlphabet.Spell(piece), ids);
            start = end;
        }
    }

    /// Halves of surrogate pairs as U+FFFD, which is what they would be in UTF-8.
    private static string Whole(string text)
    {
        for (var i = 0; i < text.Length; i++)
        {
            if (!char.IsSurrogate(text[i]))
                continue;
            if (i + 1 < text.Length && char.IsSurrogatePair(text[i], text[i + 1]))
                i++;
            else
                return Encoding.UTF8.GetString(Encoding.UTF8.GetBytes(text));
        }

        return text;
    }

    private int? IdOf(TokenizerJson json, string? token, string field)
        => token is null ? null
            : json.Added.FirstOrDefault(added => added.Content == token) is { } found ? found.Id
            : json.Vocabulary.TryGetValue(token, out var id) ? id
            : throw Config($"'{field}' is no token of the vocabulary");

    private DiagnosticException Config(string what)
        => DiagnosticException.Of(
            Codes.TokenizerMalformed,
            System.IO.Path.Combine(System.IO.Path.GetDirectoryName(Path) ?? "", TokenizerConfig.FileName),
            what,
            $"take {TokenizerConfig.FileName} from the same checkpoint as {TokenizerJson.FileName}");
}

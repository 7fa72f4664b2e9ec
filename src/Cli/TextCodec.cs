// Texts of a model to ids and back, by whatever tokenizer there is.

using System.Text;
using DeepSeekGraph.Runtime.Data.Tokenizers;

namespace DeepSeekGraph.Cli;

/// Texts to ids and back: by a tokenizer of Hugging Face, as bytes, or not at all.
internal sealed class TextCodec
{
    private readonly HuggingFaceTokenizer? _tokenizer;
    private readonly bool _isBytes;

    private TextCodec(HuggingFaceTokenizer? tokenizer, bool isBytes)
    {
        (_tokenizer, _isBytes) = (tokenizer, isBytes);
        int[] ends = isBytes ? [Runtime.Data.ByteTokenizer.Instance.Separator]
            : tokenizer?.Eos is { } eos ? [.. tokenizer.Ends, eos]
            : [.. tokenizer?.Ends ?? []];
        Stops = ends.Select(id => (long)id).ToHashSet();
    }

    /// Ids that end a text.
    public IReadOnlySet<long> Stops { get; }

    /// --tokenizer, that of the weights' folder, bytes for a vocabulary of bytes, or none.
    public static TextCodec Of(GenerateChoices choices, ModelSource source)
    {
        if (choices.Tokenizer is { } path)
            return new(HuggingFaceTokenizer.Load(path), false);
        if (File.Exists(Path.Combine(source.Folder, "tokenizer.json")))
            return new(HuggingFaceTokenizer.Load(source.Folder), false);
        return new(null, source.Config.VocabSize == Runtime.Data.ByteTokenizer.Instance.Vocabulary);
    }

    public IReadOnlyList<long> Encode(string prompt, bool chat)
    {
        if (_tokenizer is not null)
        {
            return [.. (chat
                ? _tokenizer.Encode(_tokenizer.RenderChat([new ChatMessage("user", prompt)]), addSpecialTokens: false)
                : _tokenizer.Encode(prompt)).Select(id => (long)id)];
        }

        if (chat)
            throw Generation.Wrong("--chat", "there is no tokenizer, and with it no chat template", "give --tokenizer PATH");
        return _isBytes
            ? [.. Encoding.UTF8.GetBytes(prompt).Select(b => (long)b)]
            : throw Generation.Wrong("--prompt", "the checkpoint has no tokenizer.json", "give --tokenizer PATH, or --prompt-ids N,N,...");
    }

    /// Decodes one text as it comes: the characters that are complete with each id; null at its end. Without a tokenizer, ids.
    public Func<long?, string> Stream()
    {
        if (_tokenizer?.Stream(skipSpecial: true) is { } stream)
            return id => id is { } given ? stream.Next((int)given) : stream.Flush();
        if (!_isBytes)
            return id => id is { } given ? $"{given} " : "";
        var utf8 = Encoding.UTF8.GetDecoder();
        return id =>
        {
            var chars = new char[4];
            byte[] bytes = id is { } given ? [(byte)given] : [];
            return new string(chars, 0, utf8.GetChars(bytes, chars, flush: id is null));
        };
    }
}

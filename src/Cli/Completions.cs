// What is shown of a generation.

using System.Diagnostics;
using System.Globalization;
using System.Text;
using System.Text.Encodings.Web;
using System.Text.Json;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Generation;

namespace DeepSeekGraph.Cli;

/// Shows what is generated: of one prompt as it comes, of several each when it is whole, or as JSON at the end.
internal sealed class Completions
{
    // no page of HTML will hold it
    private static readonly JsonSerializerOptions s_readable = new() { Encoder = JavaScriptEncoder.UnsafeRelaxedJsonEscaping };

    private readonly GenerateChoices _choices;
    private readonly IReadOnlyList<IReadOnlyList<long>> _prompts;
    private readonly TextCodec _codec;
    private readonly List<long>[] _tokens;
    private readonly Func<long?, string>[] _streams;
    private readonly StringBuilder[] _texts;
    private readonly long _begin = Stopwatch.GetTimestamp();
    private double _first;

    public Completions(GenerateChoices choices, IReadOnlyList<IReadOnlyList<long>> prompts, TextCodec codec)
    {
        (_choices, _prompts, _codec) = (choices, prompts, codec);
        _tokens = [.. prompts.Select(_ => new List<long>())];
        _streams = [.. prompts.Select(_ => codec.Stream())];
        _texts = [.. prompts.Select(_ => new StringBuilder())];
    }

    private bool IsStreaming => _prompts.Count == 1 && !_choices.Json;

    public void Add(GeneratedToken token)
    {
        if (_first == 0)
            _first = Stopwatch.GetElapsedTime(_begin).TotalSeconds;
        _tokens[token.Prompt].Add(token.Token);
        if (!_codec.Stops.Contains(token.Token))
            Put(token.Prompt, _streams[token.Prompt](token.Token));
    }

    public void Close()
    {
        var seconds = Stopwatch.GetElapsedTime(_begin).TotalSeconds;
        for (var i = 0; i < _prompts.Count; i++)
        {
            Put(i, _streams[i](null));
            if (_choices.Json)
                Console.WriteLine(Json(i));
            else if (!IsStreaming)
                Console.WriteLine($"--- prompt {i + 1}\n{_texts[i]}");
        }

        if (IsStreaming)
            Console.WriteLine();
        if (Console.IsErrorRedirected)
            return;
        var made = _tokens.Sum(tokens => tokens.Count);
        var steps = _tokens.Max(tokens => tokens.Count) - 1;
        var each = steps > 0 ? $", then {(seconds - _first) / steps * 1e3:F1} ms a token" : "";
        Console.Error.WriteLine(string.Create(
            CultureInfo.InvariantCulture, $"{made} tokens for {PlanSummary.Count(_prompts.Count, "prompt")}: the first after {_first:F2} s{each}"));
    }

    private void Put(int prompt, string text)
    {
        _texts[prompt].Append(text);
        if (IsStreaming)
            Console.Write(text);
    }

    private string Json(int prompt) => JsonSerializer.Serialize(
        new Dictionary<string, object>
        {
            ["prompt"] = prompt < _choices.Prompts.Count ? _choices.Prompts[prompt] : _choices.PromptIds[prompt - _choices.Prompts.Count],
            ["prompt_ids"] = _prompts[prompt],
            ["text"] = _texts[prompt].ToString(),
            ["token_ids"] = _tokens[prompt],
            ["finish_reason"] = _tokens[prompt] is [.., var last] && _codec.Stops.Contains(last) ? "stop"
                : _tokens[prompt].Count == _choices.MaxNewTokens ? "length" : "interrupted",
        },
        s_readable);
}

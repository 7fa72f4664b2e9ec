// How fast a Hugging Face tokenizer encodes and decodes, on one thread.
// dotnet run --project benchmarks/Tokenizer -c Release -- TOKENIZER [DATA]: a Markdown table; without DATA, the default corpus.
// Times are the thread's processor time, so that other work on the machine counts little.
using System.Diagnostics;
using System.Globalization;
using DeepSeekGraph.Benchmarks;
using DeepSeekGraph.Runtime.Data;
using DeepSeekGraph.Runtime.Data.Tokenizers;

CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
var load = Stopwatch.StartNew();
var loadCpu = ThreadClock.Milliseconds;
var tokenizer = HuggingFaceTokenizer.Load(args[0]);
Console.WriteLine($"load: {load.ElapsedMilliseconds} ms, of which {ThreadClock.Milliseconds - loadCpu:F0} ms of processor time\n");

var corpus = Corpus.Open(args.Length > 1 ? args[1] : null);
const int MostCharacters = 4_000_000;
var documents = new List<string>();
long characters = 0;
foreach (var document in corpus.Documents)
{
    documents.Add(document);
    characters += document.Length;
    if (characters > MostCharacters)
        break;
}

Console.WriteLine($"{documents.Count:N0} documents, {characters:N0} characters, from {corpus.Source}\n");
var encoded = new List<int[]>();
var text = Rates("encode", () =>
{
    encoded.Clear();
    foreach (var document in documents)
        encoded.Add(tokenizer.EncodeText(document));
});
var cold = text.First;
var back = Rates("decode", () =>
{
    for (var i = 0; i < documents.Count; i++)
    {
        if (tokenizer.Decode(encoded[i]) != documents[i])
            throw new InvalidOperationException($"document {i} does not come back");
    }
});
long tokens = encoded.Sum(ids => (long)ids.Length);
Console.WriteLine("| | tokens a second | characters a second |");
Console.WriteLine("|---|---|---|");
foreach (var (name, seconds) in ((string, double)[])[("encode, first pass", cold), ("encode", text.Best), ("decode", back.Best)])
    Console.WriteLine($"| {name} | {tokens / seconds:N0} | {characters / seconds:N0} |");
Console.WriteLine($"\n{tokens:N0} tokens, {(double)characters / tokens:F2} characters each");

// The longest piece of text without a blank costs no more than its length, nearly.
foreach (var length in (int[])[1_000, 10_000, 100_000, 1_000_000])
{
    var random = new Random(1);
    var piece = string.Create(length, random, (span, from) =>
    {
        for (var i = 0; i < span.Length; i++)
            span[i] = (char)('a' + from.Next(26));
    });
    var begin = ThreadClock.Milliseconds;
    var count = tokenizer.EncodeText(piece).Length;
    Console.WriteLine($"one word of {length:N0} letters: {count:N0} tokens in {ThreadClock.Milliseconds - begin:F1} ms");
}

static (double First, double Best) Rates(string name, Action action)
{
    var times = new List<double>();
    for (var round = 0; round < 5; round++)
    {
        var begin = ThreadClock.Milliseconds;
        action();
        times.Add((ThreadClock.Milliseconds - begin) / 1e3);
    }

    Console.Error.WriteLine($"{name}: {string.Join(", ", times.Select(t => $"{t:F2}"))} s");
    return (times[0], times.Min());
}

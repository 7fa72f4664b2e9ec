// Import and export of a published checkpoint of 2.5 GB or more beside a plain copy of its folder: whole processes, alternating, warm cache.
using System.Diagnostics;
using System.Globalization;
using System.Text;
using DeepSeekGraph.Models;
using DeepSeekGraph.Models.HuggingFace;
using DeepSeekGraph.Runtime.Weights;

if (args is not [var folder, var dsg, .. var more])
{
    Console.Error.WriteLine("usage: CheckpointBenchmarks FOLDER COMMAND [ROUNDS [LAYERS [import]]]; see benchmarks/import.sh");
    return 2;
}

var rounds = more is [var given, ..] ? int.Parse(given, CultureInfo.InvariantCulture) : 5;
var config = Made.Config with { NumHiddenLayers = more is [_, var layers, ..] ? int.Parse(layers, CultureInfo.InvariantCulture) : 6 };
var source = Path.Combine(folder, "published");
var bytes = Made.Write(source, config);
var largest = config.VocabSize * (long)config.HiddenSize * 2;
Console.WriteLine($"published: {bytes / 1e9:F2} GB, largest tensor {largest / 1e6:F0} MB");

(string Name, string Out, string Command)[] contestants =
[
    ("cp -r", "copy", $"cp -r '{source}' '{folder}/copy'"),
    ("cp -r, sync", "copy", $"cp -r '{source}' '{folder}/copy' && sync -f '{folder}/copy'"),
    ("import, 1 rank", "one", $"exec {dsg} import --hf '{source}' --out '{folder}/one'"),
    ("import, TP 2 x PP 2 x EP 2", "four", $"exec {dsg} import --hf '{source}' --out '{folder}/four' --tp 2 --pp 2 --ep 2"),
    ("export of 1 rank", "back", $"exec {dsg} export --checkpoint '{folder}/kept1' --out '{folder}/back'"),
    ("export of TP 2 x PP 2 x EP 2", "back", $"exec {dsg} export --checkpoint '{folder}/kept4' --out '{folder}/back'"),
];

// export needs LibTorch, which a machine may not have
if (more is [_, _, var only])
    contestants = [.. contestants.Where(one => one.Name.StartsWith("cp", StringComparison.Ordinal) || one.Name.StartsWith(only, StringComparison.Ordinal))];

// memory by itself: to look for it every 2 ms takes a part of a core
var memory = new long[contestants.Length];
for (var i = 0; i < contestants.Length; i++)
{
    memory[i] = Child.Run(contestants[i].Command, watch: true).Anonymous;
    if (contestants.Length > 4 && contestants[i].Out is "one" or "four")
        Directory.Move(Path.Combine(folder, contestants[i].Out), Path.Combine(folder, contestants[i].Out == "one" ? "kept1" : "kept4"));
    else
        Directory.Delete(Path.Combine(folder, contestants[i].Out), recursive: true);
}

var seen = contestants.Select(_ => new List<Child>()).ToArray();
for (var round = 0; round < rounds; round++)
{
    for (var i = 0; i < contestants.Length; i++)
    {
        var place = (round + i) % contestants.Length;
        seen[place].Add(Child.Run(contestants[place].Command));
        Directory.Delete(Path.Combine(folder, contestants[place].Out), recursive: true);
    }
}

Console.WriteLine("| process | s, median | s, least | GB/s | speed over cp -r, median of rounds | over cp -r, sync | own memory at most, MB |");
Console.WriteLine("|---|---|---|---|---|---|---|");
for (var i = 0; i < contestants.Length; i++)
{
    string Over(int other) => Median(seen[i].Zip(seen[other], (own, copy) => copy.Seconds / own.Seconds)).ToString("F2", CultureInfo.InvariantCulture);
    var seconds = Median(seen[i].Select(child => child.Seconds));
    Console.WriteLine(string.Create(
        CultureInfo.InvariantCulture,
        $"| {contestants[i].Name} | {seconds:F2} | {seen[i].Min(child => child.Seconds):F2} | {bytes / 1e9 / seconds:F2} | {Over(0)} | {Over(1)} | {memory[i] / 1e6:F0} |"));
}

foreach (var left in Directory.GetDirectories(folder))
    Directory.Delete(left, recursive: true);
return 0;

static double Median(IEnumerable<double> values)
{
    var sorted = values.Order().ToArray();
    return (sorted[sorted.Length / 2] + sorted[(sorted.Length - 1) / 2]) / 2;
}

/// What a process took: time from start to end, and the most anonymous memory that it had (RssAnon: without mapped files), as seen every 2 ms.
internal sealed record Child(double Seconds, long Anonymous)
{
    public static Child Run(string command, bool watch = false)
    {
        var begin = Stopwatch.GetTimestamp();
        using var process = Process.Start(new ProcessStartInfo("sh", ["-c", command]) { RedirectStandardOutput = true })!;
        var most = 0L;
        while (watch && !process.WaitForExit(2))
            most = Math.Max(most, RssAnon(process.Id));
        process.WaitForExit();
        var seconds = Stopwatch.GetElapsedTime(begin).TotalSeconds;
        return process.ExitCode == 0 ? new Child(seconds, most) : throw new InvalidOperationException($"'{command}' ended with {process.ExitCode}");
    }

    private static long RssAnon(int process)
    {
        try
        {
            var line = File.ReadLines($"/proc/{process}/status").FirstOrDefault(l => l.StartsWith("RssAnon:", StringComparison.Ordinal));
            return line is null ? 0 : long.Parse(line.Split(' ', StringSplitOptions.RemoveEmptyEntries)[1], CultureInfo.InvariantCulture) * 1024;
        }
        catch (IOException)
        {
            return 0;
        }
    }
}

/// A model of DeepSeek-V3's kind with random weights in bf16.
internal static class Made
{
    public static DeepSeekV3Config Config { get; } = new()
    {
        VocabSize = 32768,
        HiddenSize = 2048,
        NumAttentionHeads = 16,
        QLoraRank = 512,
        KvLoraRank = 256,
        IntermediateSize = 6144,
        FirstKDenseReplace = 1,
        MoeIntermediateSize = 1024,
        NRoutedExperts = 32,
        NumExpertsPerTok = 4,
        NGroup = 4,
        TopkGroup = 2,
        NumNextnPredictLayers = 0,
    };

    public static long Write(string folder, DeepSeekV3Config config)
    {
        var tensors = WeightMap.Of(config).Tensors(config).Select(tensor => new SafeTensorSpec(
            tensor.Name, tensor.Float32 ? "F32" : "BF16", [.. tensor.Shape.Select(extent => (long)extent)])).ToArray();
        using var writer = ShardedWriter.Create(folder, tensors, 1_000_000_000);
        var random = new Random(1);
        foreach (var tensor in tensors)
        {
            var bytes = new byte[tensor.Bytes];
            random.NextBytes(bytes);

            // exponents of small finite numbers; the high byte of a bf16 or fp32 element comes last
            var width = SafeTensorTypes.BytesOf(tensor.DType);
            for (var i = width - 1; i < bytes.Length; i += width)
                bytes[i] = (byte)((bytes[i] & 0x80) | 0x3C);
            writer.Write(tensor.Name, bytes);
        }

        writer.AddFile("config.json", Encoding.UTF8.GetBytes(ConfigJson.Write(config)));
        writer.Commit();
        return tensors.Sum(tensor => tensor.Bytes);
    }
}

// What a token costs by the number of tokens before it: decoding with DeepSeek-V3's latents, one rank, one thread.
// dotnet run --project benchmarks/Generation -c Release: a Markdown table. Times are the rank's processor time, so that other work
// on the machine counts little.
using System.Globalization;
using DeepSeekGraph.Compiler;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Generation;
using DeepSeekGraph.Runtime.Training;

CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
const int Steps = 40;
// the first two only warm up
int[] contexts = [128, 128, 128, 512, 1024, 2048, 4096];

// the attention of DeepSeek-V3 with an eighth of its heads, a small hidden size and few experts around it
var config = new DeepSeekV3Config
{
    VocabSize = 1024,
    HiddenSize = 1024,
    NumHiddenLayers = 4,
    NumAttentionHeads = 16,
    IntermediateSize = 2048,
    FirstKDenseReplace = 1,
    MoeIntermediateSize = 256,
    NRoutedExperts = 32,
    NumNextnPredictLayers = 0,
};
var model = new DeepSeekV3(config);
var rows = new List<(int Context, double Milliseconds, double First)>();
foreach (var context in contexts)
{
    var plans = GenerationPlans.Compile(model, Recipe.Default.WithName("decode"), 1, context, context + Steps);
    await using var generator = await Generator.StartAsync(plans.Prefill, plans.Decode, new GeneratorOptions { Executor = Executor.Interpreter });
    long[] prompt = [.. Enumerable.Range(0, context).Select(i => (long)(i * 7919 % config.VocabSize))];
    var times = new List<double>();
    var first = 0.0;
    var before = Cpu();
    await foreach (var _ in generator.RunAsync([prompt], Steps, new Sampling()))
    {
        var now = Cpu();
        if (first == 0)
            first = now - before;
        else
            times.Add(now - before);
        before = now;
    }

    times.Sort();
    rows.Add((context, times[times.Count / 2], first));
    Console.Error.WriteLine($"{context}: prefill {first:F0} ms, a token {times[times.Count / 2]:F2} ms (fastest {times[0]:F2}, slowest {times[^1]:F2})");
}

rows.RemoveRange(0, 2);

// least squares of ms = fixed + slope * tokens
double n = rows.Count, sx = rows.Sum(r => r.Context), sy = rows.Sum(r => r.Milliseconds);
double sxx = rows.Sum(r => (double)r.Context * r.Context), sxy = rows.Sum(r => r.Context * r.Milliseconds);
var slope = ((n * sxy) - (sx * sy)) / ((n * sxx) - (sx * sx));
var fixedCost = (sy - (slope * sx)) / n;
var width = config.KvLoraRank + config.QkRopeHeadDim;
Console.WriteLine("| tokens before | ms a token | by the line | cache bytes read |");
Console.WriteLine("|---|---|---|---|");
foreach (var (context, ms, _) in rows)
    Console.WriteLine($"| {context:N0} | {ms:F2} | {fixedCost + (slope * context):F2} | {(long)context * width * sizeof(float) * config.NumHiddenLayers / 1e6:F1} MB |");
var flops = 2.0 * config.NumAttentionHeads * (width + config.KvLoraRank) * config.NumHiddenLayers;
Console.WriteLine($"\n{fixedCost:F2} ms + {slope * 1e3:F3} us for each token before it; attention's products are {flops:N0} FLOPs for each: {flops / slope / 1e6:F1} GFLOP/s");

// of the whole process: one rank's thread does the work
static double Cpu() => System.Diagnostics.Process.GetCurrentProcess().TotalProcessorTime.TotalMilliseconds;

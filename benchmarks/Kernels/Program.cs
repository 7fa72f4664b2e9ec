// Fused kernels against the kernels they replace: pairs of runs in one process, in alternating order, one thread.
// dotnet run --project benchmarks/Kernels -c Release [-- ROUNDS [NAME]]: medians as a Markdown table.
// Times are the thread's processor time, so that other work on the machine counts little.
using System.Globalization;
using DeepSeekGraph.Benchmarks;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using TorchSharp;

CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
var rounds = args.Length > 0 ? int.Parse(args[0], CultureInfo.InvariantCulture) : 15;
var only = args.Length > 1 ? args[1] : "";
LibTorch.Load();
TensorMemory.PrepareThread();
torch.manual_seed(7);

Console.WriteLine("| rule | size | unfused ms | fused ms | time, fused / unfused | peak MiB, unfused | peak MiB, fused |");
Console.WriteLine("|---|---|---|---|---|---|---|");
foreach (var item in Cases.All().Where(c => c.Name.Contains(only, StringComparison.Ordinal)))
{
    var (_, unfusedPeak) = Measure(item.Unfused);
    var (_, fusedPeak) = Measure(item.Fused);
    List<double> unfused = [], fused = [], ratios = [];
    for (var round = 0; round < rounds; round++)
    {
        // whoever comes second finds warm caches: take turns
        if (round % 2 == 0)
        {
            unfused.Add(Measure(item.Unfused).Milliseconds);
            fused.Add(Measure(item.Fused).Milliseconds);
        }
        else
        {
            fused.Add(Measure(item.Fused).Milliseconds);
            unfused.Add(Measure(item.Unfused).Milliseconds);
        }

        ratios.Add(fused[^1] / unfused[^1]);
    }

    Console.WriteLine(
        $"| {item.Name} | {item.Size} | {Median(unfused):F2} | {Median(fused):F2} | {Median(ratios):F2} | "
            + $"{unfusedPeak / 1048576.0:F1} | {fusedPeak / 1048576.0:F1} |");
}

static (double Milliseconds, long Peak) Measure(Action<Run> body)
{
    using var run = new Run();
    var begin = ThreadClock.Milliseconds;
    body(run);
    return (ThreadClock.Milliseconds - begin, run.Meter.Peak);
}

static double Median(List<double> values)
{
    double[] sorted = [.. values.Order()];
    return (sorted[(sorted.Length - 1) / 2] + sorted[sorted.Length / 2]) / 2;
}

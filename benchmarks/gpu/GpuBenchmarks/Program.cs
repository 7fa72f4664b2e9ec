// Training steps of the proxy on a GPU: time, FLOP/s, memory and time by kernel, as one JSON line. benchmarks/gpu/run.sh calls it.
// GpuBenchmarks [--layers N] [--clip X] [--steps N] [--weights DIR] [--losses FILE] [--set recipe.KEY=VALUE ...]
using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using DeepSeekGraph;
using DeepSeekGraph.Benchmarks;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Training;
using Torch = TorchSharp.torch;

CultureInfo.CurrentCulture = CultureInfo.InvariantCulture;
if (args is ["nccl", .. var rest])
{
    Links.Run(Links.Count(rest));
    return;
}

var options = BenchOptions.Parse(args);
var device = RankDevice.Cuda(0);
if (options.Kernels)
{
    Torch.set_grad_enabled(false);
    device.Enter();
    var cases = new KernelCases(device);
    var copy = cases.Copy();
    Console.WriteLine($"copy {copy / 1e12:F3} TB/s on {device.Name}");
    foreach (var c in cases.All())
    {
        var seconds = cases.Seconds(c);
        Console.WriteLine(c.Flops > 0
            ? $"{c.Name,-26} {seconds * 1e6,9:F1} us {c.Flops / seconds / 1e12,8:F0} TFLOP/s"
            : $"{c.Name,-26} {seconds * 1e6,9:F1} us {c.Bytes / seconds / 1e12,8:F3} TB/s {c.Bytes / seconds / copy,6:P0} of a copy");
    }

    return;
}

var job = options.Job();
var plan = job.Compile();
await using var trainer = await Trainer.StartAsync(plan, new TrainerOptions
{
    Device = device,
    Executor = Executor.Interpreter,
    Batches = new RandomTokens(job.Config.VocabSize, plan, options.SameTokens),
    LearningRate = new LearningRate(options.LearningRate, options.LearningRate),
    Profile = options.Profile,
    Weights = options.Weights is { } folder ? Weights.From(folder, plan) : null,
});
if (options.DumpTo is { } dump)
    Weights.Dump(trainer, dump);

var losses = new List<(double Loss, double Norm)>();
await foreach (var step in trainer.RunAsync(options.Steps))
    losses.Add((step.Loss, step.GradNorm));
trainer.Ranks[0].Profile?.Reset();
var (stepMs, stepHost) = await MedianAsync(true);
var kernels = trainer.Ranks[0].Profile is { } profile
    ? profile.Totals.Select(t => (t.Name, Milliseconds: t.Milliseconds / profile.Steps, Calls: (double)t.Calls / profile.Steps)).ToArray()
    : [];
var (forwardBackwardMs, forwardBackwardHost) = await MedianAsync(false);
var (free, total) = device.Memory();
var flops = Work.FlopsOf(job.Config, plan.SeqLength);
Console.WriteLine(JsonSerializer.Serialize(new
{
    what = "dsg " + (options.Profile ? "profile" : "step"),
    device = device.Name,
    layers = job.Config.NumHiddenLayers,
    parameters = PlanSummary.Parameters(plan),
    plan = PlanFile.Hash(plan),
    loss = losses[0].Loss,
    grad_norm = double.IsNaN(losses[0].Norm) ? (double?)null : losses[0].Norm,
    fb_ms = forwardBackwardMs,
    step_ms = stepMs,
    fb_host_ms = forwardBackwardHost,
    step_host_ms = stepHost,
    tflops_fb = flops / forwardBackwardMs / 1e9,
    tflops_step = flops / stepMs / 1e9,
    tokens_per_s = plan.SeqLength / stepMs * 1e3,
    predicted_gb = plan.Memory[0].Peak / 1e9,
    counted_gb = trainer.Ranks[0].Memory.Peak / 1e9,
    device_gb = (total - free) / 1e9,
}));
if (options.LossFile is { } file)
    File.WriteAllLines(file, losses.Select(l => $"{l.Loss:R} {l.Norm:R}"));
foreach (var (name, milliseconds, calls) in kernels)
    Console.WriteLine($"{name,-28} {milliseconds,9:F3} ms {calls,7:F1} calls");

async Task<(double Milliseconds, double Host)> MedianAsync(bool epilogue)
{
    var inputs = trainer.InputsOf(1);
    var times = new List<(double All, double Host)>();
    for (var i = 0; i < options.Repeats; i++)
    {
        await trainer.OnAllAsync(runner =>
        {
            device.Finish();
            var begin = Stopwatch.GetTimestamp();
            runner.RunStep(trainer.Step, inputs, epilogue);
            var host = Stopwatch.GetElapsedTime(begin).TotalMilliseconds;
            device.Finish();
            times.Add((Stopwatch.GetElapsedTime(begin).TotalMilliseconds, host));
        });
    }

    times.Sort();
    return times[times.Count / 2];
}

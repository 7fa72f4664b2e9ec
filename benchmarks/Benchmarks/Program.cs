// Times the same training step three ways, side by side: by hand, as a compiled plan, and interpreted.
using System.Diagnostics;
using System.Globalization;
using System.Runtime.InteropServices;
using Benchmarks;
using DeepSeekGraph;
using DeepSeekGraph.Models;
using DeepSeekGraph.Runtime.Telemetry;
using DeepSeekGraph.Runtime.Training;

var rounds = args is [var given, ..] ? int.Parse(given, CultureInfo.InvariantCulture) : 40;
var named = Recipes.Named("deepseek_v3_tiny");
var plan = (named with
{
    Recipe = named.Recipe.WithParallelism(1, 1, 1, 1).WithLayout("").WithDType(DType.Float32),
}).Compile();
var batches = new RandomBatches(plan, named.Config.VocabSize);
TrainerOptions Options(Executor executor, bool profile = false)
    => new() { Batches = batches, LearningRate = new LearningRate(1e-3), Executor = executor, Profile = profile };

if (args.Contains("--profile"))
{
    await Profiles.PrintAsync(plan, Options(Executor.Compiled, true), rounds).ConfigureAwait(false);
    return;
}

await using var compiled = await Trainer.StartAsync(plan, Options(Executor.Compiled)).ConfigureAwait(false);
await using var interpreted = await Trainer.StartAsync(plan, Options(Executor.Interpreter)).ConfigureAwait(false);

// The third trainer only lends its thread, prepared like those of the others.
await using var bare = await Trainer.StartAsync(plan, Options(Executor.Interpreter)).ConfigureAwait(false);
DirectStep? direct = null;
await bare.OnAllAsync(_ => direct = new DirectStep(plan, named.Config, bare.GatherParameters())).ConfigureAwait(false);

Contestant[] all =
[
    new("direct", bare, null, direct!, batches),
    new("compiled", compiled, compiled.RunAsync(long.MaxValue / 2).GetAsyncEnumerator(), null, batches),
    new("interpreter", interpreted, interpreted.RunAsync(long.MaxValue / 2).GetAsyncEnumerator(), null, batches),
];

const int WarmUp = 10;
for (var round = 0; round < WarmUp + rounds; round++)
{
    // Who goes first changes, so that nobody always runs behind the same one.
    for (var i = 0; i < all.Length; i++)
        await all[(round + i) % all.Length].StepAsync(round >= WarmUp).ConfigureAwait(false);
    var expected = all[0].Seen;

    // Later on a token near a tie chooses other experts, and the runs part as two layouts of one plan do.
    foreach (var other in round < WarmUp ? all : [])
    {
        if (Apart(other.Seen.Loss, expected.Loss) > 1e-3 || Apart(other.Seen.Mtp, expected.Mtp) > 1e-3 || Apart(other.Seen.Norm, expected.Norm) > 1e-2)
            throw new InvalidOperationException($"step {round + 1}: {other.Name} has {other.Seen}, direct has {expected}");
    }

    if (round < 5)
    {
        Console.Error.WriteLine(
            $"step {round + 1}: loss {expected.Loss:F6}, apart {Apart(all[1].Seen.Loss, expected.Loss):E1}, norm {Apart(all[1].Seen.Norm, expected.Norm):E1}");
    }
}

Console.WriteLine($"{rounds} rounds, one step of each, beginning with another one each time; {plan.Microbatches} microbatches of {plan.SeqLength} tokens, fp32\n");
Console.WriteLine("| | ms a step, median | ms of processor time, median | time over direct, median of rounds | processor time over direct |");
Console.WriteLine("|---|---|---|---|---|");
foreach (var one in all)
{
    Console.WriteLine(string.Create(
        CultureInfo.InvariantCulture,
        $"| {one.Name} | {Median(one.Wall):F1} | {Median(one.Cpu):F1} | {Ratio(c => c.Wall, one):F3} | {Ratio(c => c.Cpu, one):F3} |"));
}

double Ratio(Func<Contestant, List<double>> of, Contestant one) => Median(of(one).Zip(of(all[0]), (mine, its) => mine / its));

static double Apart(double a, double b) => Math.Abs(a - b) / Math.Max(Math.Abs(b), 1e-12);

static double Median(IEnumerable<double> values)
{
    double[] sorted = [.. values.Order()];
    return (sorted[(sorted.Length - 1) / 2] + sorted[sorted.Length / 2]) / 2;
}

namespace Benchmarks
{
    /// <summary>Random tokens by step, the same for all.</summary>
    internal sealed class RandomBatches(PlanSet plan, int vocab) : IBatchSource
    {
        public TrainingBatch Get(long step)
        {
            var (rows, columns) = (plan.Microbatches * plan.MicroBatch, plan.Inputs.Single(i => i.Name == "tokens").Extents[1]);
            var random = new Random((int)step);
            return new TrainingBatch(rows, columns, [.. Enumerable.Range(0, rows * columns).Select(_ => (long)random.Next(vocab))]);
        }
    }

    /// <summary>One way to run a step, its times in milliseconds and what the last step computed.</summary>
    internal sealed partial class Contestant(
        string name, Trainer trainer, IAsyncEnumerator<StepMetrics>? steps, DirectStep? direct, IBatchSource batches)
    {
        private long _step;

        public string Name => name;

        public List<double> Wall { get; } = [];

        public List<double> Cpu { get; } = [];

        public (double Loss, double Mtp, double Norm) Seen { get; private set; }

        public async Task StepAsync(bool counts)
        {
            double before = 0, after = 0;
            await trainer.OnAllAsync(_ => before = ThreadMilliseconds()).ConfigureAwait(false);
            var begin = Stopwatch.GetTimestamp();
            if (direct is not null)
            {
                _step++;
                await trainer.OnAllAsync(_ => direct.Run(batches.Get(_step - 1), _step, 1e-3)).ConfigureAwait(false);
            }
            else
                await steps!.MoveNextAsync().ConfigureAwait(false);
            var wall = Stopwatch.GetElapsedTime(begin).TotalMilliseconds;
            await trainer.OnAllAsync(_ => after = ThreadMilliseconds()).ConfigureAwait(false);
            Seen = direct is not null ? direct.Metrics : (steps!.Current.Loss, steps.Current.MtpLoss!.Value, steps.Current.GradNorm);
            if (!counts)
                return;
            Wall.Add(wall);
            Cpu.Add(after - before);
        }

        /// <summary>Processor time of the calling thread, which other work on the machine does not count in.</summary>
        private static double ThreadMilliseconds()
        {
            const int ThreadClock = 3;
            _ = clock_gettime(ThreadClock, out var time);
            return (time.Seconds * 1e3) + (time.Nanoseconds / 1e6);
        }

        [LibraryImport("libc")]
        private static partial int clock_gettime(int clock, out Time time);

        [StructLayout(LayoutKind.Sequential)]
        private struct Time
        {
            public long Seconds;
            public long Nanoseconds;
        }
    }

    internal static class Profiles
    {
        /// <summary>Where a plan's time goes, by kernel.</summary>
        public static async Task PrintAsync(PlanSet plan, TrainerOptions options, int steps)
        {
            await using var trainer = await Trainer.StartAsync(plan, options).ConfigureAwait(false);
            await foreach (var step in trainer.RunAsync(steps).ConfigureAwait(false))
                Console.Error.WriteLine($"{step.Seconds * 1e3:F1} ms");
            foreach (var (name, ms, calls) in trainer.Ranks[0].Profile!.Totals)
                Console.WriteLine(string.Create(CultureInfo.InvariantCulture, $"{name,-24} {ms / steps,9:F2} ms a step {calls / steps,6} calls {ms * 1e3 / calls,8:F1} us"));
        }
    }
}

// Times of NCCL's collectives between the GPUs of one machine, one JSON line each; a thread a GPU.
// GpuBenchmarks nccl [GPUS]
using System.Diagnostics;
using System.Globalization;
using System.Text.Json;
using DeepSeekGraph.Runtime.Cuda;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Benchmarks;

internal static class Links
{
    private const int WarmUp = 5;

    private static readonly string[] s_kinds = ["all-reduce", "reduce-scatter", "all-gather", "all-to-all"];

    /// <summary>`mib`: what each GPU brings, for a gather what it ends with. Bus bandwidth as nccl-tests has it: what the slowest link carried.</summary>
    public static void Run(int gpus)
    {
        RankDevice[] devices = [.. Enumerable.Range(0, gpus).Select(RankDevice.Cuda)];
        var id = new NcclCalls(0).NewId();
        using var barrier = new Barrier(gpus);
        var lines = new List<string>();
        Exception? failed = null;
        Thread[] threads = [.. devices.Select((device, rank) => new Thread(() =>
        {
            try
            {
                Measure(device, rank, gpus, id, barrier, lines);
            }
            catch (Exception e)
            {
                failed = e;
                Console.Error.WriteLine(e);
                Environment.Exit(1);
            }
        }))];
        foreach (var thread in threads)
            thread.Start();
        foreach (var thread in threads)
            thread.Join();
        if (failed is null)
            lines.ForEach(Console.WriteLine);
    }

    private static void Measure(RankDevice device, int rank, int gpus, byte[] id, Barrier barrier, List<string> lines)
    {
        TensorMemory.PrepareThread();
        device.Enter();
        var nccl = new NcclCalls(rank);
        var communicator = nccl.Join(id, gpus, rank);
        var stream = nccl.NewStream();
        foreach (var mib in (int[])[1, 16, 256])
        {
            var bytes = (long)mib << 20;
            using var from = ones(bytes / sizeof(float), device: device.Torch);
            using var to = zeros(bytes / sizeof(float), device: device.Torch);
            device.Finish();
            foreach (var kind in s_kinds)
            {
                var repeats = mib >= 256 ? 20 : 100;
                double seconds = 0;
                foreach (var count in (int[])[WarmUp, repeats])
                {
                    barrier.SignalAndWait();
                    var begin = Stopwatch.GetTimestamp();
                    for (var i = 0; i < count; i++)
                        Once(nccl, kind, communicator, NcclLaunch.Address(from), NcclLaunch.Address(to), bytes, gpus, rank, stream);
                    device.Finish();
                    seconds = Stopwatch.GetElapsedTime(begin).TotalSeconds / count;
                }

                var share = (gpus - 1.0) / gpus * (kind == "all-reduce" ? 2 : 1);
                if (rank == 0)
                {
                    lines.Add(JsonSerializer.Serialize(new
                    {
                        what = "nccl",
                        kind,
                        mib,
                        gpus,
                        ms = Math.Round(seconds * 1e3, 4),
                        bus_gb_s = Math.Round(bytes * share / seconds / 1e9, 1),
                        nccl = RankDevice.NcclVersion,
                        device = device.Name,
                    }));
                }
            }
        }

        barrier.SignalAndWait();
        nccl.Close(communicator);
    }

    private static void Once(NcclCalls nccl, string kind, nint communicator, nint from, nint to, long bytes, int gpus, int rank, nint stream)
    {
        var elements = bytes / sizeof(float);
        var part = bytes / gpus;
        switch (kind)
        {
            case "all-reduce":
                nccl.AllReduce(communicator, from, to, elements, ScalarType.Float32, false, stream);
                break;
            case "reduce-scatter":
                nccl.ReduceScatter(communicator, from, to, elements / gpus, ScalarType.Float32, stream);
                break;
            case "all-gather":
                nccl.AllGather(communicator, from, to, part, stream);
                break;
            case "all-to-all":
                nccl.Copy(from + (nint)(rank * part), to + (nint)(rank * part), part, stream);
                nccl.Begin();
                for (var peer = 0; peer < gpus; peer++)
                {
                    if (peer == rank)
                        continue;
                    nccl.Send(communicator, from + (nint)(peer * part), part, peer, stream);
                    nccl.Receive(communicator, to + (nint)(peer * part), part, peer, stream);
                }

                nccl.End();
                break;
            default:
                throw new UnreachableException(kind);
        }
    }

    /// <summary>GPUs asked for; 2 where nothing is said.</summary>
    public static int Count(string[] args) => args.Length > 0 ? int.Parse(args[0], CultureInfo.InvariantCulture) : 2;
}

// The most memory that ranks held, as rows of the memory table: what was counted, not what was predicted.
using DeepSeekGraph.Runtime.Collectives;
using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Launch;
using DeepSeekGraph.Runtime.Memory;

namespace DeepSeekGraph.Runtime.Training;

internal static class PeakMemory
{
    /// <summary>Parameters, optimizer, gradients, counters, activations and the peak, in bytes.</summary>
    private const int Columns = 6;

    /// <summary>By stage, the largest of its ranks.</summary>
    public static IReadOnlyList<MemoryRow> Of(IReadOnlyList<RankRunner> ranks) => Rows(ranks.Select(r => (r.Rank.Stage, Held(r.Memory))));

    /// <summary>The same over all processes; of this one alone where another has ended.</summary>
    public static IReadOnlyList<MemoryRow> Of(IWorld world, IReadOnlyList<RankRunner> ranks)
    {
        if (world.Processes == 1)
            return Of(ranks);
        try
        {
            byte[][]? all = null;
            world.Meet("memory", Packing.Pack(writer =>
            {
                writer.Write(ranks.Count);
                foreach (var rank in ranks)
                {
                    writer.Write(rank.Rank.Stage);
                    foreach (var bytes in Held(rank.Memory))
                        writer.Write(bytes);
                }
            }), given => (all = [.. given]).Length == 0 ? [] : [1], CancellationToken.None);
            return all is null ? Of(ranks) : Rows(all.SelectMany(one => Packing.Unpack(one, Read)));
        }
        catch (OperationCanceledException)
        {
            return Of(ranks);
        }
    }

    private static List<(int Stage, long[] Held)> Read(BinaryReader reader)
    {
        var rows = new List<(int, long[])>();
        for (var left = reader.ReadCount(); left > 0; left--)
        {
            var stage = reader.ReadInt32();
            var held = new long[Columns];
            for (var i = 0; i < Columns; i++)
                held[i] = reader.ReadInt64();
            rows.Add((stage, held));
        }

        return rows;
    }

    private static IReadOnlyList<MemoryRow> Rows(IEnumerable<(int Stage, long[] Held)> ranks)
        => [.. ranks.GroupBy(r => r.Stage).OrderBy(stage => stage.Key).Select(stage => Row(stage.Key, [.. stage.Select(r => r.Held)]))];

    private static MemoryRow Row(int stage, long[][] ranks)
    {
        long Most(int column) => ranks.Max(held => held[column]);
        var peak = Most(Columns - 1);
        return new MemoryRow(stage, Most(0), Most(1), Most(2), Most(3), Most(4), 0, peak, peak, peak, peak, [], []);
    }

    /// <summary>A meter does not tell activations from buffers of collectives, and there is no arena.</summary>
    private static long[] Held(MemoryMeter m)
        =>
        [
            m.PeakOf(SlotKind.Parameter),
            m.PeakOf(SlotKind.Optimizer),
            m.PeakOf(SlotKind.Gradient),
            m.PeakOf(SlotKind.Counter) + m.PeakOf(SlotKind.Scalar) + m.PeakOf(SlotKind.Cache),
            m.Peak - m.LiveOf(SlotKind.Parameter) - m.LiveOf(SlotKind.Optimizer) - m.LiveOf(SlotKind.Gradient)
                - m.LiveOf(SlotKind.Counter) - m.LiveOf(SlotKind.Scalar) - m.LiveOf(SlotKind.Cache),
            m.Peak,
        ];
}

// Before the first step: every process must be about to do the same.
using DeepSeekGraph.Runtime.Collectives;

namespace DeepSeekGraph.Runtime.Launch;

/// <summary>Facts by name that must be equal in all processes: the plan's hash, the data's checksum, ...</summary>
public static class Agreement
{
    /// <summary>Process 0 compares the others' facts with its own; the first that differs stops all: DSG0862.</summary>
    public static void Require(IWorld world, IReadOnlyList<(string Name, string Value)> facts)
    {
        var mine = Packing.Pack(writer =>
        {
            writer.Write(facts.Count);
            foreach (var (name, value) in facts)
            {
                writer.Write(name);
                writer.Write(value);
            }
        });
        world.Meet("agreement", mine, all =>
        {
            for (var process = 1; process < all.Count; process++)
            {
                var others = Packing.Unpack(all[process], Read);
                foreach (var (name, value) in facts)
                {
                    var other = others.FirstOrDefault(fact => fact.Name == name).Value ?? "none";
                    if (other != value)
                        throw Differs(process, name, other, value);
                }
            }

            return [];
        }, world.Stop);
    }

    /// <summary>Processes that were launched as a job run one rank of the plan each: DSG0861 where there are not as many.</summary>
    public static void RequireSize(IWorld world, int ranks)
    {
        if (world is LoopbackWorld || world.Processes == ranks)
            return;
        world.Meet("size", [], all => throw DiagnosticException.Of(
            Codes.WorldSize,
            "world size",
            $"the job has {all.Count} processes, the plan {ranks} {(ranks == 1 ? "rank" : "ranks")}: each rank is a process of its own",
            $"start {ranks} processes, or choose --tp, --pp, --ep, --dp for {all.Count}"), world.Stop);
    }

    private static List<(string Name, string Value)> Read(BinaryReader reader)
    {
        var facts = new List<(string, string)>();
        for (var left = reader.ReadCount(); left > 0; left--)
            facts.Add((reader.ReadString(), reader.ReadString()));
        return facts;
    }

    private static DiagnosticException Differs(int process, string name, string other, string mine)
        => DiagnosticException.Of(
            Codes.RanksDiffer,
            $"rank {process}, {name}",
            $"rank {process} has {name} {other}, rank 0 has {mine}",
            "start all processes with the same arguments, files and version of dsg");
}

// A job for a cluster, as dsg submit was asked for it: what runs where.

using System.Text.RegularExpressions;
using DeepSeekGraph.Models;

namespace DeepSeekGraph.Cli;

/// Nodes with as many ranks each; amounts that were not given are null.
internal sealed partial record Submission
{
    /// Ranks of a node where nothing is said.
    private const int DefaultPerNode = 8;

    /// Pods get an index behind it, and 63 characters are the most.
    private const int MostName = 40;

    public required string Name { get; init; }
    public required string Plan { get; init; }
    public required string Hash { get; init; }
    public required int Nodes { get; init; }
    public required int PerNode { get; init; }
    public required long BytesPerRank { get; init; }
    public int? GpusPerNode { get; init; }
    public int? CpusPerRank { get; init; }
    public string? Time { get; init; }
    public string? Partition { get; init; }
    public string? Account { get; init; }
    public string Program { get; init; } = "dsg";
    public string Image { get; init; } = "";
    public string Claim { get; init; } = "";

    /// Options of `dsg run`, behind the plan.
    public IReadOnlyList<string> Options { get; init; } = [];

    public int Ranks => Nodes * PerNode;

    /// Memory that processes need beside their slots: .NET and LibTorch.
    private const long BytesOfProcess = 1L << 30;

    /// Of a node, in MiB, for all its ranks.
    public long MebibytesPerNode => PerNode * (((long)(BytesPerRank * 1.25) + BytesOfProcess) >> 20);

    /// A name that Slurm and Kubernetes take: small letters, digits and hyphens.
    public static string NameOf(PlanSet plan)
    {
        var name = $"dsg-{OtherCharacters().Replace(PlanSummary.Name(plan).ToLowerInvariant(), "-").Trim('-')}";
        return name[..Math.Min(name.Length, MostName)].TrimEnd('-');
    }

    /// DSG0868 unless the ranks fill the nodes evenly. Of nodes, ranks and GPUs of a node, the others follow from what is given.
    public static (int Nodes, int PerNode) Shape(int ranks, int? nodes, int? perNode, int? gpus)
    {
        var each = perNode ?? gpus ?? (nodes is { } n and > 0 ? Math.Max(1, ranks / n) : Math.Min(ranks, DefaultPerNode));
        var count = nodes ?? (each > 0 ? (ranks + each - 1) / each : 0);
        if (each > 0 && count > 0 && (long)count * each == ranks)
            return (count, each);
        var legal = string.Join(", ", Enumerable.Range(1, ranks).Where(k => ranks % k == 0).Select(k => $"{ranks / k} x {k}").Take(12));
        throw Wrong("--nodes, --ranks-per-node", $"{ranks} ranks do not fill {count} nodes of {each}", $"nodes x ranks of each: {legal}");
    }

    /// A word of the cluster's own; DSG0868 for anything that could be more than a word.
    public static string? Word(string option, string? value)
        => value is null || PlainWord().IsMatch(value)
            ? value
            : throw Wrong(option, $"'{value}' is no plain word", "give letters, digits and any of . _ : / @ , + - =");

    /// A name of Kubernetes: DSG0868 for any other.
    public static string Label(string option, string value)
        => DnsLabel().IsMatch(value)
            ? value
            : throw Wrong(option, $"'{value}' is no name that Kubernetes takes", "give small letters, digits and hyphens, at most 50");

    internal static DiagnosticException Wrong(string at, string what, string help) => DiagnosticException.Of(Codes.SubmissionIllegal, at, what, help);

    [GeneratedRegex(@"^[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?\z")]
    private static partial Regex DnsLabel();

    [GeneratedRegex("[^a-z0-9]+")]
    private static partial Regex OtherCharacters();

    [GeneratedRegex(@"^[A-Za-z0-9_.:/@,+=-]{1,200}\z")]
    private static partial Regex PlainWord();
}

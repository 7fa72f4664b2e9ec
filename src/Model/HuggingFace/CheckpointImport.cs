// From a published checkpoint to one of any plan: tensor by tensor out of mapped files, each rank what it needs.

using DeepSeekGraph.Runtime.Checkpoints;
using DeepSeekGraph.Runtime.Parameters;

namespace DeepSeekGraph.Models.HuggingFace;

/// How weights are imported.
public sealed record ImportOptions
{
    /// fp32 or bf16; null: each parameter as the checkpoint has it, fp8 blocks as bf16. Biases of the router are fp32 always.
    public DType? DType { get; init; }

    /// Anything that is wrong ends the import; else it is told, what is missing starts as in a new model, what is unknown stays behind.
    public bool Strict { get; init; } = true;

    /// Of what a new model would begin with.
    public ulong Seed { get; init; } = 1234;

    /// Small files that export gives back.
    public IReadOnlyList<(string Name, byte[] Bytes)> Kept { get; init; } = [];

    /// Told of bytes written and of all there are, on any thread.
    public System.Action<long, long>? Progress { get; init; }
}

/// Tells what an import did.
public sealed record ImportOutcome(PlanSet Plan, long Bytes, IReadOnlyList<Diagnostic> Warnings);

/// Memory besides the mapped files is a megabyte a thread, whatever the size of the model.
public static class CheckpointImport
{
    /// Most names that one message lists.
    private const int MostNames = 1000;

    /// Writes iter_0000000 of `root` for the plan that `compile` makes of the model. All that is wrong is thrown together, a diagnostic for
    /// each code of CheckpointWeights.Check, and nothing is written; DSG0816, DSG0845.
    public static ImportOutcome Write(AutoBridge bridge, string root, Func<DeepSeekV3, PlanSet> compile, ImportOptions options)
    {
        var weights = bridge.Weights;
        var wrong = weights.Check(values: false);
        if (wrong.Count > 0 && options.Strict)
            throw new DiagnosticException(Together(bridge.Folder, weights.Check()));

        var plan = compile(bridge.ToModel());
        var set = bridge.Tensors;
        var tensors = weights.Map.Tensors(bridge.Config).ToDictionary(tensor => tensor.Name, StringComparer.Ordinal);
        var import = new WeightsImport(plan, [.. weights.Map.Entries.Select(Parameter)]);
        var (done, all) = (0L, import.Bytes);
        List<Diagnostic> warnings = [.. wrong];
        import.Write(root, options.Seed, options.Kept, Accept, bytes => options.Progress?.Invoke(Interlocked.Add(ref done, bytes), all));
        return new ImportOutcome(plan, all, Together(bridge.Folder, warnings));

        ImportedParameter Parameter(WeightEntry entry)
            => new(entry.Parameter, TypeOf(entry), [.. entry.Pieces.Select(Piece)]);

        ImportedPiece Piece(WeightPiece piece)
        {
            var place = weights.Map.Find(piece.Tensor)!;
            var fits = weights.Unfit(tensors[piece.Tensor]) is null;
            var scales = WeightMap.ScalesOf(piece.Tensor);
            return new ImportedPiece(
                piece.Tensor,
                new Shard(place.Start, place.Extents, place.Entry.Shape),
                fits ? set.FileOf(piece.Tensor) : null,
                fits && set.Info(piece.Tensor).DType == "F8_E4M3" ? set.FileOf(scales) : null);
        }

        string TypeOf(WeightEntry entry)
        {
            if (options.DType is { } given && !entry.Pieces.All(piece => tensors[piece.Tensor].Float32))
                return given.IsFloat32 ? "F32" : "BF16";
            return entry.Pieces.All(piece => !tensors[piece.Tensor].Float32
                    && (!set.Contains(piece.Tensor) || set.Info(piece.Tensor).DType is "BF16" or "F8_E4M3"))
                ? "BF16"
                : "F32";
        }

        bool Accept()
        {
            var found = import.NotFinite.Select(name => weights.NotFinite(name)).ToList();
            warnings.AddRange(found);
            return found.Count == 0 || !options.Strict ? true : throw new DiagnosticException(Together(bridge.Folder, found));
        }
    }

    /// One diagnostic for each code, which lists every tensor.
    internal static IReadOnlyList<Diagnostic> Together(string folder, IReadOnlyList<Diagnostic> found)
        => [.. found.GroupBy(d => d.Code).Select(same =>
        {
            var all = same.ToList();
            if (all.Count == 1)
                return all[0];
            var lines = all.Take(MostNames).Select(d => $"\n    {d.At[(d.At.LastIndexOf(", ", StringComparison.Ordinal) + 2)..]}: {d.Message}");
            var more = all.Count > MostNames ? $"\n    and {all.Count - MostNames} more" : "";
            return new Diagnostic(same.Key, folder, $"{all.Count} tensors are wrong:{string.Concat(lines)}{more}", all[0].Help);
        })];
}

// Writes published weights as a checkpoint of a plan: each rank's file is filled from the mapped parts that it needs.

using System.Collections.Concurrent;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Parameters;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// Nothing is gathered: bytes go from the mapped files to the rank's, a megabyte at a time, looked at on the way.
public sealed unsafe class WeightsImport
{
    private readonly PlanSet _plan;
    private readonly Dictionary<string, ImportedParameter> _weights;
    private readonly StateMap _map;
    private readonly ConcurrentDictionary<string, bool> _notFinite = new(StringComparer.Ordinal);

    /// Parameters of the plan that `weights` does not have are an ArgumentException.
    public WeightsImport(PlanSet plan, IReadOnlyList<ImportedParameter> weights)
    {
        _plan = plan;
        _weights = weights.ToDictionary(weight => weight.Name, StringComparer.Ordinal);
        var slots = StateSlot.Of(plan).Where(slot => slot.Kind.IsParameter).ToArray();
        if (slots.FirstOrDefault(slot => !_weights.ContainsKey(slot.Name)) is { } missing)
            throw new ArgumentException($"there is nothing for '{missing.Name}'", nameof(weights));
        _map = new StateMap(plan, slots);
    }

    /// Bytes of all files, but for their headers.
    public long Bytes => _map.Ranks.Sum(rank => _map.Specs(rank, TypeOf).Sum(spec => spec.Bytes));

    /// Tensors that hold NaN or infinity, in ordinal order; known once Write is done.
    public IReadOnlyList<string> NotFinite => [.. _notFinite.Keys.Order(StringComparer.Ordinal)];

    /// Writes iter_0000000 of a root. Where `accept` then says no, nothing is left of it. `progress` is told of bytes that are
    /// written, on any thread. DSG0816, DSG0845.
    public bool Write(
        string root, ulong seed, IReadOnlyList<(string Name, byte[] Bytes)> kept, Func<bool> accept, System.Action<long>? progress = null)
    {
        using var claim = CheckpointWriter.OnDisk(root, () => CheckpointRoot.Claim(root));
        using var writer = CheckpointWriter.Create(root, 0);
        var ranks = _map.Ranks;
        var files = new StoredFile[ranks.Count];
        try
        {
            Parallel.For(
                0,
                ranks.Count,
                new ParallelOptions { MaxDegreeOfParallelism = Environment.ProcessorCount },
                i => files[i] = WriteRank(writer, ranks[i], seed, progress));
        }
        catch (AggregateException e) when (e.InnerException is { } first)
        {
            System.Runtime.ExceptionServices.ExceptionDispatchInfo.Throw(first);
        }

        if (!accept())
            return false;
        var manifest = new CheckpointManifest
        {
            Version = CheckpointManifest.CurrentVersion,
            Step = 0,
            Sequences = 0,
            Seed = seed,
            Data = null,
            Recipe = _plan.Recipe,
            Training = [],
            Files = files,
            Kept = [.. kept.Select(file => writer.Keep(file.Name, file.Bytes))],
            Tensors = _map.Tensors(TypeOf),
        };
        writer.Commit(manifest, keep: 0);
        return true;
    }

    private string TypeOf(StateSlot slot) => _weights[slot.Name].Dtype;

    private StoredFile WriteRank(CheckpointWriter writer, int rank, ulong seed, System.Action<long>? progress)
    {
        var slots = _map.Of(rank).ToDictionary(slot => slot.Name, StringComparer.Ordinal);
        var place = Kernels.RankContext.At(_plan.Mesh, slots.Values.First().Stage, rank % Kernels.RankContext.RanksPerStage(_plan.Mesh));
        using var file = writer.Begin(rank, _map.Specs(rank, TypeOf));
        return CheckpointWriter.OnDisk(writer.Root, () =>
        {
            using var stream = new RunStream(file, name => _notFinite.TryAdd(name, true), progress);
            foreach (var tensor in file.Tensors)
            {
                var slot = slots[tensor.Name];
                WriteBox(stream, _weights[tensor.Name], Shard.Of(slot.Global, slot.Layout, place), seed);
            }

            return file.Finish();
        });
    }

    /// The box's elements in order: pieces fill the parameter in order, so what they share with a box follows one another too.
    private void WriteBox(RunStream stream, ImportedParameter weight, Shard box, ulong seed)
    {
        long filled = 0;
        foreach (var piece in weight.Pieces)
        {
            if (piece.Box.Common(box) is not { } common)
                continue;
            if (piece.File is null)
            {
                filled += WriteNew(stream, weight, common, seed);
                continue;
            }

            var info = piece.File.Info(piece.Name);
            var source = new RunSource(
                piece.Name,
                info.DType,
                (byte*)piece.File.Pointer(piece.Name),
                piece.Scales is null ? null : (float*)piece.Scales.Pointer(piece.ScalesName),
                info.Shape.Count == 2 ? info.Shape[1] : info.Elements);
            stream.Begin(source, weight.Dtype);
            BlockGrid.ForEachRun(common, piece.Box, box, (from, at, n) =>
            {
                if (at != filled)
                    throw new InvalidOperationException($"'{piece.Name}' does not follow the piece before it");
                stream.Add(from, n);
                filled += n;
            });
            stream.End();
        }

        if (filled != box.Extents.Aggregate(1L, (n, extent) => n * extent))
            throw new InvalidOperationException($"the pieces of '{weight.Name}' leave a gap");
    }

    /// What a new model of this seed would begin with.
    private long WriteNew(RunStream stream, ImportedParameter weight, Shard common, ulong seed)
    {
        Native.LibTorch.Load();
        var init = _plan.Parameters.First(parameter => parameter.Name == weight.Name).Init;
        using var values = empty([.. common.Extents.Select(e => (long)e)], dtype: ScalarType.Float32);
        ParameterInit.Fill(values, common, init, weight.Name, seed);
        stream.Begin(new RunSource(weight.Name, "F32", (byte*)values.Pointer(), null, values.numel()), weight.Dtype);
        // short runs are copied before the memory goes away
        const int run = 1 << 12;
        for (long at = 0; at < values.numel(); at += run)
            stream.Add(at, Math.Min(run, values.numel() - at));
        stream.End();
        return values.numel();
    }
}

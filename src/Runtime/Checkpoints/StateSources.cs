// From which tensor of a checkpoint each state of a plan is filled, whatever the plan that wrote it.

using DeepSeekGraph.Runtime.Execution;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Parameters;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// Made once, before anything is allocated; then each rank fills its own. Same type: bitwise. A parameter and its master weights stand
/// in for each other, the wider one where both are there. Without any optimizer state, moments start at zero.
public sealed unsafe class StateSources
{
    private const int MostNames = 200;

    private readonly CheckpointReader _checkpoint;
    private readonly Dictionary<string, StoredTensor> _sources = new(StringComparer.Ordinal);

    private StateSources(CheckpointReader checkpoint) => _checkpoint = checkpoint;

    /// What is not as a resumed run would have it, without being wrong.
    public IReadOnlyList<string> Remarks { get; private init; } = [];

    /// Everything that does not fit, in one diagnostic: DSG0844. `part`: the plan may have less than the checkpoint's model, as one that
    /// generates has no multi-token prediction.
    public static StateSources Of(PlanSet plan, CheckpointReader checkpoint, bool part = false)
    {
        var tensors = checkpoint.Manifest.Tensors;
        var hasOptimizer = tensors.Any(tensor => tensor.Kind == StoredTensor.Optimizer);
        List<(string Name, string Text)> missing = [], shapes = [], types = [];
        var slots = StateSlot.Of(plan);
        var sources = new StateSources(checkpoint)
        {
            Remarks = hasOptimizer || !slots.Any(slot => slot.Kind.IsOptimizer)
                ? []
                : ["the checkpoint holds weights only: moments of the optimizer start at zero"],
        };
        foreach (var slot in slots)
        {
            if (Source(checkpoint, slot) is not { } source)
            {
                if (hasOptimizer || IsWeight(slot.Name))
                    missing.Add((slot.Name, slot.Name));
                continue;
            }

            if (!source.Shape.SequenceEqual(slot.Global))
                shapes.Add((slot.Name, $"{slot.Name} is [{string.Join(", ", source.Shape)}] in the checkpoint, [{string.Join(", ", slot.Global)}] in the plan"));
            else if (!Elements.Converts(source.Dtype, Elements.NameOf(slot.DType)))
                types.Add((slot.Name, $"{slot.Name} is {source.Dtype} in the checkpoint, {slot.DType.Name} in the plan"));
            else
                sources._sources.Add(slot.Name, source);
        }

        var known = slots.Select(slot => StateSlot.ParameterOf(slot.Name)).ToHashSet(StringComparer.Ordinal);
        var unknown = tensors.Where(tensor => !part && !known.Contains(StateSlot.ParameterOf(tensor.Name))).Select(tensor => (tensor.Name, tensor.Name)).ToList();
        List<string> wrong =
        [
            .. Listed("missing in the checkpoint", WithoutStates(missing)),
            .. Listed("unknown to the plan", WithoutStates(unknown)),
            .. Listed("of another shape", WithoutStates(shapes)),
            .. Listed("of another type", WithoutStates(types)),
        ];
        return wrong.Count == 0
            ? sources
            : throw DiagnosticException.Of(
                Codes.CheckpointMismatch,
                checkpoint.Folder,
                $"the checkpoint is not of the plan's model: {string.Join("; ", wrong)}",
                "give the recipe and the --set model.KEY=VALUE of the run that saved it; parallelism and batch may differ");
    }

    /// Fills a rank's parameters and optimizer states; what the checkpoint does not have is zeroed.
    public void Load(RankRunner runner)
    {
        foreach (var value in runner.Persistent.Where(value => StateSlot.IsState(value.Info)))
        {
            if (!_sources.TryGetValue(value.Info.Name, out var source))
            {
                value.Tensor.zero_().On(value.Tensor);
                continue;
            }

            var box = Shard.Of(source.Shape, value.Info.Layout, runner.Rank);
            if (!box.Extents.SequenceEqual(value.Info.Extents))
                throw new InvalidOperationException($"slot {value.Info.Name} is [{string.Join(", ", value.Info.Extents)}], not its box");
            value.Tensor.FillOnHost(host => _checkpoint.CopyBox(source, box, Elements.NameOf(value.Info.DType), host.Pointer()));
        }
    }

    /// "3 missing: a, b, c"; nothing of none.
    internal static IEnumerable<string> Listed(string what, IReadOnlyList<string> names)
    {
        if (names.Count == 0)
            yield break;
        var shown = string.Join(", ", names.Take(MostNames).Select(Weights.SafeTensorsHeader.Clip));
        yield return $"{names.Count} {what}: {shown}" + (names.Count > MostNames ? $", and {names.Count - MostNames} more" : "");
    }

    /// States whose parameter is listed too say nothing new.
    private static List<string> WithoutStates(IReadOnlyList<(string Name, string Text)> wrong)
    {
        var names = wrong.Select(one => one.Name).ToHashSet(StringComparer.Ordinal);
        return [.. wrong.Where(one => StateSlot.ParameterOf(one.Name) is var p && (p == one.Name || !names.Contains(p))).Select(one => one.Text)];
    }

    private static bool IsWeight(string name)
        => name == StateSlot.ParameterOf(name) || name.StartsWith(StateSlot.Prefixes[0], StringComparison.Ordinal);

    /// The state of that name and type; of weights, else the wider of parameter and master.
    private static StoredTensor? Source(CheckpointReader checkpoint, StateSlot slot)
    {
        var same = checkpoint.Find(slot.Name);
        if (!IsWeight(slot.Name) || same?.Dtype == Elements.NameOf(slot.DType))
            return same;
        var parameter = StateSlot.ParameterOf(slot.Name);
        StoredTensor?[] both = [checkpoint.Find(parameter), checkpoint.Find(StateSlot.Prefixes[0] + parameter)];
        return both.OfType<StoredTensor>().MaxBy(tensor => Weights.SafeTensorTypes.BytesOf(tensor.Dtype));
    }
}

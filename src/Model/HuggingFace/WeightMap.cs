// One table from the project's parameters to the tensors of a published checkpoint.

using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Models.HuggingFace;

/// A checkpoint tensor and the contiguous part of a parameter that it is: elements [Offset, Offset + product of Shape).
public sealed record WeightPiece(string Tensor, IReadOnlyList<int> Shape, long Offset)
{
    public long Elements => Shape.Aggregate(1L, (n, extent) => n * extent);
}

/// A parameter, its own shape, and the checkpoint tensors that it is made of, in order and without a gap.
public sealed record WeightEntry(string Parameter, IReadOnlyList<int> Shape, IReadOnlyList<WeightPiece> Pieces)
{
    public long Elements => Shape.Aggregate(1L, (n, extent) => n * extent);
}

/// Where a checkpoint tensor lies in a parameter: the box [Start, Start + Extents) of its dims, row-major the tensor itself.
public sealed record WeightPlace(
    WeightEntry Entry, WeightPiece Piece, IReadOnlyList<int> Start, IReadOnlyList<int> Extents);

/// A tensor of a published checkpoint. `Original`: it repeats that tensor and is no parameter of its own. `Float32`: always
/// that type. `Blocks`: published in E4M3 with scales where the checkpoint is fp8.
public sealed record CheckpointTensor(
    string Name, IReadOnlyList<int> Shape, bool Float32, bool Blocks, string? Original = null);

/// Parameters are views of checkpoint tensors, or several of them one after the other: nothing is ever transposed.
public sealed class WeightMap
{
    private readonly Dictionary<string, WeightEntry> _byParameter;
    private readonly Dictionary<string, WeightPlace> _byTensor;

    private WeightMap(IReadOnlyList<WeightEntry> entries)
    {
        Entries = entries;
        _byParameter = entries.ToDictionary(entry => entry.Parameter, StringComparer.Ordinal);
        _byTensor = entries
            .SelectMany(entry => entry.Pieces.Select(piece => PlaceOf(entry, piece)))
            .ToDictionary(place => place.Piece.Tensor, StringComparer.Ordinal);
    }

    /// In the order of declaration.
    public IReadOnlyList<WeightEntry> Entries { get; }

    /// The entry of a parameter.
    public WeightEntry this[string parameter] => _byParameter[parameter];

    /// Is this a parameter of the model?
    public bool Has(string parameter) => _byParameter.ContainsKey(parameter);

    /// Where a checkpoint tensor belongs; null for one that is no part of a parameter: a copy, scales, or a stranger.
    public WeightPlace? Find(string tensor) => _byTensor.GetValueOrDefault(tensor);

    /// The table of a declared model.
    public static WeightMap Of(Graph graph)
        => new([.. ParameterList.Of(graph).Select(p => new WeightEntry(p.Name, p.Extents, Pieces(p.Name, p.Extents)))]);

    /// The table of a configuration's model.
    public static WeightMap Of(DeepSeekV3Config config) => Of(new DeepSeekV3(config).Declare(1, 1));

    /// Every tensor of a published checkpoint of this model, layer by layer; scales of fp8 blocks are not listed.
    public IEnumerable<CheckpointTensor> Tensors(DeepSeekV3Config config)
    {
        foreach (var piece in Entries.SelectMany(entry => entry.Pieces))
            yield return new(piece.Tensor, piece.Shape, IsFloat32(piece.Tensor), HasBlocks(piece.Tensor));
        foreach (var (copy, original) in Copies(config))
            yield return new(copy, Find(original)!.Piece.Shape, Float32: false, Blocks: false, original);
    }

    /// Checkpoint tensors that repeat the main model's: those of multi-token prediction's own embedding and head.
    public static IEnumerable<(string Copy, string Original)> Copies(DeepSeekV3Config config)
        => Enumerable.Range(config.NumHiddenLayers, config.NumNextnPredictLayers).SelectMany(
            layer => new[]
            {
                ($"model.layers.{layer}.embed_tokens.weight", "model.embed_tokens.weight"),
                ($"model.layers.{layer}.shared_head.head.weight", "lm_head.weight"),
            });

    /// The name of the scales of a weight in fp8 blocks.
    public static string ScalesOf(string tensor) => tensor + Fp8Blocks.ScaleSuffix;

    /// The weight whose scales a tensor is; null for any other tensor.
    public static string? WeightOfScales(string tensor)
        => tensor.EndsWith(".weight" + Fp8Blocks.ScaleSuffix, StringComparison.Ordinal) ? tensor[..^Fp8Blocks.ScaleSuffix.Length] : null;

    /// Fills a parameter from checkpoint tensors; DSG0704 where one has another number of elements.
    public float[] Gather(string parameter, Func<string, float[]> tensor)
    {
        var entry = this[parameter];
        var whole = new float[entry.Elements];
        foreach (var piece in entry.Pieces)
        {
            var values = tensor(piece.Tensor);
            if (values.Length != piece.Elements)
            {
                throw DiagnosticException.Of(
                    Codes.WeightsMismatch,
                    piece.Tensor,
                    $"the checkpoint's tensor has {values.Length} elements, "
                        + $"the model's [{string.Join(", ", piece.Shape)}] has {piece.Elements}",
                    "give the config.json that belongs to the checkpoint");
            }

            values.CopyTo(whole, piece.Offset);
        }

        return whole;
    }

    /// The checkpoint tensors in a parameter's values, or in its gradient's.
    public IEnumerable<(string Tensor, IReadOnlyList<int> Shape, float[] Values)> Scatter(string parameter, float[] whole)
        => this[parameter].Pieces.Select(
            piece => (piece.Tensor, piece.Shape, whole.AsSpan((int)piece.Offset, (int)piece.Elements).ToArray()));

    private static bool IsFloat32(string tensor) => tensor.EndsWith(".e_score_correction_bias", StringComparison.Ordinal);

    /// DeepSeek publishes the linear layers of attention and feed-forwards in fp8; embedding, head, gate, norms and eh_proj not.
    private static bool HasBlocks(string tensor)
        => (tensor.Contains(".self_attn.", StringComparison.Ordinal) || tensor.Contains(".mlp.", StringComparison.Ordinal))
            && (tensor.EndsWith("_proj.weight", StringComparison.Ordinal)
                || tensor.EndsWith("_proj_with_mqa.weight", StringComparison.Ordinal));

    /// Pieces cover whole trailing dims of their parameter and one index of each dim before these.
    private static WeightPlace PlaceOf(WeightEntry entry, WeightPiece piece)
    {
        var rank = entry.Shape.Count;
        int[] start = new int[rank], extents = new int[rank];
        var (at, left) = (piece.Offset, piece.Elements);
        for (var dim = rank - 1; dim >= 0; dim--)
        {
            var whole = entry.Shape[dim];
            extents[dim] = (int)Math.Min(left, whole);
            left /= extents[dim];
            start[dim] = extents[dim] == whole ? 0 : (int)(at % whole);
            at /= whole;
        }

        return new WeightPlace(entry, piece, start, extents);
    }

    private static IReadOnlyList<WeightPiece> Pieces(string name, int[] shape)
    {
        var (module, leaf) = SplitName(name);
        return (leaf, shape) switch
        {
            // expert banks: one tensor an expert, gate before up
            ("experts.gate_up_proj", [var experts, 2, var ffn, var hidden]) =>
            [
                .. Enumerable.Range(0, experts).SelectMany(e => new[] { "gate_proj", "up_proj" }.Select((half, i) =>
                    new WeightPiece(
                        $"{module}experts.{e}.{half}.weight", [ffn, hidden], ((2L * e) + i) * ffn * hidden))),
            ],
            ("experts.down_proj", [var experts, var hidden, var ffn]) =>
            [
                .. Enumerable.Range(0, experts).Select(e =>
                    new WeightPiece($"{module}experts.{e}.down_proj.weight", [hidden, ffn], (long)e * hidden * ffn)),
            ],
            ("gate_up_proj", [2, var ffn, var hidden]) =>
            [
                new WeightPiece($"{module}gate_proj.weight", [ffn, hidden], 0),
                new WeightPiece($"{module}up_proj.weight", [ffn, hidden], (long)ffn * hidden),
            ],
            // heads and their features are one dim in the checkpoint
            ("q_proj" or "q_b_proj" or "kv_b_proj", [var heads, var features, var inputs]) =>
                [new WeightPiece(name, [heads * features, inputs], 0)],
            ("o_proj", [var hidden, var heads, var features]) =>
                [new WeightPiece(name, [hidden, heads * features], 0)],
            _ => [new WeightPiece(name, shape, 0)],
        };
    }

    // "model.layers.1.mlp.experts.down_proj.weight" is "model.layers.1.mlp." and "experts.down_proj".
    private static (string Module, string Leaf) SplitName(string name)
    {
        var stem = name.EndsWith(".weight", StringComparison.Ordinal) ? name[..^".weight".Length] : name;
        var at = stem.LastIndexOf('.') + 1;
        const string Experts = "experts.";
        if (stem[..at].EndsWith("." + Experts, StringComparison.Ordinal))
            at -= Experts.Length;

        return (stem[..at], stem[at..]);
    }
}

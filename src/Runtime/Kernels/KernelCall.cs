// What a kernel is given: inputs, outputs, attributes and the place of its rank.
using System.Diagnostics;
using DeepSeekGraph.Runtime.Memory;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Kernels;

/// <summary>Runs one launch: reads inputs, writes outputs, keeps nothing.</summary>
public delegate void Kernel(in KernelCall call);

/// <summary>Where a rank stands: its coordinates on the mesh and its stage.</summary>
public sealed record RankContext(int Rank, int Stage, IReadOnlyList<int> Coordinates, IReadOnlyList<MeshAxis> Axes)
{
    /// <summary>Ranks that share a sequence in zigzag order.</summary>
    public int Context { get; init; } = 1;

    /// <summary>Place in the product of some mesh axes (slowest last in the list, major in the result).</summary>
    public int BlockOf(IReadOnlyList<long> axes)
    {
        var block = 0;
        for (var i = axes.Count - 1; i >= 0; i--)
            block = (block * Axes[(int)axes[i]].Size) + Coordinates[(int)axes[i]];
        return block;
    }

    /// <summary>The rank at coordinates of a stage; axis 0 is the fastest.</summary>
    public static RankContext At(MeshInfo mesh, int stage, int place)
    {
        var coordinates = new int[mesh.Axes.Count];
        var rest = place;
        for (var i = 0; i < coordinates.Length; i++)
            (rest, coordinates[i]) = Math.DivRem(rest, mesh.Axes[i].Size);
        return new RankContext((stage * RanksPerStage(mesh)) + place, stage, coordinates, mesh.Axes) { Context = mesh.Context };
    }

    /// <summary>Ranks of one stage: the product of the mesh axes.</summary>
    public static int RanksPerStage(MeshInfo mesh) => mesh.Axes.Aggregate(1, (n, a) => n * a.Size);
}

/// <summary>One launch. Inputs are set; outputs are filled or adopted by the kernel.</summary>
public readonly ref struct KernelCall(
    IReadOnlyList<Attribute> attributes, ReadOnlySpan<SlotValue> inputs, ReadOnlySpan<SlotValue> outputs, RankContext rank)
{
    public readonly ReadOnlySpan<SlotValue> Inputs = inputs;
    public readonly ReadOnlySpan<SlotValue> Outputs = outputs;
    public readonly RankContext Rank = rank;
    private readonly IReadOnlyList<Attribute> _attributes = attributes;

    /// <summary>Attributes given.</summary>
    public int AttributeCount => _attributes.Count;

    /// <summary>The tensor of input i.</summary>
    public Tensor In(int i) => Inputs[i].Tensor;

    /// <summary>The row set of input i.</summary>
    public RowSet Route(int i) => Inputs[i].Rows;

    /// <summary>The cell of output i.</summary>
    public SlotValue Out(int i = 0) => Outputs[i];

    /// <summary>Attribute i as an integer.</summary>
    public int Int(int i)
        => _attributes[i] switch
        {
            Attribute.Int { Value: var value } => checked((int)value),
            Attribute.Ints { Values: { Count: 1 } values } => checked((int)values[0]),
            var other => throw Wrong(i, other, "an integer"),
        };

    /// <summary>Attribute i as a number.</summary>
    public double Float(int i)
        => _attributes[i] switch
        {
            Attribute.Float { Value: var value } => value,
            Attribute.Int { Value: var value } => value,
            var other => throw Wrong(i, other, "a number"),
        };

    /// <summary>Attribute i as integers; empty when it is not given.</summary>
    public IReadOnlyList<long> Ints(int i)
        => i >= _attributes.Count ? [] : _attributes[i] is Attribute.Ints { Values: var values } ? values : throw Wrong(i, _attributes[i], "integers");

    /// <summary>Attribute i as a word of a closed grammar.</summary>
    public string Text(int i) => _attributes[i] is Attribute.Text { Value: var value } ? value : throw Wrong(i, _attributes[i], "text");

    /// <summary>Attribute i as the code that a GPU runs.</summary>
    public KernelPath Path(int i) => KernelPath.TryParse(Text(i), out var path) ? path : throw Wrong(i, _attributes[i], "library or exact");

    private static UnreachableException Wrong(int i, Attribute given, string wanted)
        => new($"attribute {i} is {given}, not {wanted}; this is a bug in dsg");
}

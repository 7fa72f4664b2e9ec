// A weight of a checkpoint in its most precise form: whole, or bf16 with the remainder of its fp32 master.

using DeepSeekGraph.Runtime.Kernels;
using DeepSeekGraph.Runtime.Memory;
using DeepSeekGraph.Runtime.Native;
using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Weights;
using static TorchSharp.torch;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// `Tensor`: the weight or its master. With a `Remainder` it is the bf16 weight, and the values are the fp32 master of both.
public sealed unsafe record StoredWeight(StoredTensor Tensor, StoredTensor? Remainder)
{
    private const long Piece = 1 << 20;

    /// The master where there is one, whole or by its remainder, else the parameter; null where the checkpoint has neither.
    public static StoredWeight? Of(CheckpointReader checkpoint, string parameter)
    {
        StoredTensor? weight = checkpoint.Find(parameter), master = checkpoint.Find(StateSlot.Master + parameter);
        if (weight is not null && checkpoint.Find(StateSlot.Remainder + parameter) is { } remainder)
            return new(weight, remainder);
        StoredTensor?[] both = [weight, master];
        return both.OfType<StoredTensor>().MaxBy(tensor => SafeTensorTypes.BytesOf(tensor.Dtype)) is { } wider ? new(wider, null) : null;
    }

    /// Can its values be had? A remainder goes with bf16 of its own shape.
    internal bool IsSound
        => Elements.IsFloat(Tensor.Dtype)
            && (Remainder is null || (Remainder.Dtype == "I16" && Tensor.Dtype == "BF16" && Remainder.Shape.SequenceEqual(Tensor.Shape)));

    /// What it is made of, for messages.
    internal string Types => Remainder is null
        ? Tensor.Dtype
        : $"{Tensor.Dtype} [{string.Join(", ", Tensor.Shape)}] with a remainder of {Remainder.Dtype} [{string.Join(", ", Remainder.Shape)}]";

    /// A box of its values in fp32, in another shape of as many elements; the caller disposes it.
    public Tensor Values(CheckpointReader checkpoint, Shard box, IReadOnlyList<int> shape)
    {
        LibTorch.Load();
        var values = empty([.. shape.Select(e => (long)e)], dtype: ScalarType.Float32);
        CopyTo<F32>(checkpoint, box, values.Pointer());
        return values;
    }

    /// A box of its values, row-major, each stored as T stores an fp32 number; a few MB at a time.
    internal void CopyTo<T>(CheckpointReader checkpoint, Shard box, void* target)
        where T : struct, IElement
    {
        var row = box.Extents.Skip(1).Aggregate(1L, (n, extent) => n * extent);
        var most = (int)Math.Clamp(Piece / Math.Max(1, row), 1, Math.Max(1, box.Extents[0]));
        var values = new float[most * row];
        ushort[] weights = Remainder is null ? [] : new ushort[values.Length];
        short[] remainders = Remainder is null ? [] : new short[values.Length];
        fixed (float* value = values)
        fixed (ushort* weight = weights)
        fixed (short* remainder = remainders)
        {
            for (var first = 0; first < box.Extents[0]; first += most)
            {
                var rows = Math.Min(most, box.Extents[0] - first);
                var part = new Shard([box.Start[0] + first, .. box.Start.Skip(1)], [rows, .. box.Extents.Skip(1)], box.Global);
                if (Remainder is null)
                    checkpoint.CopyBox(Tensor, part, "F32", value);
                else
                {
                    checkpoint.CopyBox(Tensor, part, "BF16", weight);
                    checkpoint.CopyBox(Remainder, part, "I16", remainder);
                    Halves.Join(weight, remainder, value, rows * row);
                }

                Simd.Copy<F32, T>(value, 0, target, first * row, rows * row);
            }
        }
    }
}

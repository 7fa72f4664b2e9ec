// Published weights on their way into a checkpoint: which part of which parameter a mapped tensor is.

using DeepSeekGraph.Runtime.Parameters;
using DeepSeekGraph.Runtime.Weights;

namespace DeepSeekGraph.Runtime.Checkpoints;

/// A tensor of mapped files that holds a box of a parameter, row-major; `Scales`, where it is of fp8 blocks. Without a file the box
/// starts as that of a new model.
public sealed record ImportedPiece(string Name, Shard Box, SafeTensorsFile? File, SafeTensorsFile? Scales = null)
{
    /// The name of the scales in their file.
    public string ScalesName => Name + Fp8Blocks.ScaleSuffix;
}

/// A parameter, the element type it is stored in (F32 or BF16), and its pieces: they fill it in row-major order, one after the other.
public sealed record ImportedParameter(string Name, string Dtype, IReadOnlyList<ImportedPiece> Pieces);

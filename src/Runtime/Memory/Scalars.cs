// Scalars that live for ever, for calls whose own default is a temporary.
namespace DeepSeekGraph.Runtime.Memory;

/// <summary>
/// TorchSharp's implicit factor of an addition is a temporary that the garbage collector may free while LibTorch still
/// reads it (seen under load: "Expected false to be true" from Scalar.h).
/// </summary>
internal static class Scalars
{
    /// <summary>1, for any element type.</summary>
    public static readonly TorchSharp.Scalar One = 1L;
}

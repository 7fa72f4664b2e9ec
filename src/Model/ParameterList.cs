// The parameters of a declared model, and how many numbers they are.

namespace DeepSeekGraph.Models;

/// A parameter as declared.
public sealed record DeclaredParameter(string Name, ParameterSpec Spec, TensorType Type)
{
    public int[] Extents => Type.Extents;
}

/// What a graph has to learn.
public static class ParameterList
{
    /// In the order of declaration.
    public static IEnumerable<DeclaredParameter> Of(Graph graph)
        => graph.Nodes
            .Select(node => node.Op)
            .OfType<Op.Parameter>()
            .Select(p => new DeclaredParameter(p.Spec.Name, p.Spec, p.Type));

    /// Numbers in all parameters, the router's biases included.
    public static long Count(Graph graph) => Of(graph).Sum(p => p.Type.Elements);
}

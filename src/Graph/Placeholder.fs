/// The graph: axes, types, ops, builder.
namespace DeepSeekGraph

/// The compiler: from a graph and a recipe to a plan.
namespace DeepSeekGraph.Compiler

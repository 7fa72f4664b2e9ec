/// The naive reference evaluator.
namespace DeepSeekGraph.Reference

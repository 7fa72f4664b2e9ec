// DeepSeek-V3 as declarations.
namespace DeepSeekGraph.Models;

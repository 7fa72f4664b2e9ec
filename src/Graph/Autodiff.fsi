/// Reverse mode: graph in, graph out.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Autodiff

/// The forward graph plus the gradient of output `loss` (a scalar) by every parameter that AdamW updates.
/// Outputs `grad:<parameter>` are added, one for each model unit that uses the parameter (their sum is the gradient).
val differentiate: loss: string -> graph: Graph -> Result<Graph, Diagnostic list>

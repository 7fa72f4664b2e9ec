/// The ledger of diagnostic codes: 01 graph, 02 autodiff, 03 partition, 04 fusion, 05 schedule, 06 plan, 07 model, 08 runtime, 09 command line.
namespace DeepSeekGraph

/// Every code has a page docs/errors/<code>.md; ids are never reused.
[<RequireQualifiedAccess>]
module Codes =
    /// Axes of an op's operands do not fit its signature.
    [<Literal>]
    let AxisClash = "DSG0101"

    /// Element types of an op's operands do not fit.
    [<Literal>]
    let TypeClash = "DSG0102"

    /// A graph breaks an invariant (order, names, types).
    [<Literal>]
    let IllegalGraph = "DSG0103"

    /// The text form of a graph does not parse.
    [<Literal>]
    let GraphText = "DSG0104"

    /// A gradient is asked for through an op that has none.
    [<Literal>]
    let NotDifferentiable = "DSG0201"

    /// LibTorch is not where it is expected.
    [<Literal>]
    let LibTorchMissing = "DSG0801"

    /// LibTorch is there but does not load.
    [<Literal>]
    let LibTorchBroken = "DSG0802"

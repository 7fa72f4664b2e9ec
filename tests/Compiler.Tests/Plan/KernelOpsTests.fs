/// Ops and launches say the same.
module DeepSeekGraph.Compiler.Tests.KernelOpsTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler

let private float32 axes = TensorType.create DType.Float32 axes
let private x = float32 [ "batch", 2; "seq", 4; "hidden", 6 ]

let private yarn = {
    Dim = 8
    Theta = 10000.0
    Factor = 40.0
    Original = 4096.0
    BetaFast = 32.0
    BetaSlow = 1.0
    Mscale = 1.25
}

let private routing = {
    Score = ScoreFunction.Sigmoid
    Choice = {
        TopK = 2
        Groups = 2
        KeepGroups = 1
        ZeroMasked = false
        GroupScore = GroupScore.BestTwo
    }
    Normalize = true
    Eps = 1e-20
    Factor = 2.5
}

let private heads features =
    TensorType.create DType.BFloat16 [ "batch", 1; "seq", 64; "heads", 2; $"features_%i{features}", features ]

let private routed dtype axes = {
    TensorType.create dtype ([ "batch", 2; "seq", 4; "experts", 8 ] @ axes) with
        Routed = true
        Density = 0.25
}

let private rows width = routed DType.BFloat16 [ $"features_%i{width}", width ]
let private route = routed DType.Bool []

/// Ops with attributes, on operands that suit them.
let private samples = [
    Op.Constant(0.5, x), []
    Op.Iota { Name = "seq"; Extent = 4 }, []
    Op.Add, [ x; x; x ]
    Op.Add, [ x; float32 [ "hidden", 6 ] ]
    Op.Mul, [ x; float32 [ "seq", 4 ] ]
    Op.Sub, [ x; x ]
    Op.Div, [ x; float32 [ "seq", 4; "batch", 2 ] ]
    Op.Scale 0.25, [ x ]
    Op.Offset -1.0, [ x ]
    Op.Cast DType.BFloat16, [ x ]
    Op.Slice("hidden", 2, 3), [ x ]
    Op.Pad("seq", 1, 7), [ x ]
    Op.Concat "seq", [ x; x ]
    Op.Transpose [ 1; 2; 0 ], [ x ]
    Op.Contract "b s k+, n k+ -> b s n", [ x; float32 [ "ffn", 5; "hidden", 6 ] ]
    Op.Sum [ "seq" ], [ x ]
    Op.Max [ "hidden"; "batch" ], [ x ]
    Op.RmsNorm 1e-6, [ x; float32 [ "hidden", 6 ] ]
    Op.RmsNormGradX 1e-6, [ x; x; float32 [ "hidden", 6 ] ]
    Op.RmsNormGradW 1e-6, [ x; x ]
    Op.AddRmsNorm 1e-6, [ x; x; float32 [ "hidden", 6 ] ]
    Op.RmsNormGradXAdd 1e-6, [ x; x; float32 [ "hidden", 6 ]; x ]
    Op.Router routing, [ x; float32 [ "hidden", 6 ] ]
    Op.Router {
        routing with
            Score = ScoreFunction.Softmax
            Choice = {
                routing.Choice with
                    GroupScore = GroupScore.Best
            }
    },
    [ x; float32 [ "hidden", 6 ] ]
    Op.RouterGrad routing, [ x; x; TensorType.create DType.Bool [ "batch", 2; "seq", 4; "hidden", 6 ] ]
    Op.Balance(2, 1e-20), [ x; float32 [ "batch", 2; "seq", 4 ] ]
    Op.BalanceGrad 1e-20, [ float32 [ "batch", 2; "hidden", 6 ]; x; float32 [ "batch", 2; "seq", 4 ] ]
    Op.LinearLogSumExp 2,
    [
        x
        float32 [ "vocab", 8; "hidden", 6 ]
        TensorType.create DType.Int64 [ "batch", 2; "seq", 4 ]
        TensorType.create DType.Int64 [ "vocab", 8 ]
    ]
    Op.LinearCrossEntropyGrad,
    [
        x
        float32 [ "vocab", 8; "hidden", 6 ]
        TensorType.create DType.Int64 [ "batch", 2; "seq", 4 ]
        TensorType.create DType.Int64 [ "vocab", 8 ]
        float32 [ "batch", 2; "seq", 4 ]
    ]
    Op.RotaryTable yarn, [ TensorType.create DType.Int64 [ "seq", 4 ] ]
    Op.Rope true, [ x; float32 [ "seq", 4; "rope_table", 6 ] ]
    Op.GroupTopK {
        TopK = 2
        Groups = 2
        KeepGroups = 1
        ZeroMasked = true
        GroupScore = GroupScore.BestTwo
    },
    [ x ]
    Op.Route(2, 8), [ TensorType.create DType.Bool [ "batch", 2; "seq", 4; "experts", 8 ] ]
    Op.Attention 0.125, [ heads 192; heads 192; heads 128 ]
    Op.AttentionGrad 0.125,
    [
        heads 128
        heads 192
        heads 192
        heads 128
        heads 128
        float32 [ "batch", 1; "heads", 2; "seq", 64 ]
    ]
    Op.GroupedMatMul true,
    [
        rows 8
        TensorType.create DType.BFloat16 [ "experts", 8; "ffn", 8; "hidden", 6 ]
        route
    ]
    Op.GroupedWeightGrad, [ rows 8; rows 16; route ]
    Op.Permute true, [ x; route ]
]

let tests =
    testList "Plan.KernelOps" [
        testCase "the launch of an op is the op"
        <| fun () ->
            for op, inputs in samples do
                let inputs = Array.ofList inputs

                match OpDef.infer (Catalog.define op) inputs with
                | Error text -> failtestf "%A: %s" op text
                | Ok(_, outputs) ->
                    let kernel, attributes = (KernelOps.ofOp AttentionBackend.Auto op inputs outputs).Value
                    Expect.equal (KernelOps.toOp kernel (Array.ofList attributes) inputs outputs) (Ok op) ""

        testCase "a launch keeps its meaning when slots have other names"
        <| fun () ->
            for op, inputs in samples do
                let inputs = Array.ofList inputs

                match OpDef.infer (Catalog.define op) inputs with
                | Error text -> failtestf "%A: %s" op text
                | Ok(_, outputs) ->
                    let kernel, attributes = (KernelOps.ofOp AttentionBackend.Auto op inputs outputs).Value
                    let attributes = Array.ofList attributes

                    let foreign =
                        inputs
                        |> Array.mapi (fun i t -> {
                            t with
                                Axes = t.Axes |> Array.mapi (fun d a -> { a with Name = $"other%i{i}_%i{d}" })
                        })

                    let operands = KernelOps.operands kernel attributes foreign

                    match KernelOps.toOp kernel attributes operands outputs with
                    | Error text -> failtestf "%A: %s" op text
                    | Ok again ->
                        match OpDef.infer (Catalog.define again) operands with
                        | Error text -> failtestf "%A: %s" again text
                        | Ok(_, results) ->
                            Expect.equal (results |> Array.map _.Extents) (outputs |> Array.map _.Extents) $"%A{op}"

        testCase "every kernel refuses foreign attributes"
        <| fun () ->
            for kernel in Enum.GetValues<KernelId>() do
                let nonsense = [| Attribute.Text "x"; Attribute.Int -1L; Attribute.Float nan |]
                Expect.isError (KernelOps.toOp kernel nonsense [| x |] [| x |]) (string kernel)
    ]

/// Parameters, inputs, constants and iota: values that no other value determines.
module DeepSeekGraph.Ops.Sources

open DeepSeekGraph

let private source name (t: TensorType) = {
    Name = name
    Axes =
        OpDef.taking 0 (fun _ ->
            Ok {
                Factors =
                    t.Axes
                    |> Array.mapi (fun d a -> {
                        Letter = a.Name
                        Mark = Mark.Plain
                        Extent = a.Extent
                        Operands = [||]
                        Results = [| d |]
                    })
                ResultAxes = [| t.Axes |]
            })
    Result = fun _ -> Ok [| t.DType |]
    Rows = fun _ -> [| OpDef.density t |]
    Linear = Linearity.No
    Vjp = Vjp.Stop
    Flops = OpDef.free
    Fusion = Fusion.Opaque
}

let parameter (t: TensorType) = source "parameter" t
let input (t: TensorType) = source "input" t
let cache (t: TensorType) = source "cache" t
let constant (t: TensorType) = source "constant" t
let iota (axis: Axis) = source "iota" (TensorType.create DType.Int64 [ axis.Name, axis.Extent ])

/// What one MoE layer of DeepSeek-V3 keeps for its backward pass, tensor by tensor; docs/memory.md has the same table.
module DeepSeekGraph.Models.Tests.MemoryTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Lowering
open DeepSeekGraph.Models
open DeepSeekGraph.Testing

/// Three layers of the published width, one dense: the second is the layer looked at. Tokens as in the published estimate.
let private plan =
    lazy
        (let config = DeepSeekV3Config(NumHiddenLayers = 3, FirstKDenseReplace = 1, NumNextnPredictLayers = 0)

         let recipe = Recipe.Default.WithParallelism(1, 1, 64, 64).WithBatch(64, 1, 4096).WithDType(DType.BFloat16)

         DeepSeekV3(config).Compile recipe)

/// A slot that outlives the forward program.
type private Kept = {
    Path: string
    Maker: string
    Shape: string
    Bytes: int64
}

let private layer = "model.layers.1"

let private kept (plan: PlanSet) : Kept list =
    let stage = plan.Stages[0]
    let lifetimes = Arena.lifetimes stage
    let forward = stage.Programs |> Seq.find _.Phase.IsF

    [
        for step in forward.Steps do
            let made =
                match step with
                | Step.Launch(kernel, _, _, outputs, path) -> Some(path, kernel.ToString(), outputs)
                | Step.Start(_, collective, _, _, outputs, path) -> Some(path, collective.ToString(), outputs)
                | Step.Wait _
                | Step.Free _ -> None

            match made with
            | Some(path, maker, outputs) when path = layer || path.StartsWith(layer + ".") ->
                for id in outputs do
                    match lifetimes[id] with
                    | Arena.Lifetime.Across _ ->
                        let slot = stage.Slots[id]
                        let axes = Seq.map2 (fun (a: string) (n: int) -> $"%s{a} %i{n}") slot.Axes slot.Extents

                        {
                            Path = path.Substring(layer.Length).TrimStart '.'
                            Maker = maker
                            Shape = $"%s{slot.DType.Name}[%s{String.Join(',', axes)}]"
                            Bytes = Memory.bytesOf plan.Mesh Memory.Rows.Balanced slot
                        }
                    | _other -> ()
            | _other -> ()
    ]

/// Tensors of the published estimate (Megatron-MoE-ModelZoo's deepseek_mem_estimate.py: 4096 tokens, TP 1, bf16), in MiB,
/// and what stands for each here: path, maker and place among equals.
let private published = [
    "layer input", 56.0, [ "", "Add" ], "the sum that ends a layer is the next one's input"
    "norm out", 56.0, [ "", "RmsNorm" ], ""
    "q_down / q_norm", 24.0, [ "self_attn", "Contract"; "self_attn", "RmsNorm q_lora" ], ""
    "kv_compressed / kv_norm", 8.0, [ "self_attn", "Slice"; "self_attn", "RmsNorm kv_lora" ], ""
    "q / k / v after RoPE", 512.0, [ "self_attn", "RopeQ"; "self_attn", "RopeKv" ], ""
    "attention out", 128.0, [ "self_attn", "Attention v_dim" ], ""
    "LSE", 2.0, [ "self_attn", "Attention seq" ], ""
    "post-attention residual and shared-expert input",
    112.0,
    [ "", "AddRmsNorm" ],
    "the sum and its norm, of one kernel"
    "probs and row map",
    10.0,
    [
        "mlp.gate", ""
        "mlp.gate.balance", ""
        "mlp.experts", "Route"
        "mlp.experts", "RouteToExperts"
        "mlp.experts", "RowsToExperts experts"
    ],
    "logits in fp32, a mask of a byte an expert, row sets and one-wide rows; theirs keeps 8 bytes a token and expert"
    "shared fc1 / act", 48.0, [ "mlp.shared_experts", "" ], ""
    "permuted tokens", 448.0, [ "mlp.experts", "RowsToExperts hidden" ], "kept as dispatched, by expert"
    "expert fc1 / act", 384.0, [ "mlp.experts", "GroupedMatMul"; "mlp.experts", "SwiGluProbs" ], ""
    "combined-A2A output",
    448.0,
    [],
    "probabilities are applied inside SwiGLU, so combining is a plain sum that keeps nothing"
]

let private mib (bytes: int64) = float bytes / 1048576.0

let private number (x: float) = x.ToString("F2", Globalization.CultureInfo.InvariantCulture)

/// Does a tensor stand for an entry: the path, and the maker, with the last axis where makers are equal?
let private stands (k: Kept) (path: string, maker: string) =
    let last =
        k.Shape.TrimEnd(']').Split(',')
        |> Array.last
        |> fun axis -> (axis.Split ' ')[0] |> fun a -> (a.Split '[') |> Array.last

    k.Path = path
    && (maker = ""
        || (maker = k.Maker && not (maker = "RmsNorm" && path <> ""))
        || maker = $"%s{k.Maker} %s{last}")

let private layerTable () = [
    let list = kept plan.Value

    for name, theirs, entries, why in published do
        let mine = list |> List.filter (fun k -> entries |> List.exists (stands k)) |> List.sumBy _.Bytes
        let difference = mib mine - theirs
        $"| %s{name} | %s{number theirs} | %s{number (mib mine)} | %s{number difference} | %s{why} |"

    let sum = published |> List.sumBy (fun (_, theirs, _, _) -> theirs)
    let mine = list |> List.sumBy _.Bytes
    $"| **sum** | %s{number sum} | %s{number (mib mine)} | %s{number (mib mine - sum)} | |"
]

let private gib (bytes: int64) = number (float bytes / float (1L <<< 30))

/// What ranks of the published estimate's job hold beside activations: PP 16, EP 64, TP 1 on 2048 ranks.
let private states =
    lazy (Recipes.Pretrain.Config, Recipes.Pretrain.Recipe.WithParallelism(1, 16, 64, 128).WithBatch(4096, 1, 4096))

let private stateTable (plan: PlanSet) = [
    for row in plan.Memory do
        let held = row.Parameters + row.Gradients + row.Optimizer

        $"| %i{row.Stage} | %s{plan.Stages[row.Stage].Units} | %s{gib row.Parameters} | %s{gib row.Gradients} | %s{gib row.Optimizer} | %s{gib held} | %s{gib row.Activations} | %s{gib row.Headroom} | %s{gib row.Arena} |"
]

let private head =
    "| stage | units | parameters | gradients | optimizer | states | activations | peak with headroom | arena |\n|---|---|---|---|---|---|---|---|---|"

/// The tables of docs/memory.md, by name.
let private tables =
    lazy
        (let lines (rows: string list) = String.Join("\n", rows)
         let config, recipe = states.Value

         [
             "layer",
             "| tensor | published | here | difference | why |\n|---|---|---|---|---|\n" + lines (layerTable ())
             "published-job", head + "\n" + lines (stateTable ((DeepSeekV3 config).Compile recipe))
             "pretrain", head + "\n" + lines (stateTable (Recipes.Pretrain.Compile()))
         ])

let tests =
    testList "memory of a MoE layer" [
        testCase "every tensor kept stands for exactly one of the published list"
        <| fun () ->
            for k in kept plan.Value do
                let times = published |> List.filter (fun (_, _, entries, _) -> entries |> List.exists (stands k))
                Expect.equal times.Length 1 $"%A{k}"

        testCase "the published list sums to 2236 MiB, and the layer keeps less by combined rows and the row map"
        <| fun () ->
            Expect.equal (published |> List.sumBy (fun (_, theirs, _, _) -> theirs)) 2236.0 "published"
            let mine = kept plan.Value |> List.sumBy _.Bytes |> mib
            // 448 of combined rows, 10 of probabilities and row map against about 5
            Expect.floatClose { absolute = 1.0; relative = 0.0 } mine (2236.0 - 448.0 - 10.0 + 5.2) "here"

        testCase "states of four layers are the published parameters at the recipe's bytes, and routers and norms"
        <| fun () ->
            let config, recipe = states.Value
            let row = ((DeepSeekV3 config).Compile recipe).Memory[1]
            let held = row.Parameters + row.Gradients + row.Optimizer
            let dense, routed = 4.0 * (187.1e6 + 44.04e6), 16.0 * 44.04e6
            let published = dense * (6.0 + 12.0 / 128.0) + routed * (6.0 + 12.0 / 2.0)
            Expect.floatClose { absolute = 0.05; relative = 0.0 } (published / float (1L <<< 30)) 13.12 "published"
            let here = dense * (4.0 + 8.0 / 128.0) + routed * (4.0 + 8.0 / 2.0)
            let rest = float held - here
            // four routers of 256 x 7168 in fp32, and norms
            Expect.isGreaterThan rest 0.0 "routers and norms"
            Expect.isLessThan rest (4.0 * 256.0 * 7168.0 * 12.0) "routers and norms"

        testCase
            "deepseek_v3_proxy keeps 10 bytes a parameter: weight, gradient, both moments and remainder in 16 bits each"
        <| fun () ->
            let plan = Recipes.Proxy.Compile()
            let numbers (p: ParameterInfo) = p.Extents |> Seq.fold (fun n e -> n * int64 e) 1L
            let trained = plan.Parameters |> Seq.filter _.Update.IsAdamW |> Seq.sumBy numbers
            let biases = plan.Parameters |> Seq.filter _.Update.IsRouterBias |> Seq.sumBy numbers
            let row = plan.Memory[0]
            let held = row.Parameters + row.Gradients + row.Optimizer
            Expect.equal held (10L * trained + 4L * biases) "bytes"
            Expect.floatClose { absolute = 0.005; relative = 0.0 } (float held / 1e9) 59.75 "GB"

        Documents.agrees "memory.md" tables
    ]

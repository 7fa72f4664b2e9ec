/// The golden cases: small checkpoints with what Hugging Face's implementation computes from them.
module DeepSeekGraph.Models.Tests.Golden

open System
open System.IO
open DeepSeekGraph
open DeepSeekGraph.Models
open DeepSeekGraph.Models.HuggingFace
open DeepSeekGraph.Runtime.Weights

/// The repository's folder, above the test program's.
let root =
    let rec up (folder: DirectoryInfo) =
        if File.Exists(Path.Combine(folder.FullName, "DeepSeekGraph.sln")) then
            folder.FullName
        else
            up (nonNull folder.Parent)

    up (DirectoryInfo AppContext.BaseDirectory)

let path (case: string) (file: string) = Path.Combine(root, "tests", "golden", case, file)

/// One case, cut to its first sequences and positions: causality leaves their logits what they are.
type Case = {
    Model: DeepSeekV3
    Graph: Graph
    Map: WeightMap
    Weights: SafeTensorsFile
    Reference: SafeTensorsFile
    Batch: int
    SeqLength: int
    Depths: int
    /// input_ids of the case, whole.
    Ids: int64[]
    IdsLength: int
} with

    interface IDisposable with
        member this.Dispose() =
            this.Weights.Dispose()
            this.Reference.Dispose()

let load (case: string) (batch: int) (seqLength: int) : Case =
    let reference = SafeTensorsFile.Open(path case "reference.safetensors")
    let config = ConfigJson.Read(path case "config.json").LikeHuggingFace()

    let config =
        if reference.Contains "mtp_scale" then
            config.WithMtpLossScalingFactor(float (Array.exactlyOne (reference.ReadFloat32 "mtp_scale")))
        else
            config

    let model = DeepSeekV3(config, Observe = true)
    let graph = model.Declare(batch, seqLength)

    {
        Model = model
        Graph = graph
        Map = WeightMap.Of graph
        Weights = SafeTensorsFile.Open(path case "model.safetensors")
        Reference = reference
        Batch = batch
        SeqLength = seqLength
        Depths = config.NumNextnPredictLayers
        Ids = reference.ReadInt64 "input_ids"
        IdsLength = int (reference.Info "input_ids").Shape[1]
    }

/// A parameter in the project's layout.
let parameter (case: Case) (name: string) : float32[] =
    case.Map.Gather(name, Func<string, float32[]>(fun tensor -> case.Weights.ReadFloat32 tensor))

/// An input of the graph: positions whose label lies behind the case's ids count nothing.
let input (case: Case) (name: string) : float[] =
    let positions = case.SeqLength

    let counted depth = min positions (case.IdsLength - 1 - depth)

    let mask depth = Array.init (case.Batch * positions) (fun i -> if i % positions < counted depth then 1.0 else 0.0)

    match name with
    | "tokens" -> [|
        for b in 0 .. case.Batch - 1 do
            for s in 0 .. positions + case.Depths ->
                if s < case.IdsLength then float case.Ids[b * case.IdsLength + s] else 0.0
      |]
    | "loss_mask" -> mask 0
    | "mtp_mask" -> mask 1
    | "inv_tokens" -> [| 1.0 / float (case.Batch * counted 0) |]
    | "inv_mtp_tokens" -> [| 1.0 / float (case.Batch * counted 1) |]
    | other -> failwith $"no input %s{other}"

/// Largest difference relative to the reference's largest magnitude; where the reference is all zero, the largest magnitude.
let distance (ours: float[]) (reference: float32[]) =
    if ours.Length <> reference.Length then
        infinity
    else
        let scale = reference |> Array.fold (fun m v -> max m (abs (float v))) 0.0
        let mutable largest = 0.0

        for i in 0 .. ours.Length - 1 do
            let d = abs (ours[i] - float reference[i])
            largest <- if Double.IsNaN d then infinity else max largest d

        if scale > 0.0 then largest / scale else largest

/// The gradients that the reference has, ours by checkpoint name from those by parameter; every one is met or a test fails.
let gradients (case: Case) (name: string) (ours: string -> float[]) : (string * float[] * float32[]) list =
    use reference = SafeTensorsFile.Open(path name "reference_grads.safetensors")

    let met = [
        for entry in case.Map.Entries do
            if not (entry.Parameter.EndsWith "e_score_correction_bias") then
                let whole = ours entry.Parameter |> Array.map float32

                for struct (tensor, _, values) in case.Map.Scatter(entry.Parameter, whole) do
                    tensor, Array.map float values, reference.ReadFloat32 $"grad.%s{tensor}"
    ]

    let names = [ for tensor, _, _ in met -> $"grad.%s{tensor}" ]

    if List.sort names <> List.sort (List.ofSeq reference.Names) then
        failwith $"%s{name}: gradients of the model are not those of the reference"

    met

/// The part of reference logits [rows, columns, vocab] that [batch, seq, vocab] of a cut case covers, and ours cut alike.
let cut (case: Case) (columns: int) (ours: float[]) (reference: float32[]) =
    let width = ours.Length / (case.Batch * case.SeqLength)
    let common = min case.SeqLength columns

    let take (xs: 'T[]) perRow =
        Array.concat [
            for b in 0 .. case.Batch - 1 -> Array.sub xs (b * perRow * width) (common * width)
        ]

    take ours case.SeqLength, take reference columns

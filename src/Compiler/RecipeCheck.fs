/// What keeps a recipe from being compiled for a model, found before any pass runs.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.RecipeCheck

open DeepSeekGraph
open DeepSeekGraph.Compiler.Partition

/// Axes that the mesh axes which split them do not divide.
let divides (recipe: Recipe) (mesh: MeshInfo) (graph: Graph) : Diagnostic list =
    let map = AxisMap.create recipe.SequenceParallel recipe.Dispatcher mesh
    let tokens = Map.find "residual" map.Anchors

    let checks = [
        for node in graph.Nodes do
            match node.Op with
            | Op.Parameter(spec, t) ->
                for a in t.Axes do
                    match Map.tryFind a.Name map.Parameters with
                    | Some axes -> spec.Name, a, axes
                    | None -> ()
            | Op.Anchor name when name = "residual" ->
                for a in graph.Types[node.Outputs[0]].Axes do
                    match Map.tryFind a.Name tokens with
                    | Some axes -> node.Origin.Path, a, axes
                    | None -> ()
            | _other -> ()
    ]

    [
        for path, axis, axes in checks do
            let size = Layout.size mesh axes

            if axis.Extent % size <> 0 then
                let names = axes |> List.map (fun m -> mesh.Axes[m].Name) |> String.concat " x "

                let legal = [
                    for n in 1 .. axis.Extent do
                        if axis.Extent % n = 0 && n <= 4096 then
                            string n
                ]

                {
                    Code = Codes.NotDivisible
                    At = $"%s{path}, recipe %s{recipe.Name}"
                    Message =
                        $"axis '%s{axis.Name}' (%i{axis.Extent}) does not split over mesh axes %s{names} (%i{size})"
                    Help = $"""choose a product of degrees from %s{String.concat " " legal}"""
                }
    ]
    |> List.distinctBy (fun d -> d.Message)

/// What would cut a block of one fp8 scale that one rank has whole: a split of experts' features (rows are not gathered to mend
/// that), and the zigzag order of context parallelism, which moves half blocks of tokens apart.
let fp8Blocks (recipe: Recipe) (mesh: MeshInfo) (graph: Graph) : Diagnostic list =
    let etp, n = mesh.ExpertTensor, recipe.Fp8Block

    [
        if n > 0 && mesh.Context > 1 && recipe.SeqLength % (2 * mesh.Context * n) <> 0 then
            {
                Code = Codes.NotDivisible
                At = $"recipe.seq_length, recipe %s{recipe.Name}"
                Message =
                    $"a sequence of %i{recipe.SeqLength} in zigzag order over cp (%i{mesh.Context}) moves in pieces of %i{recipe.SeqLength / (2 * mesh.Context)}, no multiple of the fp8 block (%i{n})"
                Help = "choose a longer sequence, a smaller context parallel degree, or bf16"
            }

        for node in graph.Nodes do
            match node.Op with
            | Op.Parameter(spec, t) when n > 0 && etp > 1 && Array.contains "experts" t.Names ->
                for a in t.Axes do
                    if a.Name = "expert_ffn" && a.Extent % (etp * n) <> 0 && a.Extent % etp = 0 then
                        {
                            Code = Codes.NotDivisible
                            At = $"%s{spec.Name}, recipe %s{recipe.Name}"
                            Message =
                                $"axis 'expert_ffn' (%i{a.Extent}) split over etp (%i{etp}) leaves %i{a.Extent / etp}, no multiple of the fp8 block (%i{n})"
                            Help = "choose a smaller expert tensor degree, or bf16"
                        }
            | _other -> ()
    ]
    |> List.distinctBy (fun d -> d.Message)

let private notCompiled setting message help = {
    Code = Codes.NotCompiledYet
    At = $"recipe.%s{setting}"
    Message = message + " is not compiled yet"
    Help = help
}

/// Settings that no pass carries out: refused, never ignored.
let unsupported (recipe: Recipe) : Diagnostic list = [
    if recipe.Mode.IsGenerate && recipe.Context > 1 then
        notCompiled
            "context"
            $"generation over a context parallel degree of %i{recipe.Context}"
            "choose 1, and tensor, pipeline, expert and data parallel degrees instead"

    if recipe.RanksPerNode < 1 then
        {
            Code = Codes.MeshDegree
            At = "recipe.ranks_per_node"
            Message = $"a node of %i{recipe.RanksPerNode} ranks"
            Help = "give the GPUs of a node, usually 8"
        }

    if recipe.PermutePadding < 1 || recipe.PermutePadding > Lowering.Padding.most then
        {
            Code = Codes.PermutePadding
            At = "recipe.permute_padding"
            Message =
                $"blocks of a multiple of %i{recipe.PermutePadding} rows; it is at least 1 and at most %i{Lowering.Padding.most}"
            Help = "choose 1 for none, 16 or 32 for fp8 products, or 128 for DeepGEMM's blocks"
        }

    // small updates vanish in 8 bits of mantissa: a bf16 master would need stochastic rounding
    if recipe.StateTypes.MainParams.IsBFloat16 then
        notCompiled
            "optimizer.main_params_dtype"
            $"main_params_dtype %s{recipe.StateTypes.MainParams.Name}"
            "choose fp32, or remainder: 16 bits that with the weight are an fp32 master"
]

/// Microbatches of a step, or why the batch does not fall into them.
let batches (recipe: Recipe) (mesh: MeshInfo) : Result<int, Diagnostic list> =
    let wrong message help =
        Error [
            {
                Code = Codes.BatchSize
                At = "recipe.batch"
                Message = message
                Help = help
            }
        ]

    let together = recipe.MicroBatch * mesh.Data

    if recipe.MicroBatch < 1 || recipe.GlobalBatch < 1 || recipe.SeqLength < 1 then
        wrong
            $"global batch %i{recipe.GlobalBatch}, micro batch %i{recipe.MicroBatch} and sequence length %i{recipe.SeqLength} must be at least 1"
            ""
    elif recipe.GlobalBatch % together <> 0 then
        let below = recipe.GlobalBatch / together * together
        let near = if below = 0 then string together else $"%i{below} or %i{below + together}"

        wrong
            $"global batch %i{recipe.GlobalBatch} is no multiple of micro batch %i{recipe.MicroBatch} x data %i{mesh.Data}"
            $"choose a global batch of %s{near}"
    elif recipe.Mode.IsGenerate && recipe.GlobalBatch <> together then
        wrong
            $"a plan that generates has one microbatch: global batch %i{recipe.GlobalBatch} is not micro batch %i{recipe.MicroBatch} x data %i{mesh.Data}"
            $"choose a global batch of %i{together}"
    else
        Ok(recipe.GlobalBatch / together)

/// The schedule that a recipe comes to and the pipeline it is for, or why they do not go together.
let pipeline (recipe: Recipe) (mesh: MeshInfo) : Result<struct (Schedule * PipelineShape), Diagnostic list> =
    batches recipe mesh
    |> Result.bind (fun microbatches ->
        let shape = {
            Ranks = mesh.Pipeline
            Chunks = recipe.VirtualPipeline
            Microbatches = microbatches
            Group = recipe.MicrobatchGroup
            Pairs = recipe.OverlapMoeExpertParallelComm && recipe.Mode.IsTrain
        }

        match Timetable.check recipe.Schedule shape with
        | [] -> Ok(struct (Timetable.resolve recipe.Schedule shape, Timetable.grouped shape))
        | wrong -> Error wrong)

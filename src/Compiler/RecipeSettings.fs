/// Every choice of a recipe by name: how it is read, written as text, and recorded in a plan.
namespace DeepSeekGraph.Compiler

open System
open System.Collections.Generic
open System.Globalization
open System.Runtime.InteropServices
open DeepSeekGraph

/// One choice of a recipe.
type Setting = {
    /// As in plans, `dsg recipes show` and `--set`.
    Key: string
    /// What may be given, in words.
    Values: string
    Read: Recipe -> string
    /// The recipe with another value; None where the text is none.
    Write: Recipe -> string -> Recipe option
} with

    /// The recipe's choice, as text.
    member this.Value(recipe: Recipe) : string = this.Read recipe

    /// The recipe with another choice; false where the text is none.
    member this.TryChange(recipe: Recipe, text: string, [<Out>] changed: byref<Recipe>) : bool =
        match this.Write recipe text with
        | Some other ->
            changed <- other
            true
        | None ->
            changed <- recipe
            false

/// The list of settings; its order is that of a plan's recipe lines.
[<RequireQualifiedAccess>]
module RecipeSettings =
    let private invariant = CultureInfo.InvariantCulture

    let private setting key values read write = {
        Key = key
        Values = values
        Read = read
        Write = write
    }

    let private text key values read (write: Recipe -> string -> Recipe) =
        setting key values read (fun recipe value -> Some(write recipe value))

    let private number key (read: Recipe -> int) (write: Recipe -> int -> Recipe) =
        setting key "a whole number" (fun r -> (read r).ToString invariant) (fun recipe value ->
            match Int32.TryParse(value, NumberStyles.None, invariant) with
            | true, n -> Some(write recipe n)
            | false, _ -> None)

    let private real key (read: Optimizer -> float) (write: Optimizer -> float -> Optimizer) =
        let readText (r: Recipe) = (read r.Optimizer).ToString("R", invariant)

        setting key "a number such as 0.95" readText (fun recipe value ->
            match Double.TryParse(value, NumberStyles.Float, invariant) with
            | true, x when Double.IsFinite x -> Some(recipe.WithOptimizer(write recipe.Optimizer x))
            | _notFinite -> None)

    /// One of a closed list.
    let private choice key (all: 'a seq) (name: 'a -> string) (read: Recipe -> 'a) (write: Recipe -> 'a -> Recipe) =
        setting key ("one of " + String.Join(" ", Seq.map name all)) (read >> name) (fun recipe value ->
            all |> Seq.tryFind (fun a -> name a = value) |> Option.map (write recipe))

    let private flag key read write = choice key [ true; false ] (sprintf "%b") read write

    let private names (value: string) = [
        for name in value.Split(',', StringSplitOptions.RemoveEmptyEntries ||| StringSplitOptions.TrimEntries) -> name
    ]

    let private budget = "budget="

    let private recomputation (r: Recipe) =
        let names = [
            yield! r.Recompute
            if r.RecomputeBudget > 0L then
                $"%s{budget}%i{r.RecomputeBudget}"
        ]

        if names.IsEmpty then "none" else String.Join(",", names)

    /// Names of what is recomputed, a budget, or both: the recipe with them; None where an amount is none.
    let withRecomputation (r: Recipe) (value: string) : Recipe option =
        let budgets, names = names value |> List.partition _.StartsWith(budget)

        match budgets |> List.map (fun word -> ByteSize.tryParse (word.Substring budget.Length)), names with
        | [], [ "none" ] -> Some(r.WithRecompute([||]).WithRecomputeBudget 0L)
        | [], names -> Some(r.WithRecompute(Array.ofList names).WithRecomputeBudget 0L)
        | [ ValueSome bytes ], names -> Some(r.WithRecompute(Array.ofList names).WithRecomputeBudget bytes)
        | _several, _ -> None

    /// all, none, rules to apply, or rules to leave out ("-permute").
    let private fusions (value: string) =
        match value with
        | "all" -> Some FusionChoice.All
        | "none" -> Some FusionChoice.None
        | _rules ->
            match names value with
            | [] -> None
            | rules when rules |> List.forall _.StartsWith('-') ->
                Some(FusionChoice.AllBut(rules |> List.map _.Substring(1)))
            | rules when rules |> List.exists _.StartsWith('-') -> None
            | rules -> Some(FusionChoice.Only rules)

    let private degrees (change: Recipe -> int -> struct (int * int * int * int)) =
        fun (r: Recipe) n ->
            let struct (tensor, pipeline, expert, data) = change r n
            r.WithParallelism(tensor, pipeline, expert, data)

    let private stateType key (read: StateTypes -> DType) (write: StateTypes -> DType -> StateTypes) =
        choice key [ DType.Float32; DType.BFloat16 ] _.Name (fun r -> read r.StateTypes) (fun r dtype ->
            let t = write r.StateTypes dtype
            r.WithStateTypes(t.MainParams, t.MainGrads, t.ExpAvg, t.ExpAvgSq))

    /// THE list. A degree of 0 is one not given.
    let all: Setting list = [
        text "name" "a name" _.Name _.WithName
        choice "mode" Mode.All _.Name _.Mode _.WithMode
        number "tensor" _.Tensor (degrees (fun r n -> struct (n, r.Pipeline, r.Expert, r.Data)))
        number "context" _.Context _.WithContextParallel
        number "data" _.Data (degrees (fun r n -> struct (r.Tensor, r.Pipeline, r.Expert, n)))
        number "pipeline" _.Pipeline (degrees (fun r n -> struct (r.Tensor, n, r.Expert, r.Data)))
        number "expert_tensor" _.ExpertTensor _.WithExpertTensorParallel
        number "expert" _.Expert (degrees (fun r n -> struct (r.Tensor, r.Pipeline, n, r.Data)))
        number "virtual_pipeline" _.VirtualPipeline (fun r n -> r.WithVirtualPipeline(n, r.MicrobatchGroup))
        number "microbatch_group" _.MicrobatchGroup (fun r n -> r.WithVirtualPipeline(r.VirtualPipeline, n))
        flag "sequence_parallel" _.SequenceParallel _.WithSequenceParallel
        choice "dispatcher" Dispatcher.All _.Name _.Dispatcher _.WithDispatcher
        number "ranks_per_node" _.RanksPerNode _.WithRanksPerNode
        number "permute_padding" _.PermutePadding _.WithPermutePadding
        text "layout" "a layout such as Et|tmL" _.Layout _.WithLayout
        choice "schedule" Schedule.All _.Name _.Schedule _.WithSchedule
        number "global_batch_size" _.GlobalBatch (fun r n -> r.WithBatch(n, r.MicroBatch, r.SeqLength))
        number "micro_batch_size" _.MicroBatch (fun r n -> r.WithBatch(r.GlobalBatch, n, r.SeqLength))
        number "seq_length" _.SeqLength (fun r n -> r.WithBatch(r.GlobalBatch, r.MicroBatch, n))
        choice
            "dtype"
            [ "fp32"; "bf16"; "fp8" ]
            id
            (fun r -> if r.Fp8Block > 0 && r.DType = DType.BFloat16 then "fp8" else r.DType.Name)
            (fun r name ->
                match name with
                | "fp32" -> r.WithDType(DType.Float32).WithFp8 0
                | "bf16" -> r.WithDType(DType.BFloat16).WithFp8 0
                | _fp8 -> r.WithDType(DType.BFloat16).WithFp8 128)
        number "fp8_block" _.Fp8Block _.WithFp8
        setting
            "fusions"
            "all, none, rules (permute,unpermute) or rules to leave out (-permute)"
            (fun r -> r.Fusions.ToString())
            (fun r value -> fusions value |> Option.map r.WithFusions)
        choice "attention_backend" AttentionBackend.All _.Name _.AttentionBackend _.WithAttentionBackend
        setting
            "recompute"
            $"none, names such as core_attn with commas between, or budget=BYTES, %s{ByteSize.forms}"
            recomputation
            (fun r value -> withRecomputation r value)
        real "optimizer.beta1" _.Beta1 (fun o x -> { o with Beta1 = x })
        real "optimizer.beta2" _.Beta2 (fun o x -> { o with Beta2 = x })
        real "optimizer.eps" _.Eps (fun o x -> { o with Eps = x })
        real "optimizer.weight_decay" _.Decay (fun o x -> { o with Decay = x })
        real "optimizer.clip_grad" _.ClipNorm (fun o x -> { o with ClipNorm = x })
        flag "optimizer.distributed" _.DistributedOptimizer _.WithDistributedOptimizer
        flag "overlap_grad_reduce" _.OverlapGradReduce _.WithOverlapGradReduce
        number "grad_bucket_size" _.GradBucketSize _.WithGradBucketSize
        flag "overlap" _.Overlap _.WithOverlap
        flag "overlap_moe_expert_parallel_comm" _.OverlapMoeExpertParallelComm _.WithOverlapMoeExpertParallelComm
        choice "optimizer.main_params_dtype" MainParams.All _.Name _.StateTypes.MainParams (fun r kept ->
            let t = r.StateTypes
            r.WithStateTypes(kept, t.MainGrads, t.ExpAvg, t.ExpAvgSq))
        stateType "optimizer.main_grads_dtype" _.MainGrads (fun t d -> { t with MainGrads = d })
        stateType "optimizer.exp_avg_dtype" _.ExpAvg (fun t d -> { t with ExpAvg = d })
        stateType "optimizer.exp_avg_sq_dtype" _.ExpAvgSq (fun t d -> { t with ExpAvgSq = d })
    ]

    /// `key=value` lines in a fixed order, then the facts: a record of the choices, kept in the plan.
    let lines (recipe: Recipe) : IReadOnlyList<string> =
        [|
            for s in all -> $"%s{s.Key}=%s{s.Read recipe}"
            yield! recipe.Facts
        |]
        :> IReadOnlyList<string>

/// Mixtures of experts as the published code of DeepSeek-V3 and V2 computes them, one token and one expert after the other.
module DeepSeekGraph.Models.Tests.RouterTests

open System
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Reference
open DeepSeekGraph.Models

let private hidden, private experts, private ffn = 6, 8, 3

/// Positions of the largest, the first among equals.
let private top k (values: float[]) =
    [ 0 .. values.Length - 1 ] |> List.sortBy (fun i -> -values[i], i) |> List.truncate k

/// The experts of a token and their weights, from its logits.
let private chosen (c: DeepSeekV3Config) (bias: float[]) (logits: float[]) : (int * float) list =
    let scores =
        if c.ScoringFunc = ScoringFunc.Softmax then
            let total = logits |> Array.sumBy exp
            logits |> Array.map (fun z -> exp z / total)
        else
            logits |> Array.map (fun z -> 1.0 / (1.0 + exp -z))

    let groupsOf (values: float[]) = Array.chunkBySize (experts / c.NGroup) values
    let inGroups kept lost = Array.mapi (fun e s -> if List.contains (e / (experts / c.NGroup)) kept then s else lost)

    let best =
        match c.TopkMethod with
        | TopkMethod.Greedy -> top c.NumExpertsPerTok scores
        | TopkMethod.GroupLimitedGreedy ->
            let kept = groupsOf scores |> Array.map Array.max |> top c.TopkGroup
            scores |> inGroups kept 0.0 |> top c.NumExpertsPerTok
        | _noaux ->
            let biased = Array.map2 (+) scores bias

            let kept =
                groupsOf biased
                |> Array.map (Array.sortDescending >> Array.truncate 2 >> Array.sum)
                |> top c.TopkGroup

            biased |> inGroups kept -infinity |> top c.NumExpertsPerTok

    let weights = best |> List.map (fun e -> scores[e])
    let shares () = weights |> List.map (fun w -> w / (List.sum weights + 1e-20))
    let scaled = List.map ((*) c.RoutedScalingFactor)

    let weights =
        match c.TopkMethod with
        | TopkMethod.NoauxTc -> (if c.NormTopkProb then shares () else weights) |> scaled
        // either normalised or scaled
        | _greedy when c.NormTopkProb && c.NumExpertsPerTok > 1 -> shares ()
        | _greedy -> scaled weights

    List.zip best weights

let private random = Random 5

let private normal (extents: int list) = {
    Extents = Array.ofList extents
    Data = Array.init (List.fold (*) 1 extents) (fun _ -> 2.0 * random.NextDouble() - 1.0)
}

let private feed =
    Map [
        "x", normal [ 2; 5; hidden ]
        "gate.weight", normal [ experts; hidden ]
        "gate.e_score_correction_bias", normal [ experts ]
        "experts.gate_up_proj.weight", normal [ experts; 2; ffn; hidden ]
        "experts.down_proj.weight", normal [ experts; hidden; ffn ]
    ]

let private at (name: string) (index: int list) = Dense.at feed[name] (Array.ofList index)

/// One token through its experts.
let private token (c: DeepSeekV3Config) b s =
    let x h = at "x" [ b; s; h ]
    let dot f n = Seq.sum [ for i in 0 .. n - 1 -> f i ]
    let logits = Array.init experts (fun e -> dot (fun h -> at "gate.weight" [ e; h ] * x h) hidden)
    let bias = feed["gate.e_score_correction_bias"].Data
    let y = Array.zeroCreate hidden

    for e, weight in chosen c bias logits do
        let half which f = dot (fun h -> at "experts.gate_up_proj.weight" [ e; which; f; h ] * x h) hidden

        let inner =
            Array.init ffn (fun f ->
                let gate = half 0 f
                gate / (1.0 + exp -gate) * half 1 f)

        for h in 0 .. hidden - 1 do
            y[h] <- y[h] + weight * dot (fun f -> at "experts.down_proj.weight" [ e; h; f ] * inner[f]) ffn

    y

let private declared (c: DeepSeekV3Config) =
    let declaration = Declaration()
    let m = ModelScope declaration

    let x = m.Input("x", DType.Float32, struct ("batch", 2), struct ("seq", 5), struct ("hidden", hidden))

    m.Output("y", Experts.Moe(m, x, c))
    declaration.ToGraph()

let private rules = [
    for scoring in [ ScoringFunc.Sigmoid; ScoringFunc.Softmax ] do
        for how in [ TopkMethod.NoauxTc; TopkMethod.GroupLimitedGreedy; TopkMethod.Greedy ] do
            for normalize in [ true; false ] do
                for topK in [ 1; 3 ] do
                    DeepSeekV3Config(
                        HiddenSize = hidden,
                        NRoutedExperts = experts,
                        NumExpertsPerTok = topK,
                        MoeIntermediateSize = ffn,
                        NSharedExperts = 0,
                        NGroup = 4,
                        TopkGroup = 2,
                        ScoringFunc = scoring,
                        TopkMethod = how,
                        NormTopkProb = normalize,
                        RoutedScalingFactor = 2.5
                    )
]

let tests =
    testList "mixtures by the published rules" [
        for c in rules do
            testCase $"%A{c.ScoringFunc}, %A{c.TopkMethod}, normalised %b{c.NormTopkProb}, top %i{c.NumExpertsPerTok}"
            <| fun () ->
                let graph = declared c
                let given name = feed[name]
                let fused, applied = Fusion.Fuse.run graph
                Expect.equal (applied |> List.find (fun (name, _) -> name = "router") |> snd) 1 "fused"

                Expect.equal
                    (ParameterList.Of graph |> Seq.exists _.Name.EndsWith("_bias"))
                    (c.TopkMethod = TopkMethod.NoauxTc)
                    "a bias only where it decides"

                for name, graph in [ "declared", graph; "fused", fused ] do
                    let y = (Evaluator.run graph given given).Output "y"

                    for b in 0..1 do
                        for s in 0..4 do
                            let expected = token c b s

                            for h in 0 .. hidden - 1 do
                                Expect.floatClose
                                    { absolute = 1e-9; relative = 1e-9 }
                                    (Dense.at y [| b; s; h |])
                                    expected[h]
                                    $"%s{name}, token %i{b} %i{s}"
    ]

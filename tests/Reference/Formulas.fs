/// Definitions that are more than one product or one scalar function: rotary tables, attention, norms, top-k.
module DeepSeekGraph.Reference.Formulas

open System
open DeepSeekGraph

/// Inverse frequencies of YaRN (arXiv 2309.00071, as in DeepSeek's and Hugging Face's code).
let inverseFrequencies (spec: RotarySpec) : float[] =
    let d = float spec.Dim
    let plain j = spec.Theta ** (-2.0 * float j / d)

    /// The feature whose wavelength makes `rotations` turns within the original context.
    let correction rotations = d * log (spec.Original / (rotations * 2.0 * Math.PI)) / (2.0 * log spec.Theta)

    if spec.Factor = 1.0 then
        Array.init (spec.Dim / 2) plain
    else
        let low = max (floor (correction spec.BetaFast)) 0.0
        let high = min (ceil (correction spec.BetaSlow)) (d - 1.0)
        let width = if low = high then 0.001 else high - low

        Array.init (spec.Dim / 2) (fun j ->
            let ramp = Math.Clamp((float j - low) / width, 0.0, 1.0)
            plain j / spec.Factor * ramp + plain j * (1.0 - ramp))

/// table[s, j] = cos, table[s, dim/2 + j] = sin of position x frequency j.
let rotaryTable (spec: RotarySpec) (positions: DenseTensor) =
    let frequencies = inverseFrequencies spec
    let half = spec.Dim / 2

    Dense.init (Array.append positions.Extents [| spec.Dim |]) (fun i ->
        let feature = Array.last i
        let angle = Dense.at positions i[.. i.Length - 2] * frequencies[feature % half]
        spec.Mscale * (if feature < half then cos angle else sin angle))

/// Feature r of a vector rotated at sequence position s; `read` gives the vector's features.
let rotated inverse (table: DenseTensor) (s: int) (r: int) (read: int -> float) =
    let half = table.Extents[1] / 2
    let c = Dense.at table [| s; r / 2 |]
    let n = Dense.at table [| s; half + r / 2 |]
    let n = if inverse then -n else n
    // pairs (0, 1), (2, 3), ... stay in place
    if r % 2 = 0 then read r * c - read (r + 1) * n else read (r - 1) * n + read r * c

let private set (index: int[]) d value =
    let copy = Array.copy index
    copy[d] <- value
    copy

/// x[..., d] with its last table-width features rotated; `seq` is the dim of positions.
let rope inverse (seq: int) (x: DenseTensor) (table: DenseTensor) =
    let last = x.Extents.Length - 1
    let kept = x.Extents[last] - table.Extents[1]

    Dense.init x.Extents (fun i ->
        if i[last] < kept then
            Dense.at x i
        else
            rotated inverse table i[seq] (i[last] - kept) (fun r -> Dense.at x (set i last (kept + r))))

/// The same with a table [batch, seq, width] of positions that differ by sequence: x begins with batch and seq.
let ropeEach inverse (x: DenseTensor) (table: DenseTensor) =
    let tables =
        Array.init table.Extents[0] (fun b ->
            Dense.init table.Extents[1..] (fun i -> Dense.at table [| b; i[0]; i[1] |]))

    let last = x.Extents.Length - 1
    Dense.init x.Extents (fun i -> rotated inverse tables[i[0]] i[1] i[last] (fun r -> Dense.at x (set i last r)))

let private resized (index: int[]) d extent = set index d extent

/// k = nope features of kv, then the rotated shared key; v = the rest of kv.
let ropeKv nope (kv: DenseTensor) (kPe: DenseTensor) (table: DenseTensor) =
    let k =
        Dense.init (resized kv.Extents 3 (nope + kPe.Extents[2])) (fun i ->
            if i[3] < nope then
                Dense.at kv i
            else
                rotated false table i[1] (i[3] - nope) (fun r -> Dense.at kPe [| i[0]; i[1]; r |]))

    let v = Dense.init (resized kv.Extents 3 (kv.Extents[3] - nope)) (fun i -> Dense.at kv (set i 3 (i[3] + nope)))

    [| k; v |]

/// dkv joins the nope part of dk with dv; the shared key's part is rotated back and summed over heads.
let ropeKvGrad nope (dk: DenseTensor) (dv: DenseTensor) (table: DenseTensor) =
    let dkv =
        Dense.init (resized dk.Extents 3 (nope + dv.Extents[3])) (fun i ->
            if i[3] < nope then Dense.at dk i else Dense.at dv (set i 3 (i[3] - nope)))

    let heads = dk.Extents[2]

    let dkPe =
        Dense.init [| dk.Extents[0]; dk.Extents[1]; dk.Extents[3] - nope |] (fun i ->
            List.sum [
                for h in 0 .. heads - 1 ->
                    rotated true table i[1] i[2] (fun r -> Dense.at dk [| i[0]; i[1]; h; nope + r |])
            ])

    [| dkv; dkPe |]

/// Sum over d of q[b, i, n, d] k[b, j, n, d].
let private dot (q: DenseTensor) (k: DenseTensor) b n i j =
    List.sum [
        for d in 0 .. q.Extents[3] - 1 -> Dense.at q [| b; i; n; d |] * Dense.at k [| b; j; n; d |]
    ]

/// The last key that query i sees.
let private seen (positions: DenseTensor option) (i: int) =
    match positions with
    | Some p -> int p.Data[i]
    | None -> i

/// out, and lse[b, n, s] = log of the sum of exp of the scores of keys up to the query.
let attention scale (q: DenseTensor) (k: DenseTensor) (v: DenseTensor) (positions: DenseTensor option) =
    let batch, seq, heads = q.Extents[0], q.Extents[1], q.Extents[2]

    let lse =
        Dense.init [| batch; heads; seq |] (fun index ->
            let b, n, i = index[0], index[1], index[2]
            let scores = [ for j in 0 .. seen positions i -> scale * dot q k b n i j ]
            let top = List.max scores
            top + log (List.sumBy (fun s -> exp (s - top)) scores))

    let out =
        Dense.init (resized q.Extents 3 v.Extents[3]) (fun index ->
            let b, i, n, e = index[0], index[1], index[2], index[3]

            List.sum [
                for j in 0 .. seen positions i ->
                    exp (scale * dot q k b n i j - Dense.at lse [| b; n; i |]) * Dense.at v [| b; j; n; e |]
            ])

    [| out; lse |]

/// The cache with each sequence's rows at their positions; of two rows at one position the last stays.
let cacheWrite (cache: DenseTensor) (rows: DenseTensor) (positions: DenseTensor) =
    Dense.init cache.Extents (fun i ->
        let b, place, w = i[0], i[1], i[2]

        [ rows.Extents[1] - 1 .. -1 .. 0 ]
        |> List.tryFind (fun s -> Dense.at positions [| b; s |] = float place)
        |> function
            | Some s -> Dense.at rows [| b; s; w |]
            | None -> Dense.at cache i)

/// Softmax over cached rows 0 .. position of scale q . row, times the first `value` features of the rows.
let cacheAttention scale value (q: DenseTensor) (cache: DenseTensor) (positions: DenseTensor) =
    let width = q.Extents[3]

    Dense.init (resized q.Extents 3 value) (fun i ->
        let b, s, n, v = i[0], i[1], i[2], i[3]
        let seen = int (Dense.at positions [| b; s |])

        let scores = [
            for c in 0..seen ->
                scale
                * List.sum [
                    for w in 0 .. width - 1 -> Dense.at q [| b; s; n; w |] * Dense.at cache [| b; c; w |]
                ]
        ]

        if scores.IsEmpty then
            0.0
        else
            let top = List.max scores
            let weights = scores |> List.map (fun x -> exp (x - top))
            let total = List.sum weights
            List.sum [ for c in 0..seen -> weights[c] / total * Dense.at cache [| b; c; v |] ])

/// With p the attention weights and delta = dout . out: ds = p (dout . v - delta).
let attentionGrad
    scale
    (dout: DenseTensor)
    (q: DenseTensor)
    (k: DenseTensor)
    (v: DenseTensor)
    out
    (lse: DenseTensor)
    (positions: DenseTensor option)
    =
    let dq, dk, dv = Dense.zeros q.Extents, Dense.zeros k.Extents, Dense.zeros v.Extents

    for b in 0 .. q.Extents[0] - 1 do
        for n in 0 .. q.Extents[2] - 1 do
            for i in 0 .. q.Extents[1] - 1 do
                let delta = dot dout out b n i i

                for j in 0 .. seen positions i do
                    let p = exp (scale * dot q k b n i j - Dense.at lse [| b; n; i |])
                    let ds = scale * p * (dot dout v b n i j - delta)

                    for d in 0 .. q.Extents[3] - 1 do
                        Dense.accumulate dq [| b; i; n; d |] (ds * Dense.at k [| b; j; n; d |])
                        Dense.accumulate dk [| b; j; n; d |] (ds * Dense.at q [| b; i; n; d |])

                    for e in 0 .. v.Extents[3] - 1 do
                        Dense.accumulate dv [| b; j; n; e |] (p * Dense.at dout [| b; i; n; e |])

    [| dq; dk; dv |]

/// The last axis of x as rows, and a function that makes a tensor of x's shape from new rows.
let private rows (x: DenseTensor) = Array.chunkBySize (Array.last x.Extents) x.Data

let private inverseRms eps (row: float[]) = 1.0 / sqrt (Array.averageBy (fun v -> v * v) row + eps)

/// y = x r w with r = 1 / sqrt(mean(x^2) + eps).
let rmsNorm eps (x: DenseTensor) (w: DenseTensor) = {
    x with
        Data =
            rows x
            |> Array.collect (fun row -> let r = inverseRms eps row in Array.map2 (fun v g -> v * r * g) row w.Data)
}

/// dx = r (w dy) - x r^3 mean(w dy x).
let rmsNormGradX eps (dy: DenseTensor) (x: DenseTensor) (w: DenseTensor) = {
    x with
        Data =
            Array.map2
                (fun (d: float[]) (row: float[]) ->
                    let r = inverseRms eps row
                    let g = Array.map2 (*) d w.Data
                    let mean = Array.average (Array.map2 (*) g row)
                    Array.map2 (fun gi xi -> r * gi - xi * r * r * r * mean) g row)
                (rows dy)
                (rows x)
            |> Array.concat
}

/// dw = sum over rows of dy x r.
let rmsNormGradW eps (dy: DenseTensor) (x: DenseTensor) =
    let out = Dense.zeros [| Array.last x.Extents |]

    for d, row in Array.zip (rows dy) (rows x) do
        let r = inverseRms eps row
        row |> Array.iteri (fun h v -> Dense.accumulate out [| h |] (d[h] * v * r))

    out

/// Positions of the k largest; of equal ones the lower position first.
let private largest k (values: float[]) =
    Array.init values.Length id |> Array.sortBy (fun i -> -values[i], i) |> Array.truncate k

/// One token's chosen experts.
let private chosen (spec: TopKSpec) (scores: float[]) =
    let width = scores.Length / spec.Groups

    let kept =
        scores
        |> Array.chunkBySize width
        |> Array.map (fun group ->
            match spec.GroupScore with
            | GroupScore.BestTwo -> group |> Array.sortDescending |> Array.truncate 2 |> Array.sum
            | GroupScore.Best -> Array.max group)
        |> largest spec.KeepGroups

    let lost = if spec.ZeroMasked then 0.0 else -infinity

    scores
    |> Array.mapi (fun e s -> if Array.contains (e / width) kept then s else lost)
    |> largest spec.TopK

let groupTopK (spec: TopKSpec) (scores: DenseTensor) = {
    scores with
        Data =
            rows scores
            |> Array.collect (fun row ->
                let best = chosen spec row
                Array.init row.Length (fun e -> if Array.contains e best then 1.0 else 0.0))
}

let sigmoid x = 1.0 / (1.0 + exp -x)

/// Sum over the last axis at all other coordinates of `i`.
let private along (x: DenseTensor) (i: int[]) (f: int[] -> float) =
    let last = i.Length - 1
    List.sum [ for e in 0 .. x.Extents[last] - 1 -> f (set i last e) ]

/// Scores of all experts.
let private scored (spec: RouterSpec) (logits: DenseTensor) =
    match spec.Score with
    | ScoreFunction.Sigmoid -> Dense.map sigmoid logits
    | ScoreFunction.Softmax ->
        let shifted = {
            logits with
                Data = rows logits |> Array.collect (fun row -> row |> Array.map (fun z -> exp (z - Array.max row)))
        }

        Dense.init logits.Extents (fun i -> Dense.at shifted i / along shifted i (Dense.at shifted))

/// Weight p of each chosen expert, the choice, and tokens per expert.
let router (spec: RouterSpec) (logits: DenseTensor) (bias: DenseTensor) =
    let scores = scored spec logits
    let mask = groupTopK spec.Choice (Dense.init logits.Extents (fun i -> Dense.at scores i + bias.Data[i[2]]))
    let raw = Dense.map2 (*) scores mask

    let p =
        Dense.init logits.Extents (fun i ->
            let total = if spec.Normalize then along raw i (Dense.at raw) + spec.Eps else 1.0
            spec.Factor * Dense.at raw i / total)

    let counts = Dense.zeros bias.Extents
    Dense.each mask.Extents (fun i -> Dense.accumulate counts [| i[2] |] (Dense.at mask i))
    [| p; mask; counts |]

/// With S the sum of the chosen scores plus eps: ds = factor (dp - sum(dp s m) / S) / S for the chosen; through the scores.
let routerGrad (spec: RouterSpec) (dp: DenseTensor) (logits: DenseTensor) (mask: DenseTensor) =
    let scores = scored spec logits
    let raw = Dense.map2 (*) scores mask

    let ds =
        Dense.init logits.Extents (fun i ->
            let ofChosen =
                if spec.Normalize then
                    let total = along raw i (Dense.at raw) + spec.Eps
                    (Dense.at dp i - along raw i (fun j -> Dense.at dp j * Dense.at raw j) / total) / total
                else
                    Dense.at dp i

            spec.Factor * ofChosen * Dense.at mask i)

    Dense.init logits.Extents (fun i ->
        let s = Dense.at scores i

        match spec.Score with
        | ScoreFunction.Sigmoid -> Dense.at ds i * s * (1.0 - s)
        | ScoreFunction.Softmax -> s * (Dense.at ds i - along scores i (fun j -> Dense.at ds j * Dense.at scores j)))

/// Weighted sums over the sequence of the plain choice, and of the affinities' shares.
let balance topK eps (logits: DenseTensor) (w: DenseTensor) =
    let scores = Dense.map sigmoid logits

    let plain = {
        TopK = topK
        Groups = 1
        KeepGroups = 1
        ZeroMasked = false
        GroupScore = GroupScore.BestTwo
    }

    let chosen = groupTopK plain scores
    let extents = [| logits.Extents[0]; logits.Extents[2] |]
    let counts, shares = Dense.zeros extents, Dense.zeros extents

    Dense.each logits.Extents (fun i ->
        let weight, total = Dense.at w i[..1], along scores i (Dense.at scores) + eps
        Dense.accumulate counts [| i[0]; i[2] |] (weight * Dense.at chosen i)
        Dense.accumulate shares [| i[0]; i[2] |] (weight * Dense.at scores i / total))

    [| counts; shares |]

/// With S the sum of scores plus eps: ds = w (d - sum(d s) / S) / S, through the sigmoid.
let balanceGrad eps (dshares: DenseTensor) (logits: DenseTensor) (w: DenseTensor) =
    let scores = Dense.map sigmoid logits
    let d (i: int[]) = Dense.at dshares [| i[0]; i[2] |]

    Dense.init logits.Extents (fun i ->
        let s, total = Dense.at scores i, along scores i (Dense.at scores) + eps
        let ds = (d i - along scores i (fun j -> d j * Dense.at scores j) / total) / total
        Dense.at w i[..1] * ds * s * (1.0 - s))

let silu x = x * sigmoid x

let siluSlope x = sigmoid x * (1.0 + x * (1.0 - sigmoid x))

/// x[..., 2, f] read at gate (0) or up (1) for an index of y[..., f].
let private half (x: DenseTensor) which (index: int[]) = Dense.at x (Dense.insert (index.Length - 1) which index)

/// silu(gate) up, times the probability p[...] if given.
let swiGlu (x: DenseTensor) (p: DenseTensor option) =
    let rank = x.Extents.Length

    Dense.init (Array.removeAt (rank - 2) x.Extents) (fun i ->
        let weight = p |> Option.map (fun p -> Dense.at p i[.. i.Length - 2]) |> Option.defaultValue 1.0

        silu (half x 0 i) * half x 1 i * weight)

/// dx, and dp = sum over f of dy silu(gate) up.
let swiGluGrad (dy: DenseTensor) (x: DenseTensor) (p: DenseTensor option) =
    let prob (i: int[]) = p |> Option.map (fun p -> Dense.at p i[.. i.Length - 2]) |> Option.defaultValue 1.0

    let rank = x.Extents.Length
    let dp = Dense.zeros dy.Extents[.. dy.Extents.Length - 2]

    Dense.each dy.Extents (fun i ->
        Dense.accumulate dp i[.. i.Length - 2] (Dense.at dy i * silu (half x 0 i) * half x 1 i))

    let dx =
        Dense.init x.Extents (fun j ->
            let i = Array.removeAt (rank - 2) j
            let gate, up = half x 0 i, half x 1 i
            let slope = if j[rank - 2] = 0 then siluSlope gate * up else silu gate
            Dense.at dy i * prob i * slope)

    dx, dp

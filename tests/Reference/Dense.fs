/// Dense float64 arrays and the index loops that every definition below is written with.
namespace DeepSeekGraph.Reference

open DeepSeekGraph

/// Row-major; integers and booleans are held as floats.
type DenseTensor = { Extents: int[]; Data: float[] }

[<RequireQualifiedAccess>]
module Dense =
    let size (extents: int[]) = Array.fold (*) 1 extents

    /// Distance in `Data` between neighbours along each dim.
    let strides (extents: int[]) = Array.scanBack (*) extents 1 |> Array.skip 1

    /// Visits every index in order; the array is reused, so keep no reference to it.
    let each (extents: int[]) (visit: int[] -> unit) =
        let index = Array.zeroCreate extents.Length

        for flat in 0 .. size extents - 1 do
            let mutable rest = flat

            for d in extents.Length - 1 .. -1 .. 0 do
                index[d] <- rest % extents[d]
                rest <- rest / extents[d]

            visit index

    /// The element at an index.
    let at (x: DenseTensor) (index: int[]) =
        let mutable flat = 0

        for d in 0 .. index.Length - 1 do
            flat <- flat * x.Extents[d] + index[d]

        x.Data[flat]

    /// A tensor from its value at each index (the index array is reused).
    let init (extents: int[]) (value: int[] -> float) =
        let data = Array.zeroCreate (size extents)
        let mutable flat = 0

        each extents (fun index ->
            data[flat] <- value index
            flat <- flat + 1)

        { Extents = extents; Data = data }

    let full (extents: int[]) (value: float) = {
        Extents = extents
        Data = Array.create (size extents) value
    }

    let zeros extents = full extents 0.0
    let scalar (value: float) = full [||] value

    let ofList (values: float list) = {
        Extents = [| values.Length |]
        Data = Array.ofList values
    }

    let map f (x: DenseTensor) = { x with Data = Array.map f x.Data }

    let map2 f (x: DenseTensor) (y: DenseTensor) =
        if x.Extents <> y.Extents then
            invalidOp $"%A{x.Extents} meets %A{y.Extents}"

        {
            x with
                Data = Array.map2 f x.Data y.Data
        }

    let add x y = map2 (+) x y

    /// Changes one element in place.
    let update (x: DenseTensor) (index: int[]) (change: float -> float) =
        let mutable flat = 0

        for d in 0 .. index.Length - 1 do
            flat <- flat * x.Extents[d] + index[d]

        x.Data[flat] <- change x.Data[flat]

    /// Adds to one element in place.
    let accumulate x index value = update x index ((+) value)

    /// `index` with one more coordinate in front of dim `d`.
    let insert d (value: int) (index: int[]) = Array.insertAt d value index

    let private withDim d value (a: int[]) = Array.mapi (fun i x -> if i = d then value else x) a

    /// Elements [start, start + length) of one dim.
    let slice d start length (x: DenseTensor) =
        init (withDim d length x.Extents) (fun i -> at x (withDim d (i[d] + start) i))

    /// Block `index` of `count` equal blocks of one dim.
    let block d index count (x: DenseTensor) =
        if x.Extents[d] % count <> 0 then
            invalidOp $"dim %i{d} of %A{x.Extents} does not fall into %i{count} blocks"

        let length = x.Extents[d] / count
        slice d (index * length) length x

    /// Tensors joined along one dim.
    let concat d (parts: DenseTensor[]) =
        let starts = parts |> Array.map _.Extents[d] |> Array.scan (+) 0
        let extents = withDim d (Array.last starts) parts[0].Extents

        init extents (fun i ->
            let p = Array.findIndex (fun s -> i[d] < s) starts[1..]
            at parts[p] (withDim d (i[d] - starts[p]) i))

    /// f of the operands' elements, for each point of the result; operands lack some of its letters. The array is reused.
    let pointwise (rule: Rule) (extents: int[]) (f: float[] -> float) (operands: DenseTensor[]) =
        // how far an operand moves when a dim of the result does
        let steps =
            operands
            |> Array.mapi (fun k x ->
                let strides = strides x.Extents

                Array.init extents.Length (fun d ->
                    rule.Factors
                    |> Array.sumBy (fun factor ->
                        if factor.Results[0] = d && factor.Operands[k] >= 0 then
                            strides[factor.Operands[k]]
                        else
                            0)))

        let values = Array.zeroCreate operands.Length

        init extents (fun index ->
            for k in 0 .. operands.Length - 1 do
                let mutable at = 0

                for d in 0 .. index.Length - 1 do
                    at <- at + index[d] * steps[k][d]

                values[k] <- operands[k].Data[at]

            f values)

    /// Product of the operands' elements, summed over every letter that the result lacks.
    let product (rule: Rule) (result: int) (extents: int[]) (operands: DenseTensor[]) =
        let out = zeros extents
        let letters = rule.Factors.Length

        // by strides instead of indices: this loop is where an evaluation's time goes
        let stride (extents: int[]) (dim: int) = if dim < 0 then 0 else (strides extents)[dim]

        let into = rule.Factors |> Array.map (fun f -> stride extents f.Results[result])

        let from =
            operands
            |> Array.mapi (fun k x -> rule.Factors |> Array.map (fun f -> stride x.Extents f.Operands[k]))

        let at = Array.zeroCreate operands.Length

        let rec visit (letter: int) (target: int) =
            if letter = letters then
                let mutable value = 1.0

                for k in 0 .. operands.Length - 1 do
                    value <- value * operands[k].Data[at[k]]

                out.Data[target] <- out.Data[target] + value
            else
                let extent = rule.Factors[letter].Extent

                for i in 0 .. extent - 1 do
                    visit (letter + 1) (target + i * into[letter])

                    for k in 0 .. operands.Length - 1 do
                        at[k] <- at[k] + from[k][letter]

                for k in 0 .. operands.Length - 1 do
                    at[k] <- at[k] - extent * from[k][letter]

        visit 0 0
        out

    /// Largest difference relative to the larger of 1 and the largest magnitude.
    let distance (x: DenseTensor) (y: DenseTensor) =
        if x.Extents <> y.Extents then
            infinity
        else
            let scale = Array.append x.Data y.Data |> Array.fold (fun m v -> max m (abs v)) 1.0

            Array.fold2
                (fun m a b ->
                    if a = b then m
                    elif System.Double.IsNaN a && System.Double.IsNaN b then m
                    elif System.Double.IsNaN a || System.Double.IsNaN b then infinity
                    else max m (abs (a - b) / scale))
                0.0
                x.Data
                y.Data

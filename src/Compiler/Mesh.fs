/// The grid of ranks: degrees refined into base mesh axes, and ranks to coordinates and back.
namespace DeepSeekGraph.Compiler

open System
open DeepSeekGraph

/// Degrees of parallelism as a recipe gives them; 0 means not given.
type Degrees = {
    Tensor: int
    Context: int
    Data: int
    Pipeline: int
    ExpertTensor: int
    Expert: int
} with

    /// Nothing given.
    static member None = {
        Tensor = 0
        Context = 0
        Data = 0
        Pipeline = 0
        ExpertTensor = 0
        Expert = 0
    }

[<RequireQualifiedAccess>]
module Mesh =
    /// Ranks that one job may have; larger products are typing mistakes.
    let private most = 1L <<< 24

    let private names = [| "tp"; "cp"; "dp"; "etp"; "ep"; "edp" |]

    /// Those not given are 1, except dp: the smallest for which etp x ep divides tp x cp x dp.
    let complete (degrees: Degrees) : Degrees =
        let orOne n = if n = 0 then 1 else n
        let tensor, context = orOne degrees.Tensor, orOne degrees.Context
        let expertTensor, expert = orOne degrees.ExpertTensor, orOne degrees.Expert

        let data =
            if degrees.Data <> 0 || min (min tensor context) (min expertTensor expert) < 1 then
                orOne degrees.Data
            else
                let experts, dense = int64 expertTensor * int64 expert, int64 tensor * int64 context
                int (min most (experts / int64 (bigint.GreatestCommonDivisor(bigint experts, bigint dense))))

        {
            Tensor = tensor
            Context = context
            Data = data
            Pipeline = orOne degrees.Pipeline
            ExpertTensor = expertTensor
            Expert = expert
        }

    let private at = "recipe parallelism"

    let private diagnostic code message help = {
        Code = code
        At = at
        Message = message
        Help = help
    }

    /// Partial products of both chains, with how each is written.
    let private products (d: Degrees) = [
        "tp", int64 d.Tensor
        "tp x cp", int64 d.Tensor * int64 d.Context
        "tp x cp x dp", int64 d.Tensor * int64 d.Context * int64 d.Data
        "etp", int64 d.ExpertTensor
        "etp x ep", int64 d.ExpertTensor * int64 d.Expert
    ]

    /// Two products of which neither divides the other; the last of the dense chain must be divided by all.
    let private clash (d: Degrees) =
        let all = products d
        let grid = all[2]

        let divides (_, a: int64) (_, b: int64) = b % a = 0L

        List.allPairs all[3..] all[..2]
        |> List.tryFind (fun (expert, dense) ->
            not (divides expert dense) && (dense = grid || not (divides dense expert)))

    let private nearest (wanted: int) (legal: int list) =
        legal
        |> List.sortBy (fun n -> abs (n - wanted), n)
        |> List.truncate 6
        |> List.sort
        |> List.map string
        |> String.concat " "

    /// The legal values of one degree next to the one given, all others kept.
    let private legalValues (d: Degrees) =
        let grid = int (min most (int64 d.Tensor * int64 d.Context * int64 d.Data))
        let divisors = seq { 1..grid } |> Seq.filter (fun n -> grid % n = 0) |> List.ofSeq

        let choose name wanted change candidates =
            match candidates |> List.filter (fun n -> (clash (change n)).IsNone) with
            | [] -> None
            | legal -> Some $"choose %s{name} from %s{nearest wanted legal}"

        [
            choose "ep" d.Expert (fun n -> { d with Expert = n }) divisors
            choose "etp" d.ExpertTensor (fun n -> { d with ExpertTensor = n }) divisors
            choose "dp" d.Data (fun n -> { d with Data = n }) [
                1 .. min 100000 (4 * d.Data + d.ExpertTensor * d.Expert)
            ]
        ]
        |> List.choose id
        |> function
            | [] ->
                let plain = { d with ExpertTensor = 1 }
                let legal = divisors |> List.filter (fun n -> (clash { plain with Expert = n }).IsNone)
                $"choose etp 1, with ep from %s{nearest d.Expert legal}"
            | choices -> String.concat "; or " choices

    /// Between two neighbouring cut points lies one base axis; it is named after the dense degree it is part of.
    let private refine (d: Degrees) : MeshAxis[] =
        let dense = [| "tp", int64 d.Tensor; "cp", int64 d.Context; "dp", int64 d.Data |]

        let cuts = 1L :: (products d |> List.map snd) |> List.distinct |> List.sort |> Array.ofList |> Array.pairwise

        let ends = Array.scan (fun n (_, size) -> n * size) 1L dense

        let owner (low: int64) =
            dense
            |> Array.indexed
            |> Array.findIndex (fun (i, (_, size)) -> size > 1L && ends[i] <= low && low < ends[i + 1])

        let owners = cuts |> Array.map (fst >> owner)

        cuts
        |> Array.mapi (fun i (low, high) ->
            let name = fst dense[owners[i]]
            let parts = owners |> Array.filter ((=) owners[i]) |> Array.length
            let part = owners[.. i - 1] |> Array.filter ((=) owners[i]) |> Array.length

            {
                Name = if parts = 1 then name else $"%s{name}%i{part}"
                Size = int (high / low)
            })

    /// The common refinement of the chains tp, cp, dp and etp, ep, edp, or what keeps them from nesting.
    let create (given: Degrees) : Result<MeshInfo, Diagnostic list> =
        let d = complete given

        let wrong =
            [
                "tensor", given.Tensor
                "context", given.Context
                "data", given.Data
                "pipeline", given.Pipeline
                "expert tensor", given.ExpertTensor
                "expert", given.Expert
            ]
            |> List.filter (fun (_, n) -> n < 0 || int64 n > 65536L)

        // each factor is at most 65536, so no product of five overflows the comparison below
        let dense = Math.BigMul(d.Tensor, d.Context) |> bigint |> (*) (bigint d.Data)
        let ranks = dense * bigint d.Pipeline

        if not wrong.IsEmpty then
            wrong
            |> List.map (fun (name, n) ->
                diagnostic
                    Codes.MeshDegree
                    $"the degree '%s{name}' is %i{n}; a degree is at least 1 and at most 65536"
                    $"give a positive '%s{name}', or leave it out")
            |> Error
        elif ranks > bigint most then
            Error [
                diagnostic
                    Codes.MeshDegree
                    $"tp %i{d.Tensor} x cp %i{d.Context} x dp %i{d.Data} x pp %i{d.Pipeline} makes %O{ranks} ranks; a job has at most %i{most}"
                    "lower one of the degrees"
            ]
        else
            match clash d with
            | Some((expertName, expert), (denseName, dense)) ->
                let rule =
                    if denseName = "tp x cp x dp" then
                        $"%s{expertName} = %i{expert} does not divide %s{denseName} = %i{dense}"
                    else
                        $"%s{expertName} = %i{expert} and %s{denseName} = %i{dense} do not nest: neither divides the other"

                Error [ diagnostic Codes.MeshNesting rule (legalValues d) ]
            | None ->
                Ok {
                    Tensor = d.Tensor
                    Context = d.Context
                    Data = d.Data
                    Pipeline = d.Pipeline
                    ExpertTensor = d.ExpertTensor
                    Expert = d.Expert
                    ExpertData = int (int64 dense / (int64 d.ExpertTensor * int64 d.Expert))
                    Axes = refine d
                }

    /// Ranks of one stage.
    let size (mesh: MeshInfo) =
        let mutable n = 1

        for axis in mesh.Axes do
            n <- n * axis.Size

        n

    /// Ranks of the job.
    let world (mesh: MeshInfo) = size mesh * mesh.Pipeline

    /// The degree called tp, cp, dp, etp, ep or edp.
    let degree (mesh: MeshInfo) (name: string) =
        match name with
        | "tp" -> mesh.Tensor
        | "cp" -> mesh.Context
        | "dp" -> mesh.Data
        | "etp" -> mesh.ExpertTensor
        | "ep" -> mesh.Expert
        | "edp" -> mesh.ExpertData
        | other -> invalidArg (nameof name) $"'%s{other}' is none of %A{names}"

    /// Base axes whose product is the degree called tp, cp, dp, etp, ep or edp, fastest first; none when it is 1.
    let axesOf (mesh: MeshInfo) (name: string) : int list =
        let chain = if name.StartsWith 'e' then [ "etp"; "ep"; "edp" ] else [ "tp"; "cp"; "dp" ]
        let below = chain |> List.takeWhile ((<>) name) |> List.fold (fun n part -> n * degree mesh part) 1
        let above = below * degree mesh name
        let starts = mesh.Axes |> Seq.scan (fun n axis -> n * axis.Size) 1 |> Array.ofSeq
        [ 0 .. mesh.Axes.Count - 1 ] |> List.filter (fun i -> starts[i] >= below && starts[i] < above)

    /// Product of the sizes of some base axes.
    let extent (mesh: MeshInfo) (axes: int seq) = axes |> Seq.fold (fun n a -> n * mesh.Axes[a].Size) 1

    /// Pipeline stage of a rank.
    let stage (mesh: MeshInfo) (rank: int) = rank / size mesh

    /// Coordinate of a rank along each base axis.
    let coordinates (mesh: MeshInfo) (rank: int) : int[] =
        let mutable rest = rank % size mesh

        [|
            for axis in mesh.Axes do
                rest % axis.Size
                rest <- rest / axis.Size
        |]

    /// The rank at these coordinates of a stage.
    let rank (mesh: MeshInfo) (stage: int) (coordinates: int[]) =
        let mutable rank, stride = 0, 1

        for i in 0 .. coordinates.Length - 1 do
            rank <- rank + coordinates[i] * stride
            stride <- stride * mesh.Axes[i].Size

        rank + stage * stride

    /// Ranks of a stage that differ only along `axes`, each group in member order (slowest axis is major).
    let groups (mesh: MeshInfo) (stage: int) (axes: int list) : int[][] =
        let first = stage * size mesh

        [| first .. first + size mesh - 1 |]
        |> Array.groupBy (fun r -> coordinates mesh r |> Array.mapi (fun i c -> if List.contains i axes then 0 else c))
        |> Array.map snd

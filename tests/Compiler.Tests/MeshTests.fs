/// The mesh: refinement of both chains, and the groups that Megatron makes of the same degrees.
module DeepSeekGraph.Compiler.Tests.MeshTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Testing

let private degrees (tp, cp, dp, etp, ep) = {
    Degrees.None with
        Tensor = tp
        Context = cp
        Data = dp
        Pipeline = 1
        ExpertTensor = etp
        Expert = ep
}

let private made d =
    match Mesh.create d with
    | Ok mesh -> mesh
    | Error wrong -> failtestf "%A" wrong

let private refused d =
    match Mesh.create d with
    | Ok mesh -> failtestf "%A should be refused" mesh
    | Error wrong -> List.exactlyOne wrong

let private shown (mesh: MeshInfo) = mesh.Axes |> Seq.map (fun a -> $"%s{a.Name}=%i{a.Size}") |> String.concat " "

let private shapes = [
    2, 1, 4, 1, 2
    2, 1, 4, 1, 8
    4, 2, 2, 1, 8
    2, 2, 4, 2, 4
    2, 1, 8, 1, 4
    4, 1, 4, 2, 2
    1, 1, 8, 1, 8
    2, 2, 2, 4, 2
    1, 3, 6, 3, 2
    8, 1, 32, 1, 64
]

/// megatron.md, section 8: rank = fast + size * (next + ...); the groups of one part fix all others.
let private megatron (sizes: int list) part =
    let n = List.fold (*) 1 sizes
    let strides = sizes |> List.scan (*) 1

    [| 0 .. n - 1 |]
    |> Array.groupBy (fun r -> r - r / strides[part] % sizes[part] * strides[part])
    |> Array.map snd

/// Megatron's groups over the whole world, by another rule: ranks whose coordinates agree in every part that is not named.
/// `grid`: parts and their sizes, the fastest first, pp last (megatron.md, section 8: the order tp-cp-ep-dp-pp).
let private orthogonal (grid: (string * int) list) (named: string list) : int[][] =
    let world = grid |> List.fold (fun n (_, size) -> n * size) 1

    let rest rank =
        (([], rank), grid)
        ||> List.fold (fun (others, left) (name, size) ->
            (if List.contains name named then others else left % size :: others), left / size)
        |> fst

    [| 0 .. world - 1 |] |> Array.groupBy rest |> Array.map snd

/// All legal shapes with these degrees: tp, cp, dp, pp, etp, ep.
let private many = [
    for tp in [ 1; 2; 4 ] do
        for cp in [ 1; 2; 3 ] do
            for dp in [ 1; 2; 4; 6 ] do
                for pp in [ 1; 3 ] do
                    for etp in [ 1; 2 ] do
                        for ep in [ 1; 2; 4; 6; 8 ] do
                            match
                                Mesh.create {
                                    degrees (tp, cp, dp, etp, ep) with
                                        Pipeline = pp
                                }
                            with
                            | Ok mesh -> mesh
                            | Error _ -> ()
]

let private world =
    testCase "every group of every rank is Megatron's, over the whole world, for all legal shapes of a list"
    <| fun () ->
        Expect.isGreaterThan many.Length 150 "shapes"

        let dense, expert =
            [
                [ "tp" ]
                [ "cp" ]
                [ "dp" ]
                [ "tp"; "cp" ]
                [ "cp"; "dp" ]
                [ "tp"; "dp" ]
                [ "tp"; "cp"; "dp" ]
            ],
            [ [ "etp" ]; [ "ep" ]; [ "edp" ]; [ "etp"; "ep" ]; [ "etp"; "ep"; "edp" ] ]

        for mesh in many do
            let grid names = [
                for name in names do
                    yield name, Mesh.degree mesh name

                yield "pp", mesh.Pipeline
            ]

            for names, parts in [ [ "tp"; "cp"; "dp" ], dense; [ "etp"; "ep"; "edp" ], expert ] do
                for part in parts do
                    let axes = part |> List.collect (Mesh.axesOf mesh >> List.ofSeq)

                    let ours = [|
                        for stage in 0 .. mesh.Pipeline - 1 do
                            yield! Mesh.groups mesh stage axes
                    |]

                    Expect.equal ours (orthogonal (grid names) part) $"%A{part} of %A{grid names}"

                // the pipeline: one coordinate, every stage
                let pipelines = [|
                    for r in 0 .. Mesh.size mesh - 1 ->
                        [|
                            for s in 0 .. mesh.Pipeline - 1 -> Mesh.rank mesh s (Mesh.coordinates mesh r)
                        |]
                |]

                Expect.equal pipelines (orthogonal (grid names) [ "pp" ]) $"pp of %A{grid names}"

let tests =
    testList "Mesh" [
        world

        testCase "both chains are refined into base axes"
        <| fun () ->
            Expect.equal (shown (made (degrees (2, 1, 4, 1, 4)))) "tp=2 dp0=2 dp1=2" ""
            Expect.equal (shown (made (degrees (4, 1, 4, 2, 2)))) "tp0=2 tp1=2 dp=4" ""
            Expect.equal (shown (made (degrees (1, 1, 1, 1, 1)))) "" ""
            Expect.equal (shown (made (degrees (1, 2, 2, 1, 1)))) "cp=2 dp=2" ""

        testCase "groups are Megatron's"
        <| fun () ->
            for tp, cp, dp, etp, ep in shapes do
                let mesh = made (degrees (tp, cp, dp, etp, ep))

                for chain in [ [ "tp"; "cp"; "dp" ]; [ "etp"; "ep"; "edp" ] ] do
                    let sizes = chain |> List.map (Mesh.degree mesh)
                    Expect.equal (List.reduce (*) sizes) (Mesh.size mesh) "the grid"

                    chain
                    |> List.iteri (fun part name ->
                        let axes = Mesh.axesOf mesh name
                        Expect.equal (Mesh.extent mesh axes) sizes[part] name
                        Expect.equal (Mesh.groups mesh 0 axes) (megatron sizes part) $"%s{name} of %A{sizes}")

        testCase "names of base axes are unique and sizes above one"
        <| fun () ->
            for shape in shapes do
                let axes = (made (degrees shape)).Axes
                Expect.equal (axes |> Seq.distinctBy _.Name |> Seq.length) axes.Count "names"
                Expect.isTrue (axes |> Seq.forall (fun a -> a.Size > 1)) "sizes"

        testCase "coordinates lead back to the rank"
        <| fun () ->
            let mesh =
                made {
                    degrees (2, 2, 4, 2, 4) with
                        Pipeline = 3
                }

            for rank in 0 .. Mesh.world mesh - 1 do
                Expect.equal (Mesh.rank mesh (Mesh.stage mesh rank) (Mesh.coordinates mesh rank)) rank ""

        testCase "degrees not given are one, and dp what the experts need"
        <| fun () ->
            let mesh =
                made {
                    Degrees.None with
                        Tensor = 2
                        Expert = 8
                }

            Expect.equal (mesh.Data, mesh.ExpertData, mesh.Pipeline, mesh.Context) (4, 1, 1, 1) ""
            Expect.equal (Mesh.world (made Degrees.None)) 1 ""

        testCase "chains that do not nest are refused with the nearest legal values"
        <| fun () ->
            let wrong = refused (degrees (4, 1, 3, 1, 6))
            Expect.equal wrong.Code Codes.MeshNesting ""
            Expect.stringContains wrong.Message "etp x ep = 6 and tp = 4" ""
            Expect.stringContains wrong.Help "choose ep from 1 2 4 12" ""

            let wrong = refused (degrees (2, 1, 4, 1, 3))
            Expect.stringContains wrong.Message "3" ""
            Expect.stringContains wrong.Help "1 2 4 8" ""

        testCase "degrees below one or beyond any cluster are refused"
        <| fun () ->
            Expect.equal (refused { Degrees.None with Tensor = -1 }).Code Codes.MeshDegree ""

            Expect.equal
                (refused {
                    Degrees.None with
                        Tensor = 65536
                        Data = 65536
                        Context = 65536
                        Pipeline = 65536
                })
                    .Code
                Codes.MeshDegree
                ""

        Properties.property
            "any degrees give a mesh or a diagnostic"
            (fun (tp: int16) (cp: int8) (dp: int16) (etp: int8) (ep: int16) ->
                match Mesh.create (degrees (int tp, int cp, int dp, int etp, int ep)) with
                | Ok mesh -> Mesh.size mesh = mesh.ExpertTensor * mesh.Expert * mesh.ExpertData
                | Error wrong -> wrong |> List.forall (fun d -> d.Message <> "" && d.Help <> ""))
    ]

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

let tests =
    testList "Mesh" [
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

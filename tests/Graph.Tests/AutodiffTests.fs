/// Reverse mode over whole graphs: random compositions, sums of uses, and what it refuses.
module DeepSeekGraph.Graph.Tests.AutodiffTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Reference
open DeepSeekGraph.Testing

let private generators = [ typeof<Generators> ]

let private refuses name (graph: Graph) loss (part: string) =
    testCase name (fun () ->
        match Autodiff.differentiate loss graph with
        | Ok _ -> failtest "has a gradient"
        | Error found ->
            Expect.equal found.Head.Code Codes.NotDifferentiable ""
            Expect.stringContains found.Head.Message part "")

let private joint (graph: Graph) =
    match Autodiff.differentiate "loss" graph with
    | Ok joint -> joint
    | Error found -> failtestf "%O" found.Head

let tests =
    testList "Autodiff" [
        Properties.propertyOver
            generators
            "the gradient of a random graph = central differences"
            (fun (random: RandomGraph) ->
                match GradientCheck.mismatches 1e-5 3 7 random.Graph with
                | Ok [] -> ()
                | Ok wrong -> failtestf "%A" wrong
                | Error found -> failtestf "%O" found.Head)
        Properties.propertyOver generators "the joint graph is legal and keeps the loss" (fun (random: RandomGraph) ->
            let joint = joint random.Graph
            Expect.isEmpty (Verify.check joint) "illegal"
            let feed = Feed.lookup 3 random.Graph
            let before = (Evaluator.run random.Graph feed feed).Output "loss"
            let after = (Evaluator.run joint feed feed).Output "loss"
            Expect.equal after before "")
        Properties.propertyOver generators "a cotangent has the type of its primal" (fun (random: RandomGraph) ->
            let joint = joint random.Graph

            joint.Primals
            |> Array.iteri (fun v primal ->
                if primal >= 0 then
                    Expect.equal joint.Types[v] joint.Types[primal] ""))
        testCase "gradients come once a unit, their sum is the gradient" (fun () ->
            let s = Sketch()
            let p = s.Param("p", [ "hidden", 3 ])
            let first = s.On(Op.Silu, [ p ])

            s.Origin <- {
                s.Origin with
                    Unit = ModelUnit.Layer 1
            }

            let joint = joint (s.Loss [ s.On(Op.Mul, [ p; first ]) ])
            let grads = joint.Outputs |> Array.filter (fun (name, _) -> name = "grad:p")
            Expect.equal grads.Length 2 "one for each layer")
        testCase "frozen parameters and detached paths have no gradient" (fun () ->
            let s = Sketch()
            let p = s.Param("p", [ "hidden", 3 ])
            let q = s.Param("q", [ "hidden", 3 ])
            let joint = joint (s.Loss [ s.On(Op.Mul, [ p; s.On(Op.Detach, [ q ]) ]) ])
            Expect.equal (joint.Outputs |> Array.map fst |> Array.sort) [| "grad:p"; "loss" |] "")
        refuses "a loss that is not there" (Sketch().ToGraph()) "loss" "no output 'loss'"
        refuses
            "a loss that is no number"
            (let s = Sketch()
             s.Output("loss", s.Param("p", [ "hidden", 3 ]))
             s.ToGraph())
            "loss"
            "not one number"
    ]

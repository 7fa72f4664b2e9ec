/// The generator of jobs and its shrinker: what they make is legal, and what fails becomes small and can be replayed.
module DeepSeekGraph.Models.Tests.JobTests

open Expecto
open FsCheck
open FsCheck.FSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models
open DeepSeekGraph.Testing
open DeepSeekGraph.Models.Tests.Jobs

let private drawn = lazy (Gen.sampleWithSeed (Rnd(5UL, 1UL)) 10 400 (AnyStages.Job().Generator))

/// The smallest job on the way down that still has `fails`, as a runner of properties finds it.
let rec private smallest fails job =
    match shrink job |> Seq.tryFind fails with
    | Some smaller -> smallest fails smaller
    | None -> job

let private shrinks =
    testCase "what the shrinker offers is legal and strictly smaller"
    <| fun () ->
        let mutable offered = 0

        for job in drawn.Value do
            Expect.isTrue (legal job) "drawn"

            for smaller in shrink job do
                offered <- offered + 1

                if not (legal smaller) || size smaller >= size job then
                    failtestf "%A\nof size %i becomes\n%A\nof size %i" job (size job) smaller (size smaller)

        Expect.isGreaterThan offered (10 * drawn.Value.Length) "something to try in every job"

let private everyField =
    testCase "every choice that a job has is undone by some step"
    <| fun () ->
        let plainest = drawn.Value |> Array.map (smallest (fun _ -> true)) |> Array.distinctBy size
        // what everything comes down to when anything fails
        let all = drawn.Value |> Array.map (smallest (fun _ -> true))

        for job in all do
            Expect.equal (ranks job * job.Pipeline) 1 "one rank"
            Expect.equal (job.Recompute, fused job) ([], []) "nothing recomputed or fused"
            Expect.equal (job.Fp8, job.Padding, job.Batch, job.Microbatches, job.SeqLength) (0, 1, 1, 1, 4) "sizes"
            Expect.equal (job.Layers, job.Mtp, job.Shared, job.Dense) (1, 0, 0, 0) "model"

            Expect.isFalse
                (job.Bf16 || job.Yarn || job.Balance || job.GPipe || job.NarrowStates || job.Remainders)
                "choices"

        Expect.equal plainest.Length 1 "one smallest job"

/// Causes that only one choice, or two together, bring.
let private causes: (string * (Job -> bool)) list = [
    "expert tensor parallel", (fun j -> j.ExpertTensor > 1)
    "context with recomputation of rows", (fun j -> j.Context > 1 && List.contains "moe" j.Recompute)
    "one fusion rule", (fun j -> List.contains "balance" (fused j))
    "fp8 on two stages", (fun j -> j.Fp8 > 0 && j.Pipeline > 1)
    "flex with blocks", (fun j -> j.Dispatcher.IsFlex && j.Padding > 1)
]

let private found =
    testList "a failure comes down to its cause" [
        for name, fails in causes do
            testCase name
            <| fun () ->
                let hits = drawn.Value |> Array.filter fails
                Expect.isNonEmpty hits "drawn"

                for job in hits do
                    let least = smallest fails job
                    Expect.isTrue (fails least) "it still fails"
                    let plain = smallest (fun _ -> true) job
                    // the cause, and what is needed to be legal
                    Expect.isLessThanOrEqual (size least - size plain) 16 $"%A{least}"
    ]

let private replayed =
    testCase "a failing case prints a seed, and that seed brings the same small case"
    <| fun () ->
        let fails (job: Job) =
            if job.Context > 1 then
                failtest "planted"

        let message test =
            let results = Impl.evalTestsSilent test |> Async.RunSynchronously

            match List.exactlyOne results with
            | _, { result = Impl.TestResult.Failed text } -> text
            | _, other -> failtestf "%A" other.result

        let config = {
            Properties.config [ typeof<AnyStages> ] with
                maxTest = 200
        }

        let text = message (testPropertyWithConfig config "planted" fails)
        let at (marker: string) = text.Substring(text.IndexOf marker + marker.Length)
        // etestPropertyWithConfig (seed, gamma, Some size) "planted"
        let words = (at "etestPropertyWithConfig (").Split(')')[0]

        match Campaign.parse (words.Replace("Some ", "")) with
        | None -> failtestf "no seed in %s" text
        | Some(struct (seed, gamma, size)) ->
            let again = message (testPropertyWithConfigStdGen (seed, gamma, size) config "planted" fails)
            let shown (text: string) = text.Substring(text.IndexOf "Shrunk", 300)
            Expect.equal (shown again) (shown text) "the same case, shrunk alike"
            Expect.stringContains again "Context = 2" "the cause alone"

let tests = testList "jobs" [ shrinks; everyField; found; replayed ]

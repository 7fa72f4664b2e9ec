/// Which code a GPU runs: what the library takes, what the compiler chooses, and that no plan says otherwise.
module DeepSeekGraph.Compiler.Tests.PathTests

open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models

let private bf16, private f32 = DType.BFloat16, DType.Float32

let private value dtype (extents: int list) : OperandType = {
    DType = dtype
    Extents = Array.ofList extents
}

/// Queries, keys and values of so many tokens and features, and what comes before and behind them.
let private heads dtype s t d e = value dtype [ 2; s; 4; d ], value dtype [ 2; t; 4; d ], value dtype [ 2; t; 4; e ]

let private forward dtype s t d e positions =
    let q, k, v = heads dtype s t d e
    let told = if positions then [ value DType.Int64 [ s ] ] else []
    LibraryKernels.refusal KernelId.Attention (q :: k :: v :: told |> Array.ofList) [| value dtype [ 2; s; 4; e ] |]

let private backward dtype s t d e positions =
    let q, k, v = heads dtype s t d e
    let out, lse = value dtype [ 2; s; 4; e ], value f32 [ 2; 4; s ]
    let told = if positions then [ value DType.Int64 [ s ] ] else []

    LibraryKernels.refusal KernelId.AttentionGrad (out :: q :: k :: v :: out :: lse :: told |> Array.ofList) [|
        q
        k
        v
    |]

let private grouped kernel x w route out = LibraryKernels.refusal kernel [| x; w; route |] [| out |]

/// Every launch that a GPU has two codes for: stage, program, place, kernel, its path, and why the library does not take it.
let private launches (plan: PlanSet) = [
    for stage in plan.Stages do
        for program in stage.Programs do
            for i in 0 .. program.Steps.Count - 1 do
                match program.Steps[i] with
                | Step.Launch(kernel, attributes, inputs, outputs, _) when LibraryKernels.has kernel ->
                    let types (ids: System.Collections.Generic.IReadOnlyList<int>) = [|
                        for id in ids -> OperandType.Of stage.Slots[id]
                    |]

                    struct (stage.Stage, program, i),
                    kernel,
                    KernelPaths.ofLaunch kernel attributes,
                    LibraryKernels.refusal kernel (types inputs) (types outputs)
                | Step.Launch _
                | Step.Start _
                | Step.Wait _
                | Step.Free _ -> ()
]

let private everyKernel = [
    KernelId.GroupedMatMul
    KernelId.GroupedWeightGrad
    KernelId.Attention
    KernelId.AttentionGrad
]

let private rows (plan: PlanSet) = [ for row in PlanPaths.list plan -> row.Kernel, row.Path.Name, row.Why ]

/// Each kernel once, by one path.
let private throughout path whys = List.map2 (fun kernel why -> kernel, path, why) everyKernel whys

let private compile (config: DeepSeekV3Config) (recipe: Recipe) = (DeepSeekV3 config).Compile recipe

let private sixteenBit = lazy compile Presets.Tiny (Recipes.Tiny.Recipe.WithDType bf16)

let private exact = lazy compile Presets.Proxy (Recipes.Proxy.Recipe.WithAttentionBackend AttentionBackend.Exact)

let private contexts =
    lazy compile Presets.Proxy (Recipes.Proxy.Recipe.WithContextParallel(2).WithBatch(1, 1, 256))

let private taken =
    testList "what the library takes" [
        testCase "attention: 16 bits, heads that cuDNN has kernels for, queries in order"
        <| fun () ->
            for refusal in [ forward; backward ] do
                for s, d, e in [ 64, 64, 64; 65, 192, 128; 4096, 72, 80; 4096, 192, 128 ] do
                    Expect.equal (refusal bf16 s s d e false) "" $"%i{s} %i{d} %i{e}"

                for s, t, d, e, positions, why in
                    [
                        63, 63, 192, 128, false, "63 queries"
                        64, 128, 192, 128, false, "64 queries of 128 keys"
                        64, 64, 192, 128, true, "positions of queries"
                        64, 64, 56, 64, false, "heads of 56 features"
                        64, 64, 200, 128, false, "heads of 200 features"
                        64, 64, 100, 64, false, "heads of 100 features"
                        64, 64, 192, 56, false, "values of 56 features"
                        64, 64, 192, 136, false, "values of 136 features"
                        64, 64, 192, 100, false, "values of 100 features"
                    ] do
                    Expect.equal (refusal bf16 s t d e positions) why why

                Expect.equal (refusal f32 64 64 192 128 false) "fp32" "fp32"

        testCase "attention: one operand of 32 bits is enough to refuse"
        <| fun () ->
            let q, k, v = heads bf16 64 64 192 128

            for i in 0..2 do
                let inputs = [| q; k; v |] |> Array.mapi (fun at x -> if at = i then { x with DType = f32 } else x)
                Expect.equal (LibraryKernels.refusal KernelId.Attention inputs [| v |]) "fp32" $"operand %i{i}"

        testCase "grouped products: 16 bits, rows of a multiple of eight features"
        <| fun () ->
            let routed dtype (features: int list) = value dtype ([ 1; 4; 8 ] @ features)
            let route = value DType.Bool [ 1; 4; 8 ]

            for kernel, out, second in
                [
                    KernelId.GroupedMatMul, (fun dtype n -> routed dtype [ 2; n / 2 ]), value bf16 [ 8; 2; 4; 16 ]
                    KernelId.GroupedWeightGrad, (fun dtype n -> value dtype [ 8; n; 16 ]), routed bf16 [ 16 ]
                ] do
                let x n = if kernel = KernelId.GroupedMatMul then routed bf16 [ 16 ] else routed bf16 [ n ]
                Expect.equal (grouped kernel (x 8) second route (out bf16 8)) "" $"%O{kernel}"
                Expect.equal (grouped kernel (x 6) second route (out bf16 6)) "rows of 6 features" $"%O{kernel}, 6"
                Expect.equal (grouped kernel (x 8) second route (out f32 8)) "fp32" $"%O{kernel}, a result in fp32"

                for first, other in [ f32, bf16; bf16, f32 ] do
                    let refusal =
                        grouped kernel { x 8 with DType = first } { second with DType = other } route (out bf16 8)

                    Expect.equal refusal "fp32" $"%O{kernel}, an operand in fp32"

        testCase "a path is a word, and no other word is one"
        <| fun () ->
            for path in KernelPath.All do
                Expect.equal (KernelPath.TryParse path.Name) (true, path) path.Name

            for word in [ ""; "Library"; "auto"; "exact " ] do
                Expect.isFalse (fst (KernelPath.TryParse word)) word
    ]

let private chosen =
    testList "what the compiler chooses" [
        for name, plan in
            [
                "eight ranks", Subjects.eight
                "experts", Subjects.experts
                "blocks", Subjects.blocks
                "remainders", Subjects.remainders
                "chunks", Subjects.interleaved
                "context parallel", contexts
            ]
            @ Subjects.others do
            testCase $"%s{name}: the library wherever it takes the operands, and nowhere else"
            <| fun () ->
                let found = launches plan.Value
                Expect.isNonEmpty found "launches"

                for struct (stage, program, i), kernel, path, refusal in found do
                    let expected = if refusal = "" then KernelPath.Library else KernelPath.Exact
                    Expect.equal path (Some expected) $"%O{kernel} at stage %i{stage}, %s{program.Name}, step %i{i}"

        testCase "fp32: exact throughout"
        <| fun () ->
            Expect.equal (rows (Recipes.Tiny.Compile())) (throughout "exact" [ "fp32"; "fp32"; "fp32"; "fp32" ]) ""

        testCase "DeepSeek-V3's widths in bf16: the library throughout"
        <| fun () -> Expect.equal (rows (Recipes.Proxy.Compile())) (throughout "library" [ ""; ""; ""; "" ]) ""

        testCase "small heads in bf16: exact attention, and the library's products"
        <| fun () ->
            let small = "heads of 48 features"

            Expect.equal
                (rows sixteenBit.Value)
                [
                    KernelId.GroupedMatMul, "library", ""
                    KernelId.GroupedWeightGrad, "library", ""
                    KernelId.Attention, "exact", small
                    KernelId.AttentionGrad, "exact", small
                ]
                ""

        testCase "a sequence that ranks share: exact attention, as queries have positions"
        <| fun () ->
            Expect.equal
                (rows contexts.Value |> List.filter (fun (_, path, _) -> path = "exact"))
                [
                    KernelId.Attention, "exact", "positions of queries"
                    KernelId.AttentionGrad, "exact", "positions of queries"
                ]
                ""

        testCase "a recipe that asks for exact attention has it, and the plan is legal"
        <| fun () ->
            Expect.isEmpty (Check.run exact.Value) "check"

            Expect.equal
                (rows exact.Value)
                [
                    KernelId.GroupedMatMul, "library", ""
                    KernelId.GroupedWeightGrad, "library", ""
                    KernelId.Attention, "exact", "asked for"
                    KernelId.AttentionGrad, "exact", "asked for"
                ]
                ""

            Expect.contains exact.Value.Recipe "attention_backend=exact" "recorded"

        testCase "launches are counted for a whole step"
        <| fun () ->
            let plan = Subjects.experts.Value
            let attention = PlanPaths.list plan |> Seq.find (fun row -> row.Kernel = KernelId.Attention)
            let layers = launches plan |> List.filter (fun (_, kernel, _, _) -> kernel = KernelId.Attention) |> _.Length
            Expect.isGreaterThan (layers, plan.Microbatches) (1, 1) "some of each"
            Expect.equal attention.Launches (int64 (layers * plan.Microbatches)) "each layer, each microbatch"
    ]

/// The plan with another word on one launch.
let private withWord (plan: PlanSet) (struct (stage, program, i)) (word: string) =
    Mutations.withSteps plan stage program (fun steps ->
        match steps[i] with
        | Step.Launch(kernel, attributes, inputs, outputs, path) ->
            let given = Array.ofSeq attributes |> Array.updateAt (attributes.Count - 1) (Attribute.Text word)
            Array.updateAt i (Step.Launch(kernel, given, inputs, outputs, path)) steps
        | Step.Start _
        | Step.Wait _
        | Step.Free _ -> failtest "no launch")

let private held =
    testList "what plans are held to" [
        testCase "the library for what it does not take is refused, by name and reason"
        <| fun () ->
            for plan, reason in
                [
                    Subjects.experts, "the library does not take fp32"
                    Subjects.remainders, "the library does not take heads of 6 features"
                    contexts, "the library does not take positions of queries"
                ] do
                let plan = plan.Value

                let exact = launches plan |> List.filter (fun (_, _, path, _) -> path = Some KernelPath.Exact)

                Expect.isNonEmpty exact "exact launches"

                let said =
                    exact
                    |> List.truncate 6
                    |> List.collect (fun (at, kernel, _, refusal) ->
                        let wrong = Check.run (withWord plan at "library")
                        let text = $"%s{PlanNames.kernel kernel}: the library does not take %s{refusal}"
                        Expect.equal [ for d in wrong -> d.Code, d.Message ] [ Codes.PlanPath, text ] "one diagnostic"
                        [ for d in wrong -> d.Message ])

                Expect.exists said (fun message -> message.Contains reason) reason

        testCase "our own code for what the library takes is a plan too"
        <| fun () ->
            let plan = exact.Value
            let at, _, _, _ = launches plan |> List.find (fun (_, _, path, _) -> path = Some KernelPath.Library)
            Expect.isEmpty (Check.run (withWord plan at "exact")) "exact"

        testCase "no word, or another one, is refused"
        <| fun () ->
            let plan = Subjects.experts.Value

            for at, kernel, _, _ in launches plan do
                let wrong = Check.run (withWord plan at "fast")

                Expect.isTrue
                    (wrong |> List.exists (fun d -> d.Code = Codes.PlanLayout && d.Message.Contains(string kernel)))
                    $"%O{kernel}"

        testCase "both forms keep the paths"
        <| fun () ->
            for plan in [ Subjects.experts.Value; exact.Value; sixteenBit.Value ] do
                let paths plan = [ for _, kernel, path, _ in launches plan -> kernel, path ]

                match PlanText.parse (PlanText.print plan), PlanBinary.parse (PlanBinary.print plan) with
                | Ok text, Ok binary ->
                    Expect.equal (paths text) (paths plan) "text"
                    Expect.equal (paths binary) (paths plan) "binary"
                    Expect.equal (PlanText.print binary) (PlanText.print plan) "one plan"
                | _unread -> failtest "a plan does not read back"
    ]

let tests = testList "Plan.Paths" [ taken; chosen; held ]

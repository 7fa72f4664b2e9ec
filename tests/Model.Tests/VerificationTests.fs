/// What `dsg verify` compares: the golden cases agree with Hugging Face under every layout, and what is wrong is told by name.
module DeepSeekGraph.Models.Tests.VerificationTests

open System
open System.IO
open System.Runtime.InteropServices
open Expecto
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Models.HuggingFace
open DeepSeekGraph.Runtime.Weights
open DeepSeekGraph.Models.Tests.Golden
open DeepSeekGraph.Models.Tests.BridgeTests

let private verify (folder: string) (gradients: string | null) (layout: int * int * int) (tolerance: Nullable<float>) =
    use bridge = AutoBridge.FromHfPretrained folder
    let reference = Path.Combine(folder, "reference.safetensors")
    use verification = Verification.Prepare(bridge, reference, gradients, recipe layout, tolerance)
    verification.RunAsync().GetAwaiter().GetResult()

/// What each case's files hold.
let private held = [
    "v3_tiny_plain", [ "generated_ids"; "hidden_1"; "hidden_last"; "logits"; "loss" ], 198
    "v3_tiny_yarn", [ "generated_ids"; "hidden_1"; "hidden_last"; "logits"; "loss" ], 198
    "v3_tiny_mtp", [ "logits"; "main_loss"; "mtp_logits"; "mtp_loss"; "total_loss" ], 202
    "v3_tiny_fp8", [ "logits"; "loss" ], 0
]

let private agrees =
    testList "verify: Hugging Face's logits, losses, tokens and gradients" [
        for case, items, gradients in held do
            for tp, pp, ep in [ 1, 1, 1; 2, 1, 2; 1, 2, 4; 2, 2, 2 ] do
                let name = $"%s{case}, tp %i{tp}, pp %i{pp}, ep %i{ep}"

                match folderOf case with
                | None -> ptestCase $"%s{name} (needs ../shared/golden/%s{case})" ignore
                | Some folder ->
                    testCase name
                    <| fun () ->
                        let grads: string | null =
                            if gradients > 0 then Path.Combine(folder, "reference_grads.safetensors") else null

                        let result = verify folder grads (tp, pp, ep) (Nullable())
                        let isGradient (item: VerifiedItem) = item.Name.StartsWith "grad."

                        let names = [
                            for item in result.Items do
                                if not (isGradient item) then
                                    item.Name
                        ]

                        Expect.equal (List.sort names) items "items"
                        Expect.equal (result.Items |> Seq.filter isGradient |> Seq.length) gradients "gradients"
                        Expect.isEmpty result.NotCompared "all compared"

                        for item in result.Items do
                            // 1e-4 is asked for
                            Expect.isLessThanOrEqual
                                item.Relative
                                (if item.Name = "generated_ids" then 0.0 else 1e-5)
                                item.Name

                        Expect.isTrue result.IsWithin "within"
    ]

/// Every kind of split at once; sequences are kept in another order, and padded.
let private everySplit =
    testCase "verify: context and expert tensor parallel, over a sequence that is padded"
    <| fun () ->
        let folder = golden "v3_tiny_mtp"
        use bridge = AutoBridge.FromHfPretrained folder
        let reference = Path.Combine(folder, "reference.safetensors")
        let grads = Path.Combine(folder, "reference_grads.safetensors")

        for recipe in
            [
                (recipe (2, 1, 2)).WithContextParallel(2).WithExpertTensorParallel 2
                // 80 positions are no multiple of 2 x 3
                (recipe (1, 2, 1)).WithContextParallel 3
            ] do
            use verification = Verification.Prepare(bridge, reference, grads, recipe)
            let result = verification.RunAsync().GetAwaiter().GetResult()

            Expect.isEmpty
                [
                    for item in result.Items do
                        if item.Relative > 1e-5 then
                            item
                ]
                "items"

/// The case's reference with some of its items changed.
let private against case (change: SafeTensorEntry list -> SafeTensorEntry list) (body: string -> 'T) =
    changed case id (fun folder ->
        let file = Path.Combine(folder, "reference.safetensors")
        SafeTensorsWriter.Write(file, change (entries file))
        body folder)

let private setId i (value: int64) (e: SafeTensorEntry) =
    let bytes = e.Data.ToArray()
    MemoryMarshal.Cast<byte, int64>(bytes.AsSpan())[i] <- value
    SafeTensorEntry(e.Name, e.DType, e.Shape, ReadOnlyMemory bytes)

/// A reference with a logit that is off by so much of the largest, and another token at place 20.
let private wrong (by: float32) (all: SafeTensorEntry list) =
    use file = SafeTensorsFile.Open(path "v3_tiny_plain" "reference.safetensors")
    let ids = file.ReadInt64 "generated_ids"
    let logits = file.ReadFloat32 "logits"
    let largest = logits |> Array.map abs |> Array.max

    all
    |> on "logits" (setFloat 1000 (logits[1000] + by * largest))
    |> on "generated_ids" (setId 20 ((ids[20] + 1L) % 512L))

let private differs =
    testCase "verify: one wrong logit, one wrong token, a misspelt item and a wrong shape are told by name"
    <| fun () ->
        let change (all: SafeTensorEntry list) =
            wrong 0.01f all
            |> on "hidden_1" (fun e -> SafeTensorEntry(e.Name, e.DType, [| 1L; 192L; 64L |], e.Data))
            |> List.map (fun e -> if e.Name = "loss" then SafeTensorEntry("lose", e.DType, e.Shape, e.Data) else e)

        against "v3_tiny_plain" change (fun folder ->
            let result = verify folder null (1, 1, 1) (Nullable())
            Expect.isFalse result.IsWithin "beyond"
            Expect.equal (List.ofSeq result.NotCompared) [ "lose" ] "not compared"
            let item name = result.Items |> Seq.find (fun i -> i.Name = name)
            Expect.floatClose { absolute = 0.0; relative = 1e-2 } (item "logits").Relative 0.01 "one logit"
            Expect.isFalse (item "logits").IsWithin "logits"
            Expect.isTrue (item "hidden_last").IsWithin "what is right stays right"
            Expect.equal (item "hidden_1").Relative infinity "shape"
            // a wrong token is wrong by itself, and misleads the one after it
            Expect.isGreaterThanOrEqual (item "generated_ids").MaxAbs 1.0 "tokens"
            Expect.stringContains (item "generated_ids").Remark "first at row 0, position 20" "which"

            let wide = verify folder null (1, 1, 1) (Nullable 0.5)
            let item name = wide.Items |> Seq.find (fun i -> i.Name = name)
            Expect.isTrue (item "logits").IsWithin "tolerance"
            Expect.isFalse (item "generated_ids").IsWithin "a token is no near-tie")

/// In bf16 logits differ by so much that two of them may change places.
let private ties =
    testCase
        "verify: a token whose logit is as near to the largest as logits are apart is a near-tie, where more than fp32's tolerance is given"
    <| fun () ->
        against "v3_tiny_plain" (wrong 0.8f) (fun folder ->
            let item =
                verify folder null (1, 1, 1) (Nullable 0.9)
                |> _.Items
                |> Seq.find (fun i -> i.Name = "generated_ids")

            Expect.isTrue item.IsWithin item.Remark
            Expect.stringContains item.Remark "by near-ties" "said")

let private malformed =
    testCase "verify: a reference without ids, or with ids that are none, is refused"
    <| fun () ->
        for name, change in
            [
                "no ids", without "input_ids"
                "beyond the vocabulary", on "input_ids" (setId 3 512L)
                "negative", on "input_ids" (setId 3 -1L)
                "one dim", on "input_ids" (fun e -> SafeTensorEntry(e.Name, e.DType, [| 192L |], e.Data))
                "another prompt", on "prompt_ids" (setId 0 77L)
                "no prompt", without "prompt_ids"
            ] do
            against "v3_tiny_plain" change (fun folder ->
                Expect.equal
                    (codes (fun () -> verify folder null (1, 1, 1) (Nullable())))
                    [ Codes.ReferenceMalformed ]
                    name)

let tests = testList "verification" [ agrees; everySplit; differs; ties; malformed ]

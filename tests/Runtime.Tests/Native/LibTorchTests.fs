/// LibTorch loads from the shared folder and computes.
module DeepSeekGraph.Runtime.Tests.Native.LibTorchTests

open Expecto
open DeepSeekGraph.Runtime.Native
open TorchSharp

let tests =
    testList "Native.LibTorch" [
        testCase "two matrices are multiplied"
        <| fun () ->
            LibTorch.Load()
            use a = torch.tensor (array2D [ [ 1f; 2f ]; [ 3f; 4f ] ])
            use b = torch.tensor (array2D [ [ 5f; 6f ]; [ 7f; 8f ] ])
            use product = a.matmul b
            Expect.equal (product.data<float32>().ToArray()) [| 19f; 22f; 43f; 50f |] "a b"

        testCase "a GPU multiplies too"
        <| fun () ->
            LibTorch.Load()

            if not (torch.cuda.is_available ()) then
                skiptest "no GPU, or a LibTorch without CUDA"

            use a = torch.ones (8L, 8L, device = torch.CUDA)
            use product = a.matmul a
            use sum = product.sum().cpu()
            Expect.equal (sum.item<float32>()) 512f "8 x 8 x 8"

        testCase "loading twice changes nothing"
        <| fun () ->
            LibTorch.Load()
            LibTorch.Load()
    ]

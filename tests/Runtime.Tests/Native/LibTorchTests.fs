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

        testCase "loading twice changes nothing"
        <| fun () ->
            LibTorch.Load()
            LibTorch.Load()
    ]

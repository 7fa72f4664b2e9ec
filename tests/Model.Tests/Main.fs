/// The tests of Model.
module DeepSeekGraph.Models.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run
        argv
        (testList "Model" [
            ModelTests.tests
            CheckpointTests.tests
            RouterTests.tests
            BalanceTests.tests
            GoldenTests.tests
            RecipeTests.tests
            RunTests.tests
            JobTests.tests
            PartitionTests.tests
            Fp8Tests.tests
            ParallelTests.tests
            NearTieTests.tests
            ExecutorTests.tests
            RecomputeTests.tests
            PaddingTests.tests
            MaskTests.tests
            BridgeTests.tests
            VerificationTests.tests
            MemoryTests.tests
            TrafficTests.tests
            CollectiveTests.tests
            GenerationTests.tests
            AllocatorTests.tests
            ResumeTests.tests
            RemainderTests.tests
            ImportTests.tests
        ])

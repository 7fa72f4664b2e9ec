/// The tests of Runtime.
module DeepSeekGraph.Runtime.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run
        argv
        (testList "Runtime" [
            Native.LibTorchTests.tests
            DataTests.tests
            TokenizerTests.tests
            ChatTests.tests
            SafeTensorsTests.tests
            SafeTensorsFuzz.tests
            ShardTests.tests
            Fp8BlockTests.tests
            MetricsTests.tests
            CheckpointTests.tests
            KernelTests.tests
            CudaTests.tests
            CacheTests.tests
            RowKernelTests.tests
            MasterTests.tests
            Fp8KernelTests.tests
            FusedKernelTests.tests
            CollectiveTests.tests
            NcclTests.tests
            RowMessageTests.tests
            LaunchTests.tests
            PaddingTests.tests
            RunnerTests.tests
            TraceTests.tests
            CodeTests.tests
            CodeCacheTests.tests
        ])

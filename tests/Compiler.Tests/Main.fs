/// The tests of Compiler.
module DeepSeekGraph.Compiler.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run
        argv
        (testList "Compiler" [
            MeshTests.tests
            LayoutStringTests.tests
            PropagateTests.tests
            PassTests.tests
            RecipeTests.tests
            PipelineTests.tests
            TimetableTests.tests
            PlanTextTests.tests
            PlanBinaryTests.tests
            KernelOpsTests.tests
            PathTests.tests
            BundleTests.tests
            OptimizerTests.tests
            OverlapTests.tests
            WeaveTests.tests
            CheckTests.tests
            ByteTests.tests
        ])

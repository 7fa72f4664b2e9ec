/// The tests of Cli.
module DeepSeekGraph.Cli.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run
        argv
        (testSequenced (
            testList "Cli" [
                LossCurveTests.tests
                ArgumentsTests.tests
                PlanTests.tests
                RunTests.tests
                CheckpointTests.tests
                VerifyTests.tests
                GenerateTests.tests
                LaunchTests.tests
                SubmitTests.tests
            ]
        ))

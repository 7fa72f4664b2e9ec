/// The tests of Graph.
module DeepSeekGraph.Graph.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run
        argv
        (testList "Graph" [
            AxesTests.tests
            BuilderTests.tests
            VerifyTests.tests
            EvaluatorTests.tests
            GenTests.tests
            OpTests.tests
            AutodiffTests.tests
            TextTests.tests
        ])

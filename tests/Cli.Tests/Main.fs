/// The tests of Cli.
module DeepSeekGraph.Cli.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run argv (testList "Cli" [ LossCurveTests.tests ])

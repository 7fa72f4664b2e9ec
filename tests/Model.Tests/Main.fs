/// The tests of Model.
module DeepSeekGraph.Model.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run argv (testList "Model" [ testCase "builds" ignore ])

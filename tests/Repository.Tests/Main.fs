/// The tests of Repository.
module DeepSeekGraph.Repository.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run argv (testList "Repository" [ testCase "builds" ignore ])

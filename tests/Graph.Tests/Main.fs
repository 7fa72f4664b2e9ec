/// The tests of Graph.
module DeepSeekGraph.Graph.Tests.Main

open Expecto
open DeepSeekGraph.Testing

[<EntryPoint>]
let main argv =
    TestMain.run argv (testList "Graph" [ OpTests.tests ])

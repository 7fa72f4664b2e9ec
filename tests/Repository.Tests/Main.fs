/// The tests of the repository itself.
module DeepSeekGraph.Repository.Tests.Main

open Expecto
open DeepSeekGraph.Testing
open DeepSeekGraph.Repository.Tests

[<EntryPoint>]
let main argv =
    TestMain.run argv (testList "Repository" [ DocumentTests.tests; SourceTests.tests; NotebookTests.tests ])

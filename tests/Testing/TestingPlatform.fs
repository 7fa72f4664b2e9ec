/// `dotnet test`: lets Microsoft.Testing.Platform list and run Expecto tests.
namespace DeepSeekGraph.Testing

open System
open System.Threading.Tasks
open Expecto
open Expecto.Impl
open Microsoft.Testing.Platform.Builder
open Microsoft.Testing.Platform.Capabilities.TestFramework
open Microsoft.Testing.Platform.Extensions
open Microsoft.Testing.Platform.Extensions.Messages
open Microsoft.Testing.Platform.Extensions.TestFramework
open Microsoft.Testing.Platform.Requests

/// One Expecto tree as a framework of the platform; a test's id is its full name.
type internal ExpectoFramework(tests: Test) =
    let fullName (path: string list) = String.Join("/", path)

    let chosen (request: TestExecutionRequest) =
        match request.Filter with
        | :? TestNodeUidListFilter as filter ->
            let wanted = Set.ofSeq (seq { for uid in filter.TestNodeUids -> uid.Value })
            Test.filter "/" (fun path -> wanted.Contains(fullName path)) tests
        | _ -> tests

    let outcome (summary: TestSummary) : IProperty =
        match summary.result with
        | TestResult.Passed -> PassedTestNodeStateProperty.CachedInstance
        | TestResult.Ignored reason -> SkippedTestNodeStateProperty reason
        | TestResult.Failed message -> FailedTestNodeStateProperty message
        | TestResult.Error error -> ErrorTestNodeStateProperty error

    let duration (summary: TestSummary) : IProperty =
        let finished = DateTimeOffset.UtcNow
        TimingProperty(TimingInfo(finished - summary.duration, finished, summary.duration))

    member private this.Publish (context: ExecuteRequestContext) (test: FlatTest) (properties: IProperty list) =
        let name = fullName test.name

        let node =
            TestNode(Uid = TestNodeUid name, DisplayName = name, Properties = PropertyBag(List.toArray properties))

        context.MessageBus.PublishAsync(this, TestNodeUpdateMessage(context.Request.Session.SessionUid, node))

    interface IExtension with
        member _.Uid = "Expecto"
        member _.Version = "1.0.0"
        member _.DisplayName = "Expecto"
        member _.Description = "Runs Expecto tests."
        member _.IsEnabledAsync() = Task.FromResult true

    interface IDataProducer with
        member _.DataTypesProduced = [| typeof<TestNodeUpdateMessage> |]

    interface ITestFramework with
        member _.CreateTestSessionAsync _ = Task.FromResult(CreateTestSessionResult(IsSuccess = true))

        member _.CloseTestSessionAsync _ = Task.FromResult(CloseTestSessionResult(IsSuccess = true))

        member this.ExecuteRequestAsync context = task {
            match context.Request with
            | :? RunTestExecutionRequest as request ->
                let! results =
                    evalTestsWithCancel context.CancellationToken ExpectoConfig.defaultConfig (chosen request) true

                for test, summary in results do
                    do! this.Publish context test [ outcome summary; duration summary ]
            | _ ->
                for test in Test.toTestCodeList tests do
                    do! this.Publish context test [ DiscoveredTestNodeStateProperty.CachedInstance ]

            context.Complete()
        }

module internal TestingPlatform =
    /// Runs `tests` as the platform asks in `argv`; the result is the exit code.
    let run (argv: string[]) (tests: Test) =
        task {
            let! builder = TestApplication.CreateBuilderAsync argv

            builder.RegisterTestFramework((fun _ -> TestFrameworkCapabilities()), (fun _ _ -> ExpectoFramework tests))
            |> ignore

            use! application = builder.BuildAsync()
            return! application.RunAsync()
        }
        |> _.GetAwaiter().GetResult()

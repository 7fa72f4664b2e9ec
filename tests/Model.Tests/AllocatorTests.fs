/// What a plan says of memory against what the C library's allocator counts: one rank, static shapes, at every border of programs.
module DeepSeekGraph.Models.Tests.AllocatorTests

#nowarn "9" // addresses of tensors

open System
open System.Collections.Generic
open System.Runtime.InteropServices
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Compiler
open DeepSeekGraph.Compiler.Lowering
open DeepSeekGraph.Models
open DeepSeekGraph.Runtime

/// glibc's struct mallinfo2: bytes handed out from arenas are uordblks, those mapped by themselves hblkhd.
[<Struct; StructLayout(LayoutKind.Sequential)>]
type private MallInfo2 =
    val arena: unativeint
    val ordblks: unativeint
    val smblks: unativeint
    val hblks: unativeint
    val hblkhd: unativeint
    val usmblks: unativeint
    val fsmblks: unativeint
    val uordblks: unativeint
    val fordblks: unativeint
    val keepcost: unativeint

[<DllImport("libc.so.6")>]
extern MallInfo2 private mallinfo2()

[<DllImport("libc.so.6")>]
extern int private mallopt(int param, int value)

/// From how many bytes on the allocator maps a block by itself; the small objects of .NET and LibTorch stay below.
let private threshold = 64 * 1024

let private mapThreshold = -3

/// Bytes of blocks that are mapped by themselves.
let private mapped () = int64 (mallinfo2 ()).hblkhd

/// Bytes of the mapped block that holds a tensor; 0 when the allocator found room for it in its heap.
/// The two words in front of it: how far it was shifted to a multiple of 64, and the size with three flags, bit 1 for mapped.
let private block (tensor: torch.Tensor) : int64 =
    use pointer = fixed &MemoryMarshal.GetReference tensor.bytes
    let address = NativeInterop.NativePtr.toNativeInt pointer
    let header = Marshal.ReadInt64(address, -8)

    if header &&& 2L = 2L then Marshal.ReadInt64(address, -16) + (header &&& ~~~7L) else 0L

/// One border, in bytes.
type private Border = {
    /// What the plan says is live.
    Predicted: int64
    /// What the allocator maps more than before the step.
    Counted: int64
    /// Headers, alignment and the rest of the last page of mapped blocks.
    Rounding: int64
    /// Tensors that the allocator found room for in its heap: those below its threshold, and a few above.
    Small: int64
    SmallBlocks: int
    Blocks: int
}

let private config =
    DeepSeekV3Config(
        VocabSize = 512,
        HiddenSize = 256,
        NumHiddenLayers = 3,
        NumAttentionHeads = 4,
        QLoraRank = 128,
        KvLoraRank = 128,
        QkNopeHeadDim = 32,
        QkRopeHeadDim = 16,
        VHeadDim = 32,
        IntermediateSize = 512,
        FirstKDenseReplace = 3,
        NumNextnPredictLayers = 0
    )

/// Set in the process that measures: other tests leave room in the heap, where blocks are then not mapped.
let private alone = "DSG_ALLOCATOR_ALONE"

/// This test in a process of its own; its output is shown.
let private inProcess () =
    let start = Diagnostics.ProcessStartInfo("dotnet", RedirectStandardOutput = true)
    start.ArgumentList.Add(IO.Path.Combine(AppContext.BaseDirectory, "DeepSeekGraph.Model.Tests.dll"))
    start.ArgumentList.Add "--filter-test-list"
    start.ArgumentList.Add "allocator"
    start.Environment[alone] <- "1"

    match Diagnostics.Process.Start start with
    | null -> failtest "no process was started"
    | child ->
        use child = child
        let out = child.StandardOutput.ReadToEnd()
        child.WaitForExit()
        Expect.equal child.ExitCode 0 out

        for line in out.Split '\n' |> Seq.filter _.Contains("allocator: ") do
            printfn $"%s{line}"

        if out.Contains " 1 ignored" then
            skiptest "the C library has no mallinfo2"

let tests =
    testSequenced
    <| testList "allocator" [
        testCase "live bytes at every border of programs are what the plan predicts, to the byte"
        <| fun () ->
            if String.IsNullOrEmpty(Environment.GetEnvironmentVariable alone) then
                inProcess ()
            else
                if not (RuntimeInformation.IsOSPlatform OSPlatform.Linux) then
                    skiptest "the C library is not glibc"

                try
                    mapped () |> ignore
                with :? EntryPointNotFoundException ->
                    skiptest "the C library has no mallinfo2"

                let recipe = Recipe.Default.WithParallelism(1, 1, 1, 1).WithBatch(2, 1, 256)
                let plan = DeepSeekV3(config).Compile recipe
                let predicted = Memory.behindEntries plan.Mesh plan.Stages[0]
                let rows = plan.Microbatches * plan.MicroBatch

                let batches = {
                    new Training.IBatchSource with
                        member _.Get step =
                            let random = Random(int step)

                            Training.TrainingBatch(
                                rows,
                                257,
                                Array.init (rows * 257) (fun _ -> int64 (random.Next 512))
                            )
                }

                let steps = List<Border[]>()
                mallopt (mapThreshold, threshold) |> ignore

                task {
                    use! trainer =
                        Training.Trainer.StartAsync(
                            plan,
                            Training.TrainerOptions(Batches = batches, KeepFreedMemory = false)
                        )

                    let rank = trainer.Ranks[0]
                    let seen = List<Border>()
                    let mutable start = 0L

                    rank.AtBorder <-
                        Action<int>(fun entry ->
                            // what kernels let go without a word is the collector's: it has it before anybody counts
                            GC.Collect()
                            GC.WaitForPendingFinalizers()

                            if entry < 0 then
                                start <- mapped ()
                            else
                                let now = mapped ()

                                let live = [|
                                    for v in rank.Live ->
                                        v.Tensor.NumberOfElements * v.Tensor.ElementSize, block v.Tensor
                                |]

                                let small, large = live |> Array.partition (fun (_, mapped) -> mapped = 0L)

                                seen.Add {
                                    Predicted = predicted[entry]
                                    Counted = now - start
                                    Rounding = large |> Array.sumBy (fun (bytes, mapped) -> mapped - bytes)
                                    Small = Array.sumBy fst small
                                    SmallBlocks = small.Length
                                    Blocks = live.Length
                                })

                    let run = trainer.RunAsync(9L).GetAsyncEnumerator()
                    let! first = run.MoveNextAsync()
                    let mutable more = first

                    while more do
                        steps.Add(seen.ToArray())
                        seen.Clear()
                        let! next = run.MoveNextAsync()
                        more <- next
                }
                |> _.GetAwaiter().GetResult()

                mallopt (mapThreshold, 128 * 1024) |> ignore
                // threads of .NET may hold a large block of their own now and then: the middle of nine steps
                let apart (b: Border) = b.Counted - b.Rounding + b.Small - b.Predicted
                let borders = predicted.Length

                let middle entry =
                    steps |> Seq.map (fun s -> s[entry]) |> Seq.sortBy apart |> Seq.item (steps.Count / 2)

                let top = [ 0 .. borders - 1 ] |> List.map middle |> List.maxBy _.Predicted

                printfn
                    "allocator: %i borders; at the highest %i bytes predicted and %i counted in %i blocks, with %i of rounding and %i in %i small ones"
                    borders
                    top.Predicted
                    top.Counted
                    top.Blocks
                    top.Rounding
                    top.Small
                    top.SmallBlocks

                for entry in 0 .. borders - 1 do
                    let b = middle entry
                    let name = plan.Stages[0].Timetable[entry].Name

                    if apart b <> 0L then
                        failtestf "behind %s: %i bytes apart: %A" name (apart b) [ for s in steps -> apart s[entry] ]

                    // the allocator's heap may have room for a larger one as well: most must be what it counts by itself
                    Expect.isLessThanOrEqual (float b.Small) (0.5 * float b.Predicted) $"%s{name}: blocks in the heap"

                    // header of two words, alignment to 64, the allocator's least block, the rest of a page
                    Expect.isLessThanOrEqual
                        b.Rounding
                        (int64 (b.Blocks - b.SmallBlocks) * (4096L + 128L))
                        $"%s{name}: rounding"

                Expect.isGreaterThan top.Predicted 5_000_000L "something is live"
    ]

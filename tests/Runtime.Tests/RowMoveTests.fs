/// Ranges of rows that one kernel moves, on the processor or a GPU, against naive loops; and what of an exchange becomes a run.
module DeepSeekGraph.Runtime.Tests.RowMoveTests

open System
open Expecto
open TorchSharp
open DeepSeekGraph.Runtime.Cuda
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Native
open DeepSeekGraph.Runtime.Tests.Slots

/// On the device of this thread.
let private work () : IRowWork =
    if device.Value.IsCuda then
        device.Value.Enter()
        CudaRowWork()
    else
        HostRowWork()

let private onDevice (bytes: byte[]) =
    use host = torch.tensor bytes

    if device.Value.IsCuda then host.``to`` device.Value.Torch else host.clone ()

let private bytesOf (tensor: torch.Tensor) =
    use host = tensor.OnHost()
    host.data<byte>().ToArray()

/// A segment as the table has it.
type private Segment = {
    From: int
    To: int
    Rows: int
    How: int
}

/// Segments of a value of `size` rows and staging memory of as many, no row of a target twice.
let private randomSegments (source: Random) count size =
    let taken = [| Array.create size false; Array.create size false |]

    [
        for _ in 1..count do
            let rows = 1 + source.Next 6
            let how = [| 0; RowTable.FromStaging; RowTable.ToStaging; RowTable.Fills |][source.Next 4]
            let from, into = source.Next(size - rows), source.Next(size - rows)
            let target = taken[if how = RowTable.ToStaging then 1 else 0]

            if not (Array.exists id target[into .. into + rows - 1]) then
                Array.fill target into rows true

                {
                    From = from
                    To = into
                    Rows = rows
                    How = how
                }
    ]

let private integersOf (segments: Segment list) =
    let firsts = segments |> List.scan (fun first s -> first + s.Rows) 0

    [|
        for first, s in Seq.zip firsts segments do
            first
            s.From
            s.To
            s.How
    |],
    List.last firsts

/// Bytes of a value, of its staging memory and of its result, `odd` bytes behind where memory begins.
type private Value(source: Random, size: int, width: int, odd: int, fill: int) =
    let memory () = Array.init (odd + size * width) (fun _ -> byte (source.Next 256))

    let bytes = Array.init 3 (fun _ -> memory ())
    let tensors = bytes |> Array.map onDevice

    member _.Moved =
        let at i = NcclLaunch.Address tensors[i] + nativeint odd
        MovedRows(at 0, at 1, at 2, int64 width, fill)

    /// What the segments make of the bytes; staging memory is read as it was.
    member _.Expected(segments: Segment list) =
        let staging, result = Array.copy bytes[1], Array.copy bytes[2]

        for s in segments do
            let target = if s.How = RowTable.ToStaging then staging else result
            let from = if s.How = RowTable.FromStaging then bytes[1] else bytes[0]

            for i in 0 .. s.Rows * width - 1 do
                target[odd + s.To * width + i] <-
                    if s.How = RowTable.Fills then byte fill else from[odd + s.From * width + i]

        [| bytes[0]; staging; result |]

    member _.Actual = tensors |> Array.map bytesOf

/// A table never reads the staging memory that it writes.
let private kindsOf (segments: Segment list) =
    [ RowTable.FromStaging; RowTable.ToStaging ]
    |> List.map (fun left -> segments |> List.filter (fun s -> s.How <> left))

let kernel =
    testList "ranges of rows" [
        testCase "go where segments say, alone and two values at once, whatever the width of a row" (fun () ->
            LibTorch.Load()
            let work = work ()

            for seed, count, size in [ 1, 1, 40; 2, 4, 60; 3, 40, 300; 4, 700, 9000 ] do
                for widths in
                    [
                        [ 2 ]
                        [ 4 ]
                        [ 16 ]
                        [ 6; 4 ]
                        [ 32; 4 ]
                        [ 1040; 4 ]
                        [ 8192; 4 ]
                        [ 4; 48 ]
                        [ 1; 36 ]
                    ] do
                    if size * List.max widths < 20_000_000 then
                        for odd in [ 0; 4; 2 ] do
                            let source = Random seed

                            for segments in kindsOf (randomSegments source count size) do
                                let integers, rows = integersOf segments
                                // the second table of a tensor
                                let start = 2 * RowTable.Segment
                                use tables = torch.tensor (Array.append (Array.create start 99) integers)

                                use placed =
                                    tables.``to`` (Option.ofObj device.Value.Torch |> Option.defaultValue torch.CPU)

                                let made =
                                    widths
                                    |> List.mapi (fun i width -> Value(source, size, width, odd, -(i + seed) % 2))

                                let table = RowTable(start, integers.Length / RowTable.Segment, rows)
                                let moved = [| for value in made -> value.Moved |]
                                work.Move(NcclLaunch.Address placed, table, ReadOnlySpan moved, 0n)

                                for width, value in List.zip widths made do
                                    if value.Actual <> value.Expected segments then
                                        failtest
                                            $"%i{segments.Length} segments, rows of %i{width} bytes, %i{odd} bytes off")

        testCase "no row is moved that no segment has" (fun () ->
            LibTorch.Load()
            let value = Value(Random 5, 8, 16, 0, 0)
            use none = onDevice [| 0uy |]
            (work ()).Move(NcclLaunch.Address none, RowTable(0, 0, 0), ReadOnlySpan [| value.Moved |], 0n)

            Expect.equal value.Actual (value.Expected []) "as it was")

        testCase "rows behind 4 GiB" (fun () ->
            if not device.Value.IsCuda then
                skiptest "takes 10 GB of a GPU's memory"

            LibTorch.Load()
            let width, size = 65_536L, 70_000

            let many () =
                torch.zeros (
                    [| int64 size * width |],
                    dtype = Nullable torch.ScalarType.Byte,
                    device = device.Value.Torch
                )

            let rows first (tensor: torch.Tensor) = tensor.narrow (0L, int64 first * width, 3L * width)

            use from = many ()
            use result = many ()
            use last = rows (size - 3) from
            last.fill_ (TorchSharp.Scalar.op_Implicit 7) |> ignore

            let integers, count =
                integersOf [
                    {
                        From = size - 3
                        To = size - 5
                        Rows = 3
                        How = 0
                    }
                ]

            use tables = torch.tensor(integers).``to`` device.Value.Torch
            let moved = MovedRows(NcclLaunch.Address from, 0n, NcclLaunch.Address result, width, 0)
            (work ()).Move(NcclLaunch.Address tables, RowTable(0, 1, count), ReadOnlySpan [| moved |], 0n)
            use there = rows (size - 5) result
            Expect.isTrue (bytesOf there |> Array.forall ((=) 7uy)) "moved"
            use sum = result.sum (Nullable torch.ScalarType.Int64)
            Expect.equal (sum.item<int64>()) (3L * width * 7L) "and nothing else")
    ]

/// Ranges of one rank, me = 0, among three.
let private movesOf (from: (int * int) list list) (into: (int * int) list list) fill =
    let ranges (all: (int * int) list list) = [|
        for peer in all -> [| for at, count in peer -> RowRange(at, count) |]
    |]

    let made = ResizeArray<int[]>()

    let moves =
        RowMoves.Of(
            ranges from,
            ranges into,
            0,
            [ for at, count in fill -> RowRange(at, count) ],
            Func<_, _>(fun integers ->
                made.Add integers
                torch.tensor integers)
        )

    moves, Seq.toList made

let private segmentsOf (table: RowTable) (integers: int[] list) =
    match integers with
    | [] -> []
    | all :: _ -> all[table.Start .. table.Start + 4 * table.Count - 1] |> Array.chunkBySize 4 |> List.ofArray

let runs =
    testList "runs of rows" [
        testCase "rows that lie together are sent from there; others, and one's own, are moved" (fun () ->
            LibTorch.Load()
            // two experts a rank, by token; what comes is by expert, in blocks of 4
            let moves, tables =
                movesOf [ [ 0, 2; 2, 1 ]; [ 3, 0; 3, 4 ]; [ 7, 1; 8, 2 ] ] [
                    [ 0, 2; 8, 1 ]
                    [ 2, 1; 9, 1 ]
                    [ 3, 2; 10, 0 ]
                ] [ 5, 3; 10, 2 ]

            Expect.equal moves.Sent [| RowRun(0, 0, false); RowRun(3, 4, false); RowRun(7, 3, false) |] "sent"
            Expect.equal moves.Received [| RowRun(0, 0, false); RowRun(0, 2, true); RowRun(3, 2, false) |] "received"
            Expect.equal (moves.SentStaging, moves.ReceivedStaging) (0, 2) "staging memory"
            Expect.equal moves.Before.Rows 0 "nothing before"

            Expect.equal
                (segmentsOf moves.Behind tables)
                [
                    [| 0; 0; 2; 1 |]
                    [| 1; 1; 9; 1 |]
                    [| 2; 0; 0; 0 |]
                    [| 4; 2; 8; 0 |]
                    [| 5; 0; 5; 4 |]
                    [| 8; 0; 10; 4 |]
                ]
                "what came, one's own, and what fills up"

            Expect.equal moves.Behind.Rows 10 "rows"
            moves.Dispose())

        testCase "back, they are moved together before, and come to their places" (fun () ->
            LibTorch.Load()

            let moves, tables =
                movesOf [ [ 0, 2; 8, 1 ]; [ 2, 1; 9, 1 ]; [ 3, 2; 10, 0 ] ] [
                    [ 0, 2; 2, 1 ]
                    [ 3, 0; 3, 4 ]
                    [ 7, 1; 8, 2 ]
                ] []

            Expect.equal moves.Sent [| RowRun(0, 0, false); RowRun(0, 2, true); RowRun(3, 2, false) |] "sent"
            Expect.equal moves.Received [| RowRun(0, 0, false); RowRun(3, 4, false); RowRun(7, 3, false) |] "received"
            Expect.equal (moves.Before.Rows, moves.Behind.Rows) (5, 0) "before"

            Expect.equal
                (segmentsOf moves.Before tables)
                [ [| 0; 2; 0; 2 |]; [| 1; 9; 1; 2 |]; [| 2; 0; 0; 0 |]; [| 4; 8; 2; 0 |] ]
                "to staging memory, and one's own"

            moves.Dispose())

        testCase "neighbours are one segment, and no rows none" (fun () ->
            LibTorch.Load()
            let moves, tables = movesOf [ [ 0, 2; 2, 3; 5, 0; 9, 1 ] ] [ [ 4, 2; 6, 3; 9, 0; 9, 1 ] ] []
            Expect.equal (segmentsOf moves.Behind tables) [ [| 0; 0; 4; 0 |]; [| 5; 9; 9; 0 |] ] "two"
            moves.Dispose()
            let none, tables = movesOf [ [ 0, 0 ]; [ 0, 0 ] ] [ [ 0, 0 ]; [ 0, 0 ] ] []
            Expect.isEmpty tables "nothing is uploaded"
            Expect.isNull none.Tables "no table")

        testCase "a rank's own rows have as many places" (fun () ->
            LibTorch.Load()

            Expect.throwsT<InvalidOperationException>
                (fun () -> movesOf [ [ 0, 2 ] ] [ [ 0, 1 ] ] [] |> ignore)
                "two for one")
    ]

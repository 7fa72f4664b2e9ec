/// Routed rows as GPUs exchange them: the bits of the loopback over random counts, and one message for each peer and operand.
module DeepSeekGraph.Runtime.Tests.RowMessageTests

open System
open System.Threading
open Expecto
open TorchSharp
open DeepSeekGraph
open DeepSeekGraph.Runtime.Collectives
open DeepSeekGraph.Runtime.Cuda
open DeepSeekGraph.Runtime.Kernels
open DeepSeekGraph.Runtime.Memory
open DeepSeekGraph.Runtime.Tests.Slots
open DeepSeekGraph.Runtime.Tests.CollectiveTests
open DeepSeekGraph.Runtime.Tests.NcclTests

/// Extents of one exchange; `Here` and `There` are the paddings by token and by expert.
type private Case = {
    Seed: int
    Peers: int
    Local: int
    Tokens: int
    Hidden: int
    Type: DType
    Here: int
    There: int
} with

    member this.Experts = this.Peers * this.Local

    /// Some ranks route nothing, some nearly all to one expert, some everything to everybody.
    member this.Mask rank =
        let source = Random(this.Seed * 31 + rank)
        let density = [| 0.0; 0.2; 0.6; 1.0 |][source.Next 4]
        let hot = source.Next this.Experts

        Array.init (this.Tokens * this.Experts) (fun i ->
            let share = if i % this.Experts = hot then 1.0 else density * source.NextDouble()
            if density > 0.0 && source.NextDouble() < share then 1.0 else 0.0)

let private cases = [
    for seed in 1 .. Shared.count "DSG_ROW_CASES" 24 do
        let source = Random seed
        let pick (choices: 'a[]) = choices[source.Next choices.Length]

        {
            Seed = seed
            Peers = 2 + source.Next 3
            Local = 1 + source.Next 5
            Tokens = 1 + source.Next 12
            Hidden = pick [| 1; 3; 8; 16 |]
            Type = pick [| DType.Float32; DType.BFloat16 |]
            // plans have rows by token without blocks
            Here = (if seed % 6 = 0 then 4 else 1)
            There = pick [| 1; 4; 16 |]
        }
]

/// Rows of a set in a slot of `most` rows, as a rank has them before counts are exchanged; those of no token hold -7.
let private rowsIn dtype padding (extents: int list) most (host: RowSet) width (values: float[]) =
    let all = Array.create (most * width) -7.0
    let mutable next = 0

    for e in 0 .. host.Experts - 1 do
        for row in host.Offsets[e] .. host.Offsets[e] + host.Counts[e] - 1 do
            Array.blit values (next * width) all (row * width) width
            next <- next + 1

    let slot: SlotValue = blockSlot padding dtype extents
    use source = torch.tensor (all |> Array.map float32)
    use shaped = source.reshape (slot.Fill(most).shape)
    slot.Fill(most).copy_ shaped |> ignore
    slot

/// The rows by token, and what fills up.
let private heldOf (host: RowSet) width (slot: SlotValue) = Array.truncate (host.Rows * width) (read slot)

/// Ranks over a fabric, each with calls that count its messages.
let private counted peers (work: RankContext -> ICollectives -> FakeNccl -> 'a) =
    use fabric = new LocalFabric()

    let results =
        together [ peers ] 1 (fun rank _ ->
            let nccl = FakeNccl(fabric, CancellationToken.None)
            let job = NcclJob(peers, CancellationToken.None)
            use collectives = new NcclCollectives(nccl, rank, [| axesGroup 0 [ 0 ] |], named "id", job)

            work rank collectives nccl)
        |> values

    Expect.equal fabric.Left 0 "everything that was sent was taken"
    results

/// What a collective sends and receives: messages by peer.
let private messages (nccl: FakeNccl) act =
    nccl.Sent.Clear()
    nccl.Received.Clear()
    act ()
    List.sort (List.ofSeq nccl.Sent), List.sort (List.ofSeq nccl.Received)

/// One message for each operand to whom rows go, and from whom they come.
let private expected (case: Case) me operands =
    let rowsFor rank peer =
        let mask = case.Mask rank
        Seq.exists (fun i -> mask[i] > 0.0 && i % case.Experts / case.Local = peer) (seq { 0 .. mask.Length - 1 })

    let others = [ 0 .. case.Peers - 1 ] |> List.except [ me ]

    others |> List.filter (rowsFor me) |> List.collect (List.replicate operands),
    others |> List.filter (fun peer -> rowsFor peer me) |> List.collect (List.replicate operands)

let private group = axesGroup 0 [ 0 ]

/// Rows and probabilities to their experts and back, by sets that `routeOf` makes.
let private exchanged (case: Case) (rank: RankContext) collectives route (host: RowSet) most measure =
    let e, h, all = case.Local, case.Hidden, case.Tokens * case.Peers
    let count = Array.sum host.Counts
    let there = blockSlot case.There DType.Bool [ 1; all; e ]
    perform collectives Collective.RouteToExperts group [ route ] [ there ]

    let own =
        random rank.Rank (count * h)
        |> rowsIn case.Type case.Here [ 1; case.Tokens; case.Experts; h ] most host h

    let probs =
        random (rank.Rank + 50) count
        |> rowsIn DType.Float32 case.Here [ 1; case.Tokens; case.Experts ] most host 1

    let rows = blockSlot case.There case.Type [ 1; all; e; h ]
    let ones = blockSlot case.There DType.Float32 [ 1; all; e ]

    let forth =
        measure (fun () ->
            perform collectives Collective.RowsToExperts group [ own; route; there; probs; route; there ] [
                rows
                ones
            ])

    let back = blockSlot case.Here case.Type [ 1; case.Tokens; case.Experts; h ]
    let backOnes = blockSlot case.Here DType.Float32 [ 1; case.Tokens; case.Experts ]
    let third = blockSlot case.Here case.Type [ 1; case.Tokens; case.Experts; h ]

    // three: more than one kernel moves at once
    let return' =
        measure (fun () ->
            perform collectives Collective.RowsToTokens group [
                rows
                there
                route
                ones
                there
                route
                rows
                there
                route
            ] [ back; backOnes; third ])

    Expect.equal (heldOf host h third) (heldOf host h back) "the same rows once more"
    forth, return', (read rows, read ones, heldOf host h back, heldOf host 1 backOnes)

/// Rows of all ranks on each of them, and their sums back.
let private gathered (case: Case) (rank: RankContext) collectives route (host: RowSet) most measure =
    let e, h, all = case.Experts, case.Hidden, case.Tokens * case.Peers
    let joined = blockSlot case.There DType.Bool [ 1; all; e ]
    perform collectives (Collective.AllGather 1) group [ route ] [ joined ]

    let own =
        random rank.Rank (Array.sum host.Counts * h)
        |> rowsIn case.Type case.Here [ 1; case.Tokens; e; h ] most host h

    let whole = blockSlot case.There case.Type [ 1; all; e; h ]

    let forth =
        measure (fun () -> perform collectives (Collective.AllGather 1) group [ own; route; joined ] [ whole ])

    let back = blockSlot case.Here case.Type [ 1; case.Tokens; e; h ]

    let return' =
        measure (fun () -> perform collectives (Collective.ReduceScatter 1) group [ whole; joined; route ] [ back ])

    forth, return', (read whole, heldOf host h back)

let private sameBits name (work: Case -> RankContext -> ICollectives -> SlotValue -> RowSet -> int -> _) check =
    testCase name (fun () ->
        for case in cases do
            let e = case.Experts

            let onHost =
                together [ case.Peers ] 1 (fun rank collectives ->
                    let route = blockSlot case.Here DType.Bool [ 1; case.Tokens; e ]
                    run KernelId.Route [] [ maskSlot 1 case.Tokens e (case.Mask rank.Rank) ] [ route ]

                    let _, _, bits =
                        work case rank collectives route route.Rows route.Rows.Rows (fun act ->
                            act ()
                            [], [])

                    bits)
                |> values

            let asOnGpus =
                counted case.Peers (fun rank collectives nccl ->
                    let route, host = deviceRoute case.Here 1 case.Tokens e (case.Mask rank.Rank) e

                    let forth, return', bits =
                        work case rank collectives route host route.DeviceRows.Rows (messages nccl)

                    check case rank.Rank forth return'
                    bits)

            if asOnGpus <> onHost then
                failtest $"not the loopback's bits: %A{case}")

let private several (case: Case) = [ 0 .. case.Peers - 1 ] |> List.map (fun rank -> Array.sum (case.Mask rank) > 0.0)

let tests =
    testList "Row messages" [
        RowMoveTests.runs
        sameBits
            "rows to their experts and back: the loopback's bits, a message for each peer and operand"
            exchanged
            (fun case me forth return' ->
                let give, take = expected case me 2
                Expect.equal forth (give, take) $"dispatch: %A{case}"
                let give, take = expected case me 3
                Expect.equal return' (take, give) $"combine: %A{case}")

        sameBits
            "rows gathered and summed back: the loopback's bits, a message for each peer"
            gathered
            (fun case me forth return' ->
                let have = several case
                let others = [ 0 .. case.Peers - 1 ] |> List.except [ me ]
                let give = if have[me] then others else []
                let take = others |> List.filter (fun peer -> have[peer])
                Expect.equal forth (give, take) $"gathered: %A{case}"
                Expect.equal return' (take, give) $"scattered: %A{case}")

        testCase
            "a fused dispatch has tokens, what becomes of them, and probabilities: three messages a peer"
            (fun () ->
                let s, e, h, peers = 5, 12, 8, 3

                counted peers (fun rank collectives nccl ->
                    let route, _ = deviceRoute 1 1 s e (Array.create (s * e) 1.0) e
                    let there = blockSlot 4 DType.Bool [ 1; s * peers; e / peers ]
                    perform collectives Collective.RouteToExperts group [ route ] [ there ]

                    let x, p =
                        filled DType.BFloat16 [ 1; s; h ] (random 1 (s * h)),
                        filled DType.Float32 [ 1; s; e ] (random 2 (s * e))

                    let rows = blockSlot 4 DType.BFloat16 [ 1; s * peers; e / peers; h ]
                    let ones = blockSlot 4 DType.Float32 [ 1; s * peers; e / peers ]

                    let others count =
                        [ 0 .. peers - 1 ] |> List.except [ rank.Rank ] |> List.collect (List.replicate count)

                    let twice count = others count, others count

                    let dispatch () =
                        perform collectives (Collective.Dispatch 8) group [ x; p; route; there ] [ rows; ones ]

                    Expect.equal (messages nccl dispatch) (twice 3) "the first by a set"
                    Expect.equal (messages nccl dispatch) (twice 2) "the next"
                    let y, back = slot DType.BFloat16 [ 1; s; h ], slot DType.Float32 [ 1; s; e ]

                    let combine () =
                        perform collectives (Collective.Combine 8) group [ rows; ones; there; route ] [ y; back ]

                    Expect.equal (messages nccl combine) (twice 2) "back")
                |> ignore)

        testCase "a rank alone moves its rows, and sends none" (fun () ->
            let s, e, h = 6, 4, 8

            counted 1 (fun _ collectives nccl ->
                let route, host = deviceRoute 1 1 s e (randomMask 3 s e 2) e
                let there = blockSlot 4 DType.Bool [ 1; s; e ]
                perform collectives Collective.RouteToExperts group [ route ] [ there ]
                let values = random 1 (Array.sum host.Counts * h)
                let own = rowsIn DType.Float32 1 [ 1; s; e; h ] route.DeviceRows.Rows host h values
                let rows, back = blockSlot 4 DType.Float32 [ 1; s; e; h ], rowSlot DType.Float32 [ 1; s; e; h ]

                let both () =
                    perform collectives Collective.RowsToExperts group [ own; route; there ] [ rows ]
                    perform collectives Collective.RowsToTokens group [ rows; there; route ] [ back ]

                Expect.equal (messages nccl both) ([], []) "no messages"
                Expect.equal (heldOf host h back) (rounded DType.Float32 values) "its rows")
            |> ignore)

        testCase "the integers of a way are made once for two sets" (fun () ->
            counted 2 (fun _ collectives _ ->
                let s, e = 4, 4
                let route, host = deviceRoute 1 1 s e (Array.create (s * e) 1.0) e
                let there = rowSlot DType.Bool [ 1; 2 * s; e / 2 ]
                perform collectives Collective.RouteToExperts group [ route ] [ there ]
                let own = rowsIn DType.Float32 1 [ 1; s; e; 1 ] route.DeviceRows.Rows host 1 (random 1 (s * e))
                let never () = failwith "made again"

                for _ in 1..2 do
                    perform collectives Collective.RowsToExperts group [ own; route; there ] [
                        rowSlot DType.Float32 [ 1; 2 * s; e / 2; 1 ]
                    ]

                there.DeviceRows.Moves(RowWay.ToExperts, route.DeviceRows, Func<_>(never)) |> ignore

                Expect.throws
                    (fun () -> there.DeviceRows.Moves(RowWay.ToTokens, route.DeviceRows, Func<_>(never)) |> ignore)
                    "the way back is another one")
            |> ignore)
    ]

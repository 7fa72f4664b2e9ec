/// What dense collectives send from a rank, and what a byte costs inside a node and between nodes.
[<RequireQualifiedAccess>]
module DeepSeekGraph.Compiler.Partition.Links

open DeepSeekGraph

/// Picoseconds a byte inside a node (NVLink, 160 GB/s reached) and between nodes (50 GB/s): DeepSeek-V3's own figures (arXiv 2412.19437,
/// section 3.2.2). Integers, so that every machine chooses alike.
let insideNode, betweenNodes = 6L, 20L

/// Picoseconds that `all` bytes take, of which `away` go to other nodes.
let time (all: int64) (away: int64) : int64 = (all - away) * insideNode + away * betweenNodes

/// Bytes that one rank sends, and of these to other nodes, of `bytes` operand bytes in groups of `n` with `away` peers elsewhere.
let sent (kind: Collective) (bytes: int64) (n: int) (away: int) : struct (int64 * int64) =
    let peers = int64 (n - 1)

    match kind with
    // every peer gets the whole block
    | Collective.AllGather _ -> bytes * peers, bytes * int64 away
    // every peer gets its share
    | Collective.ReduceScatter _
    | Collective.AllToAll _
    | Collective.RouteToExperts
    | Collective.RowsToExperts
    | Collective.RowsToTokens -> bytes * peers / int64 n, bytes * int64 away / int64 n
    // shares are reduced, then given to all
    | Collective.AllReduceSum
    | Collective.AllReduceMax -> 2L * bytes * peers / int64 n, 2L * bytes * int64 away / int64 n
    | Collective.Send _ -> bytes, (if away > 0 then bytes else 0L)
    // counted row by row
    | Collective.Dispatch _
    | Collective.Combine _
    | Collective.Recv _ -> 0L, 0L

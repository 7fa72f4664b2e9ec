/// NCCL in the memory of the processor, as ranks of one process have it; what streams are given is written down, and it breaks when told to.
namespace DeepSeekGraph.Runtime.Tests

open System.Collections.Generic
open System.Threading
open DeepSeekGraph.Runtime.Cuda

/// One rank's calls. `Log` has what streams were given, in order; `Stuck`: nothing queued ever ends.
type internal FakeNccl(fabric: LocalFabric, stop: CancellationToken) =
    let local = LocalCalls(fabric, RankDevice.Cpu, stop)
    let calls = local :> INcclCalls

    member val Log = List<string>()
    member val Ended = List<string>()
    /// All-reduces.
    member val Sums = 0 with get, set
    /// The peers of messages.
    member val Sent = List<int>()
    member val Received = List<int>()
    member val Stuck = false with get, set
    member val Broken: string | null = null with get, set
    member _.Groups = local.Communicators |> Seq.map (fun c -> c.Name, c.Size, c.Me) |> List.ofSeq

    interface INcclCalls with
        member _.Enter() = calls.Enter()
        member _.NewId() = calls.NewId()
        member _.Join(id, ranks, rank) = calls.Join(id, ranks, rank)
        member _.Split(handle, color, key) = calls.Split(handle, color, key)
        member this.Close handle = lock this.Ended (fun () -> this.Ended.Add $"close %i{handle}")
        member this.Abort handle = lock this.Ended (fun () -> this.Ended.Add $"abort %i{handle}")
        member this.Fault _ = this.Broken

        member this.Begin() =
            this.Log.Add "group"
            calls.Begin()

        member _.End() = calls.End()

        member this.AllReduce(handle, from, into, count, kind, max, stream) =
            this.Sums <- this.Sums + 1
            calls.AllReduce(handle, from, into, count, kind, max, stream)

        member _.ReduceScatter(handle, from, into, count, kind, stream) =
            calls.ReduceScatter(handle, from, into, count, kind, stream)

        member _.AllGather(handle, from, into, bytes, stream) = calls.AllGather(handle, from, into, bytes, stream)

        member this.Send(handle, from, bytes, peer, stream) =
            this.Sent.Add peer
            calls.Send(handle, from, bytes, peer, stream)

        member this.Receive(handle, into, bytes, peer, stream) =
            this.Received.Add peer
            calls.Receive(handle, into, bytes, peer, stream)

        member _.Copy(from, into, bytes, stream) = calls.Copy(from, into, bytes, stream)
        member _.ToHost(from, into, bytes, stream) = calls.ToHost(from, into, bytes, stream)
        member _.Then(stream, work) = calls.Then(stream, work)
        member _.Rows = calls.Rows
        member _.Pinned bytes = calls.Pinned bytes
        member _.NewStream() = calls.NewStream()
        member _.Where stream = stream
        member _.NewEvent() = calls.NewEvent()

        member this.Record(recorded, stream) =
            this.Log.Add $"record %i{recorded} on %i{stream}"
            calls.Record(recorded, stream)

        member this.Follow(stream, awaited) =
            this.Log.Add $"%i{stream} follows %i{awaited}"
            calls.Follow(stream, awaited)

        member this.IsDone event = not this.Stuck && calls.IsDone event

/// NCCL in the memory of the processor: what collectives on GPUs ask of it, carried out between threads at once.
namespace DeepSeekGraph.Runtime.Tests

open System
open System.Collections.Generic
open System.Runtime.InteropServices
open System.Threading
open TorchSharp
open DeepSeekGraph.Runtime.Collectives
open DeepSeekGraph.Runtime.Cuda
open DeepSeekGraph.Runtime.Memory

/// What goes from one member of a communicator to another, in order.
type Fabric() =
    let letters = Dictionary<struct (string * int * int), Queue<byte[]>>()
    let shared = Dictionary<string, byte[]>()

    let wait (found: unit -> 'a voption) =
        let until = DateTime.UtcNow.AddSeconds 20.0
        let mutable result = found ()

        while result.IsNone do
            if DateTime.UtcNow > until then
                invalidOp "a member did not come within 20 s"

            Monitor.Wait(letters, 100) |> ignore
            result <- found ()

        result.Value

    member _.Post(communicator: string, from: int, into: int, bytes: byte[]) =
        lock letters (fun () ->
            let key = struct (communicator, from, into)

            if not (letters.ContainsKey key) then
                letters[key] <- Queue()

            letters[key].Enqueue bytes
            Monitor.PulseAll letters)

    member _.Take(communicator: string, from: int, into: int) =
        lock letters (fun () ->
            wait (fun () ->
                match letters.TryGetValue(struct (communicator, from, into)) with
                | true, queue when queue.Count > 0 -> ValueSome(queue.Dequeue())
                | _ -> ValueNone))

    /// What rank 0 hands in under a topic.
    member _.Share(topic: string, rank: int, mine: byte[]) =
        lock letters (fun () ->
            if rank = 0 then
                shared[topic] <- mine
                Monitor.PulseAll letters

            wait (fun () ->
                match shared.TryGetValue topic with
                | true, bytes -> ValueSome bytes
                | _ -> ValueNone))

    /// Messages that nobody has taken.
    member _.Left = lock letters (fun () -> letters.Values |> Seq.sumBy _.Count)

/// A communicator of one rank: its name, how many members it has, and the rank's place.
type internal Communicator = {
    Name: string
    Size: int
    Me: int
    mutable Splits: int
}

/// One rank's calls. `Log` has what streams were given, in order; `Stuck`: nothing queued ever ends.
type internal FakeNccl(fabric: Fabric) =
    let communicators = List<Communicator>()
    let posts, finishes = List<unit -> unit>(), List<unit -> unit>()
    let mutable inGroup = false
    let mutable handles = 100n

    let read (at: nativeint) (bytes: int64) =
        let copy = Array.zeroCreate<byte> (int bytes)

        if bytes > 0L then
            Marshal.Copy(at, copy, 0, copy.Length)

        copy

    let write (bytes: byte[]) (at: nativeint) =
        if bytes.Length > 0 then
            Marshal.Copy(bytes, 0, at, bytes.Length)

    let next () =
        handles <- handles + 1n
        handles

    let add (made: Communicator) =
        communicators.Add made
        nativeint communicators.Count

    let under (handle: nativeint) = communicators[int handle - 1]

    /// At once, or at the end of the group: all sends before all receipts.
    let perform post finish =
        if inGroup then
            posts.Add post
            finishes.Add finish
        else
            post ()
            finish ()

    /// Sums as the loopback does: in member order, bf16 in fp32.
    let reduce (parts: byte[][]) (kind: torch.ScalarType) max =
        let floats (bytes: byte[]) = MemoryMarshal.Cast<byte, float32>(ReadOnlySpan bytes).ToArray()

        let wide (bytes: byte[]) =
            MemoryMarshal.Cast<byte, uint16>(ReadOnlySpan bytes).ToArray()
            |> Array.map (fun bits -> BitConverter.UInt32BitsToSingle(uint32 bits <<< 16))

        let merge (a: float32[]) b = Array.map2 (if max then (fun x y -> MathF.Max(x, y)) else (+)) a b

        match kind with
        | torch.ScalarType.Float32 ->
            MemoryMarshal.AsBytes(ReadOnlySpan(parts |> Array.map floats |> Array.reduce merge)).ToArray()
        | torch.ScalarType.BFloat16 ->
            let sum = parts |> Array.map wide |> Array.reduce merge

            let narrow (x: float32) =
                let bits = BitConverter.SingleToUInt32Bits x
                uint16 ((bits + 0x7fffu + ((bits >>> 16) &&& 1u)) >>> 16)

            MemoryMarshal.AsBytes(ReadOnlySpan(Array.map narrow sum)).ToArray()
        | torch.ScalarType.Int64 ->
            let longs (bytes: byte[]) = MemoryMarshal.Cast<byte, int64>(ReadOnlySpan bytes).ToArray()
            MemoryMarshal.AsBytes(ReadOnlySpan(parts |> Array.map longs |> Array.reduce (Array.map2 (+)))).ToArray()
        | other -> invalidOp $"no sums of %O{other}"

    /// Everybody's bytes, in member order.
    let gather handle (mine: unit -> byte[]) (use': byte[][] -> unit) =
        let c = under handle
        let mutable own = [||]

        perform
            (fun () ->
                own <- mine ()

                for peer in 0 .. c.Size - 1 do
                    if peer <> c.Me then
                        fabric.Post(c.Name, c.Me, peer, own))
            (fun () ->
                use'
                    [|
                        for peer in 0 .. c.Size - 1 -> if peer = c.Me then own else fabric.Take(c.Name, peer, c.Me)
                    |])

    member val Log = List<string>()
    member val Ended = List<string>()
    member val Stuck = false with get, set
    member val Broken: string | null = null with get, set
    member _.Groups = communicators |> Seq.map (fun c -> c.Name, c.Size, c.Me) |> List.ofSeq

    interface INcclCalls with
        member _.Enter() = ()
        member _.NewId() = Guid.NewGuid().ToByteArray()

        member _.Join(id, ranks, rank) =
            add {
                Name = Convert.ToHexString id
                Size = ranks
                Me = rank
                Splits = 0
            }

        member _.Split(handle, color, key) =
            let c = under handle
            c.Splits <- c.Splits + 1
            let mutable part = 0n

            gather
                handle
                (fun () -> Array.append (BitConverter.GetBytes color) (BitConverter.GetBytes key))
                (fun all ->
                    let others =
                        all
                        |> Array.indexed
                        |> Array.filter (fun (_, bytes) -> BitConverter.ToInt32(bytes, 0) = color)
                        |> Array.sortBy (fun (rank, bytes) -> BitConverter.ToInt32(bytes, 4), rank)
                        |> Array.map fst

                    if color >= 0 then
                        part <-
                            add {
                                Name = $"%s{c.Name}/%i{c.Splits}:%i{color}"
                                Size = others.Length
                                Me = Array.IndexOf(others, c.Me)
                                Splits = 0
                            })

            part

        member this.Close handle = lock this.Ended (fun () -> this.Ended.Add $"close %i{handle}")
        member this.Abort handle = lock this.Ended (fun () -> this.Ended.Add $"abort %i{handle}")
        member this.Fault _ = this.Broken

        member this.Begin() =
            this.Log.Add "group"
            inGroup <- true

        member _.End() =
            inGroup <- false
            let all = Seq.append posts finishes |> Array.ofSeq
            posts.Clear()
            finishes.Clear()

            for work in all do
                work ()

        member _.AllReduce(handle, from, into, count, kind, max, _) =
            let bytes = count * int64 (TensorMemory.Width kind)
            gather handle (fun () -> read from bytes) (fun all -> write (reduce all kind max) into)

        member _.ReduceScatter(handle, from, into, count, kind, _) =
            let c = under handle
            let bytes = int (count * int64 (TensorMemory.Width kind))

            gather handle (fun () -> read from (int64 bytes * int64 c.Size)) (fun all ->
                let mine = all |> Array.map (fun whole -> whole[c.Me * bytes .. (c.Me + 1) * bytes - 1])
                write (reduce mine kind false) into)

        member _.AllGather(handle, from, into, bytes, _) =
            gather handle (fun () -> read from bytes) (fun all -> write (Array.concat all) into)

        member _.Send(handle, from, bytes, peer, _) =
            let c = under handle
            perform (fun () -> fabric.Post(c.Name, c.Me, peer, read from bytes)) ignore

        member _.Receive(handle, into, bytes, peer, _) =
            let c = under handle

            perform ignore (fun () ->
                let got = fabric.Take(c.Name, peer, c.Me)

                if int64 got.Length <> bytes then
                    invalidOp $"%i{got.Length} bytes came for %i{bytes}"

                write got into)

        member _.Copy(from, into, bytes, _) = write (read from bytes) into
        member _.ToHost(from, into, bytes, _) = write (read from bytes) into
        member _.FromHost(values, into) = Marshal.Copy(values.ToArray(), 0, into, values.Length)

        member _.ClearPadding(rows, route) =
            let width = RowExchange.Width rows
            let at: nativeint = NcclLaunch.Address rows

            match route.Host with
            | null -> invalidOp "rows that nobody counted"
            | host ->
                for e in 0 .. host.Experts - 1 do
                    let first = int64 (host.Offsets[e] + host.Counts[e])
                    let bytes = (int64 host.Offsets[e + 1] - first) * width
                    write (Array.zeroCreate (int bytes)) (at + nativeint (first * width))

        member _.Pinned bytes = Marshal.AllocHGlobal(nativeint bytes)
        member _.NewStream() = next ()
        member _.NewEvent() = next ()

        member this.Record(recorded, stream) =
            this.Log.Add $"record %i{recorded} on %i{stream}"

        member this.Follow(stream, awaited) =
            this.Log.Add $"%i{stream} follows %i{awaited}"

        member this.IsDone _ = not this.Stuck
